"""`gpuorch doctor` as a process: without a daemon, with one."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

from libclient.cli import exits
from tests.support.cli_process import gpuorch, gpuorch_json
from tests.support.daemon_process import running_daemon, wait_until


def test_without_a_daemon_it_says_what_to_do(tmp_path: Path) -> None:
    done = gpuorch(tmp_path / "none", "doctor")
    assert done.returncode == exits.NO, done.stderr
    assert done.stderr == ""
    assert f"{tmp_path}/none is not there" in done.stdout
    assert "fail" in done.stdout
    assert "\x1b" not in done.stdout


def test_with_a_daemon_nothing_fails(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = ("--simulate", "2x24576", "--http-port", str(port))
    with running_daemon(tmp_path, *flags) as daemon:
        daemon.wait_for_log("http.bound")
        wait_until(lambda: gpuorch(daemon.socket, "ready").returncode == 0, "the daemon is ready")
        document = gpuorch_json(daemon.socket, "doctor")
        assert document["healthy"] is True
        found = {finding["area"]: finding for finding in document["findings"]}
        assert f"pid {daemon.pid}" in found["daemon"]["found"]
        assert f"127.0.0.1:{port} answers" in found["port"]["found"]
        assert found["socket"]["level"] == "ok"
        assert [one["area"] for one in document["findings"]].count("gpu") == 2


def test_strict_takes_a_warning_for_a_failure(tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--safe-mode", "--simulate", "1x1024") as daemon:
        assert gpuorch(daemon.socket, "doctor").returncode == exits.OK
        strict = gpuorch(daemon.socket, "doctor", "--strict")
    assert strict.returncode == exits.NO
    assert "SAFE_MODE is on" in strict.stdout


def test_a_daemon_that_does_not_answer_is_found_within_the_timeout(tmp_path: Path) -> None:
    with running_daemon(tmp_path, "--simulate", "1x1024") as daemon:
        daemon.signal(signal.SIGSTOP)
        try:
            done = gpuorch(daemon.socket, "doctor", "--timeout", "300ms")
        finally:
            daemon.signal(signal.SIGCONT)
    assert done.returncode == exits.NO
    (line,) = (line for line in done.stdout.splitlines() if "daemon  " in line)
    assert line.startswith("fail")
    assert "in time" in line
