"""MPS is there when its control process is, and not because somebody made a directory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuorchd.devices.mps import PID_FILE, MpsWatch, control_process


@pytest.fixture
def control(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A living process with the name of the MPS control process."""
    named = tmp_path / "nvidia-cuda-mps-control"
    shutil.copy("/bin/cat", named)
    with subprocess.Popen([named], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        # Its echo shows that it runs under its own name by now.
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        yield process


def write_pid(folder: Path, text: str) -> str:
    (folder / PID_FILE).write_text(text)
    return str(folder)


def test_a_living_control_process_is_seen(control: subprocess.Popen[bytes], tmp_path: Path) -> None:
    pipe_dir = write_pid(tmp_path, f"{control.pid}\n")
    assert control_process(pipe_dir) == control.pid
    assert MpsWatch(True, pipe_dir).look() == (True, pipe_dir, True)


def test_a_dead_control_process_is_not_seen(
    control: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    pipe_dir = write_pid(tmp_path, str(control.pid))
    control.kill()
    os.waitid(os.P_PID, control.pid, os.WEXITED | os.WNOWAIT)
    assert control_process(pipe_dir) is None, "a zombie serves nobody"
    control.wait()
    assert control_process(pipe_dir) is None


@pytest.mark.parametrize("text", ["", "abc", "-1", "0", "99999999999", "own pid", "1 2"])
def test_a_pid_file_that_names_no_control_process_proves_nothing(text: str, tmp_path: Path) -> None:
    # The pid of this process differs between parallel runs, so it cannot name the case.
    written = str(os.getpid()) if text == "own pid" else text
    assert control_process(write_pid(tmp_path, written)) is None


def test_a_directory_alone_proves_nothing(tmp_path: Path) -> None:
    assert not MpsWatch(True, str(tmp_path)).look().enabled
    assert not MpsWatch(True, str(tmp_path / "missing")).look().enabled


def test_what_lies_in_the_place_of_the_pid_file_is_neither_followed_nor_waited_for(
    control: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").write_text(str(control.pid))
    (tmp_path / PID_FILE).symlink_to(tmp_path / "elsewhere")
    assert control_process(str(tmp_path)) is None
    (tmp_path / PID_FILE).unlink()
    os.mkfifo(tmp_path / PID_FILE)
    assert control_process(str(tmp_path)) is None


def test_where_mps_is_not_wanted_nothing_is_looked_at(
    control: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    pipe_dir = write_pid(tmp_path, str(control.pid))
    assert MpsWatch(False, pipe_dir).look() == (False, pipe_dir, False)


def test_a_look_is_repeated_once_it_is_a_second_old(
    control: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    now_ns = 5_000_000_000
    watch = MpsWatch(True, str(tmp_path), clock=lambda: now_ns)
    assert not watch.look().enabled
    write_pid(tmp_path, str(control.pid))
    now_ns += 900_000_000
    assert not watch.look().enabled
    now_ns += 200_000_000
    assert watch.look().enabled
