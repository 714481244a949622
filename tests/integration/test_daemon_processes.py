"""The bound on watched processes, and a bug, as clients meet them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.daemon_process import DaemonProcess, running_daemon, wait_until

SIMULATED = ("--simulate", "1x24576")

# A client in a process of its own: sends each line that it reads, prints the first reply to it.
CLIENT = """\
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    replies = sock.makefile("rb")
    for line in sys.stdin.buffer:
        sock.sendall(line)
        sys.stdout.buffer.write(replies.readline())
        sys.stdout.buffer.flush()
"""


class OtherProcess:
    """A client that is another process than this one."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
        self._process.stdin.flush()
        reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        return reply


@contextmanager
def other_process(path: Path) -> Iterator[OtherProcess]:
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield OtherProcess(process)
        finally:
            process.kill()


def test_a_process_over_the_bound_is_refused_and_those_within_it_go_on(tmp_path: Path) -> None:
    ask = {"agent": "a", "min_memory_mb": 100}
    with (
        running_daemon(tmp_path, *SIMULATED, "--max-processes", "1") as daemon,
        daemon.client() as first,
        other_process(daemon.socket) as other,
    ):
        assert first.ask("lease", **ask)["granted"] is True
        error = other.ask("lease", **ask)["error"]
        assert error["code"] == "limit"
        assert "at most 1 processes" in error["message"]
        # Another connection of a process that is watched already takes no descriptor more.
        with daemon.client() as second:
            assert second.ask("lease", **ask)["granted"] is True
        # A refused one is not cut off, and may ask again when there is room.
        assert other.ask("health")["status"] == "ok"
        first.close()
        wait_until(lambda: bool(other.ask("lease", **ask).get("granted")), "room again")
        assert daemon.stop() == 0


def test_one_user_does_not_take_all_places_and_a_dry_run_takes_none(tmp_path: Path) -> None:
    ask = {"agent": "a", "min_memory_mb": 100}
    bounds = ("--max-processes-per-uid", "1")
    with (
        running_daemon(tmp_path, *SIMULATED, *bounds) as daemon,
        other_process(daemon.socket) as other,
        daemon.client() as first,
    ):
        assert other.ask("explain", **ask)["would_grant"] is True
        assert first.ask("lease", **ask)["granted"] is True
        error = other.ask("lease", **ask)["error"]
        assert error["code"] == "limit"
        assert "at most 1 processes of one user" in error["message"]
        assert other.ask("explain", **ask)["would_grant"] is True
        assert daemon.stop() == 0


def test_a_bug_is_answered_logged_with_its_place_and_ends_the_daemon(tmp_path: Path) -> None:
    # The daemon with one view broken.
    script = (
        "import sys\n"
        "from gpuorchd import views\n"
        "from gpuorchd.__main__ import main\n"
        "def fall(state): raise KeyError('a bug')\n"
        "views.health = fall\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    daemon = DaemonProcess(tmp_path, *SIMULATED, program=("-c", script))
    try:
        daemon.wait_for_log("daemon.started")
        with daemon.client() as client:
            reply = client.ask("health", id="h1")
        assert reply["error"]["code"] == "internal"
        assert daemon.wait() == 70
    finally:
        daemon.end()
    (bug,) = daemon.logged("daemon.bug_met")
    assert "h1" in bug["what"]
    assert "health" in bug["what"]
    assert "in fall" in bug["error"]
    assert not daemon.socket.exists()


def test_a_bug_on_the_way_out_is_logged_and_does_not_pass_for_a_clean_stop(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from gpuorchd.__main__ import main\n"
        "from gpuorchd.daemon import Daemon\n"
        "def fall(daemon, code): raise KeyError('a bug')\n"
        "Daemon.end = fall\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    daemon = DaemonProcess(tmp_path, *SIMULATED, program=("-c", script))
    try:
        daemon.wait_until_it_answers()
        assert daemon.stop() == 70
    finally:
        daemon.end()
    (bug,) = daemon.logged("daemon.bug_met")
    assert "in fall" in bug["error"]
    assert not daemon.logged("daemon.stopped")
    assert not daemon.socket.exists()
