"""The demo from start to summary, as `make demo` runs it where there is no terminal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from libclient.demo.roster import CARD_MB, ROSTER
from tests.support.daemon_process import ROOT, wait_until

# What is promised, from the installation on.
WHOLE_S = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of its own for the demo's own; short, for it holds a socket."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        yield Path(name)


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "libclient.demo"],
        cwd=ROOT,
        # Nothing of the host's own daemon may reach it.
        env={**os.environ, "TMPDIR": str(folder), "SAFE_MODE": "true", "GPUORCH_SOCKET": "/no"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_of(folder: Path) -> list[int]:
    """The processes that still use the demo's socket or folder."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            environ = Path(f"/proc/{name}/environ").read_bytes()
            command = Path(f"/proc/{name}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"{folder}/".encode() in environ + command:
            found.append(int(name))
    return found


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_the_roster_does_not_fit_at_once() -> None:
    assert sum(entry.limit_mb(1.0) for entry in ROSTER) > CARD_MB
    assert sum(entry.limit_gib for entry in ROSTER) == pytest.approx(24.3)


@pytest.mark.slow
def test_the_demo_holds_what_it_promises_and_leaves_nothing(folder: Path) -> None:
    began = time.monotonic()
    process = start(folder)
    try:
        out, _ = process.communicate(timeout=WHOLE_S)
    finally:
        end(process)
    assert process.returncode == 0, out
    assert time.monotonic() - began < WHOLE_S
    assert "everything held" in out
    assert "FAILED" not in out
    assert "SIGKILL for fact_checker" in out
    assert re.search(r"newsreader has its memory \d+ ms after the kill", out)
    assert "TIMEOUT" in out
    assert "SAFE_MODE" in out
    assert left_of(folder) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_everything_that_it_started(
    folder: Path, number: signal.Signals
) -> None:
    process = start(folder)
    try:
        assert process.stdout is not None
        while "analyst gets" not in (line := process.stdout.readline()):
            assert line, "it ended by itself"
        process.send_signal(number)
        out, _ = process.communicate(timeout=WHOLE_S)
    finally:
        end(process)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert left_of(folder) == []
    assert list(folder.iterdir()) == []


def test_a_killed_demo_takes_its_processes_along(folder: Path) -> None:
    process = start(folder)
    try:
        assert process.stdout is not None
        while "analyst gets" not in (line := process.stdout.readline()):
            assert line, "it ended by itself"
        assert left_of(folder) != []
    finally:
        end(process)
    wait_until(lambda: left_of(folder) == [], "every process of the demo has ended")
