"""The checks of the test run itself: they find what they are there to find."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.support import leaks, skips

ROOT = Path(__file__).parents[2]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SETTLE_S", 0.05)


@pytest.mark.usefixtures("soon")
def test_a_descriptor_left_open_is_named() -> None:
    before = leaks.Snapshot.take()
    number = os.open("/dev/zero", os.O_RDONLY)
    try:
        assert leaks.left_behind(before) == [f"descriptor {number} -> /dev/zero"]
    finally:
        os.close(number)
    assert leaks.left_behind(before) == []


@pytest.mark.usefixtures("soon")
def test_a_thread_left_running_is_named() -> None:
    before = leaks.Snapshot.take()
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="forgotten")
    thread.start()
    try:
        assert leaks.left_behind(before) == ["thread forgotten"]
    finally:
        release.set()
        thread.join()
    assert leaks.left_behind(before) == []


@pytest.mark.usefixtures("soon")
def test_a_child_left_running_is_named() -> None:
    before = leaks.Snapshot.take()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        left = leaks.left_behind(before)
        assert any(line.startswith(f"child process {child.pid} ") for line in left), left
    finally:
        child.communicate(b"\n")
    assert leaks.left_behind(before) == []


def test_a_task_left_pending_is_named() -> None:
    done = _pytest_run(
        "import asyncio\n"
        "kept = []\n"
        "def test_it():\n"
        "    async def forget():\n"
        "        kept.append(asyncio.create_task(asyncio.Event().wait(), name='forgotten'))\n"
        "    asyncio.run(forget())\n"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "task forgotten" in done.stdout


def test_only_a_missing_gpu_and_missing_shared_data_excuse_a_skip_in_ci() -> None:
    reasons = [skips.NO_GPU, skips.NO_SHARED_DATA, "socat is missing"]
    assert skips.unexcused(reasons) == ["socat is missing"]


@pytest.mark.parametrize(
    ("reason", "in_ci", "code"),
    [
        ("socat is missing", "true", 1),
        ("socat is missing", "", 0),
        (skips.NO_GPU, "true", 0),
    ],
)
def test_a_skip_fails_the_run_in_ci_alone(reason: str, in_ci: str, code: int) -> None:
    done = _pytest_run(
        "import pytest\n"
        f"def test_it():\n    pytest.skip({reason!r})\n"
        "def test_other():\n    pass\n",
        in_ci=in_ci,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert ("not allowed in CI" in done.stdout) == (code == 1)


def _pytest_run(source: str, *, in_ci: str = "") -> subprocess.CompletedProcess[str]:
    """Run one file of tests under this project's checks, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "test_example.py")
        path.write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest"]
        command += ["-c", os.devnull, "-p", "no:cacheprovider", "--rootdir", folder, str(path)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "CI": in_ci},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
