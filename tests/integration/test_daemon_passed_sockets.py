"""A daemon that was given its sockets, and what it tells who gave them."""

from __future__ import annotations

import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import DaemonProcess, running_daemon
from tests.support.passing_manager import Ear, passed_daemon

LISTENER, METRICS = "gpuorchd.socket", "gpuorchd-metrics.socket"


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[Ear]:
    with Ear(tmp_path / "n") as made:
        yield made


@pytest.fixture
def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert isinstance(port, int)
    return port


def http_status(port: int, page: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=20) as answer:
        status = answer.status
    assert isinstance(status, int)
    return status


def test_it_serves_the_passed_sockets_and_leaves_the_file(tmp_path: Path, free_port: int) -> None:
    # The number configured is another: what was passed wins.
    passed = {LISTENER: tmp_path / "s", METRICS: free_port}
    with passed_daemon(tmp_path, passed=passed, environ={"GPU_ORCHESTRATOR_PORT": ""}) as daemon:
        daemon.wait_until_it_answers()
        before = daemon.socket.stat()
        assert http_status(free_port, "/health") == 200
        with daemon.client() as client:
            assert client.ask("lease", agent="analyst", min_memory_mb=100)["granted"] is True
            checks = client.ask("ready")["checks"]
        assert checks["http"] == {"ok": True, "detail": f"127.0.0.1:{free_port}"}
        assert daemon.logged("daemon.started")[0]["socket"] == str(daemon.socket)
        assert daemon.stop() == 0
    after = daemon.socket.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert not Path(f"{daemon.socket}.lock").exists()


def test_a_port_that_differs_from_the_passed_one_is_not_ready(
    tmp_path: Path, free_port: int
) -> None:
    passed = {LISTENER: tmp_path / "s", METRICS: free_port}
    with passed_daemon(tmp_path, "--http-port", "9", passed=passed) as daemon:
        daemon.wait_until_it_answers()
        assert http_status(free_port, "/health") == 200
        with daemon.client() as client:
            answer = client.ask("ready")
    assert answer["ready"] is False
    detail = answer["checks"]["http"]["detail"]
    assert "GPU_ORCHESTRATOR_PORT is 9" in detail
    assert f"127.0.0.1:{free_port}" in detail


def test_without_the_unix_socket_it_ends_with_the_reason(tmp_path: Path, free_port: int) -> None:
    with passed_daemon(tmp_path, passed={METRICS: free_port}) as daemon:
        assert daemon.wait() == 1
    assert "started this daemon without its Unix socket" in daemon.output()
    assert not daemon.socket.exists()


def test_a_service_manager_that_passes_nothing_is_told_why_it_ends(
    tmp_path: Path, ear: Ear
) -> None:
    daemon = DaemonProcess(tmp_path, environ={"NOTIFY_SOCKET": str(ear.path)})
    try:
        assert daemon.wait() == 1
    finally:
        daemon.end()
    assert "GPUORCH_REQUIRE_PASSED_SOCKET=false" in daemon.output()


def test_it_may_be_told_to_bind_its_own_under_a_service_manager(tmp_path: Path, ear: Ear) -> None:
    environ = {"NOTIFY_SOCKET": str(ear.path)}
    flags = ("--require-passed-socket", "false", "--simulate", "1x1000")
    with running_daemon(tmp_path, *flags, environ=environ) as daemon:
        assert ear.hear() == "READY=1"
        assert daemon.stop() == 0


def test_ready_is_said_when_the_socket_answers_and_the_end_when_it_begins(
    tmp_path: Path, ear: Ear
) -> None:
    environ = {"NOTIFY_SOCKET": str(ear.path)}
    with passed_daemon(tmp_path, passed={LISTENER: tmp_path / "s"}, environ=environ) as daemon:
        assert ear.hear() == "READY=1"
        with daemon.client() as client:
            assert client.ask("health")["status"] == "ok"
            assert client.ask("lease", agent="analyst", min_memory_mb=100)["granted"] is True
            heard = ear.hear_until("STATUS=1 GPU (100 of 24576 MiB leased), 1 lease,")
        assert all(line.startswith("STATUS=") for line in heard)
        daemon.signal(signal.SIGTERM)
        ear.hear_until("STOPPING=1")
        assert daemon.wait() == 0


def test_ready_does_not_wait_for_a_driver_that_hangs(tmp_path: Path, ear: Ear) -> None:
    # A driver's library that hangs while it is loaded, in the child process that asks it.
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "pynvml.py").write_text("import time\ntime.sleep(600)\n")
    environ = {"NOTIFY_SOCKET": str(ear.path), "PYTHONPATH": os.fspath(modules)}
    passed = {LISTENER: tmp_path / "s"}
    with passed_daemon(tmp_path, passed=passed, environ=environ, cards="") as daemon:
        assert ear.hear() == "READY=1"
        with daemon.client() as client:
            assert client.ask("health")["status"] == "ok"
            assert client.ask("ready")["checks"]["devices"]["ok"] is False


def test_the_watchdog_is_fed_while_it_lives_and_the_variables_end_with_it(
    tmp_path: Path, ear: Ear
) -> None:
    environ = {"NOTIFY_SOCKET": str(ear.path), "WATCHDOG_USEC": "300000"}
    with passed_daemon(tmp_path, passed={LISTENER: tmp_path / "s"}, environ=environ) as daemon:
        for _ in range(3):
            ear.hear_until("WATCHDOG=1")
        daemon.signal(signal.SIGSTOP)
        # What was said before it stood still is heard first.
        ear.wait_for_silence(0.6)
        daemon.signal(signal.SIGCONT)
        ear.hear_until("WATCHDOG=1")


def test_what_cannot_be_used_is_logged_and_costs_no_lease(tmp_path: Path) -> None:
    passed = {LISTENER: tmp_path / "s", "stranger.socket": tmp_path / "other"}
    environ = {"WATCHDOG_USEC": "soon"}
    with passed_daemon(tmp_path, passed=passed, environ=environ) as daemon:
        daemon.wait_until_it_answers()
        daemon.wait_for_log("host.passed_unusable")
        problems = [line["problem"] for line in daemon.logged("host.passed_unusable")]
    assert len(problems) == 2
    assert "stranger.socket" in problems[0]
    assert "WATCHDOG_USEC is 'soon'" in problems[1]
