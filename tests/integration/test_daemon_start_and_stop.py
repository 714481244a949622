"""The daemon's start and end, seen from outside."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon_process import (
    ROOT,
    DaemonProcess,
    LineClient,
    running_daemon,
    wait_until,
)

SIMULATED = ("--simulate", "1x24576")
# The contract: without a descriptor store the daemon exits 0 within 5 s of SIGTERM.
STOP_PROMISE_S = 5.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, *SIMULATED) as running:
        yield running


def test_a_daemon_that_has_answered_grants(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        assert client.ask("health")["status"] == "ok"
        grant = client.ask("lease", agent="analyst", min_memory_mb=1_024)
        assert grant["granted"] is True
        assert client.ask("ready")["ready"] is True


def test_the_start_is_logged_once_with_who_and_where(daemon: DaemonProcess) -> None:
    started = daemon.wait_for_log("daemon.started")
    assert started["pid"] == daemon.pid
    assert started["socket"] == str(daemon.socket)
    assert started["safe_mode"] is False
    assert len(daemon.logged("daemon.started")) == 1


def test_the_socket_file_has_its_mode(daemon: DaemonProcess) -> None:
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_waiters_tells_holders_and_exits_0_in_time(
    tmp_path: Path, number: signal.Signals
) -> None:
    with running_daemon(tmp_path, *SIMULATED) as daemon:
        with daemon.client() as holder, daemon.client() as waiter:
            assert holder.ask("lease", agent="a", min_memory_mb=20_000)["granted"]
            waiter.send("lease", id="w", agent="b", min_memory_mb=20_000, wait_s=600)
            waiter.event("lease.queued")
            began = time.monotonic()
            daemon.signal(number)
            answer = waiter.reply()
            holder.event("daemon.stopping")
            assert holder.receive() is None
            assert daemon.wait() == 0
            assert time.monotonic() - began < STOP_PROMISE_S
        assert answer["id"] == "w"
        assert answer["error"]["code"] == "shutting_down"
        assert not daemon.socket.exists()


def test_a_holder_that_never_reads_does_not_delay_the_stop(daemon: DaemonProcess) -> None:
    with daemon.client() as silent:
        # More answers than a socket takes: some of them stay unsent in the daemon.
        silent.send_until_full("gpu_info")
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < STOP_PROMISE_S


def test_who_connects_while_it_stops_is_refused_and_the_name_stays_taken(tmp_path: Path) -> None:
    with running_daemon(tmp_path, *SIMULATED) as daemon, daemon.client() as silent:
        silent.send_until_full("gpu_info")
        with daemon.client() as holder:
            assert holder.ask("lease", agent="a")["granted"]
            daemon.signal(signal.SIGTERM)
            holder.event("daemon.stopping")
            # What the other does not read is waited for, and no connection has been lost yet.
            with pytest.raises(ConnectionRefusedError):
                daemon.client()
            assert daemon.socket.exists()
        assert daemon.wait() == 0
        assert not daemon.socket.exists()


def test_a_hangup_without_a_change_changes_nothing(daemon: DaemonProcess) -> None:
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_log("config.reloaded")
    with daemon.client() as client:
        assert client.ask("health")["status"] == "ok"
    assert daemon.stop() == 0


def test_a_second_daemon_refuses_to_start_and_says_who_is_there(daemon: DaemonProcess) -> None:
    second = DaemonProcess(daemon.folder, *SIMULATED)
    try:
        assert second.wait() == 1
    finally:
        second.end()
    (line,) = [line for line in second.output().splitlines() if line.startswith("gpuorchd: ")]
    assert f"another daemon (pid {daemon.pid})" in line
    assert str(daemon.socket) in line
    with daemon.client() as client:
        assert client.ask("health")["status"] == "ok"


def test_a_second_daemon_with_the_same_state_folder_refuses_to_start(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    second = DaemonProcess(other, *SIMULATED, "--state-dir", str(daemon.state))
    try:
        assert second.wait() == 1
    finally:
        second.end()
    assert f"another daemon (pid {daemon.pid}) has {daemon.state}" in second.output()
    assert not second.socket.exists()


def test_a_killed_daemon_leaves_a_stale_socket_that_the_next_takes_over(tmp_path: Path) -> None:
    with running_daemon(tmp_path, *SIMULATED) as first:
        first.signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        assert first.socket.exists()
    with running_daemon(tmp_path, *SIMULATED) as second, second.client() as client:
        assert client.ask("health")["status"] == "ok"


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("somebody's")
    daemon = DaemonProcess(tmp_path, *SIMULATED)
    try:
        assert daemon.wait() == 1
    finally:
        daemon.end()
    assert "is not a socket" in daemon.output()
    assert (tmp_path / "s").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GPU_ORCHESTRATOR_PORT", "eighty"),
        ("GPU_ORCHESTRATOR_LEASE_TTL", "-1"),
        ("SAFE_MODE", "perhaps"),
        ("ENABLE_NVML", "maybe"),
        ("GPUORCH_SIMULATE", "lots"),
        ("GPUORCH_MAX_HOLDERS", "0"),
    ],
)
def test_a_bad_value_stops_the_start_before_anything_is_made(
    tmp_path: Path, variable: str, value: str
) -> None:
    daemon = DaemonProcess(tmp_path, environ={variable: value})
    try:
        assert daemon.wait() == 2
    finally:
        daemon.end()
    (line,) = daemon.output().splitlines()
    assert line.startswith(f"gpuorchd: {variable} is {value!r}; allowed: ")
    assert {path.name for path in tmp_path.iterdir()} == {"daemon.log"}


def test_a_misspelt_variable_is_warned_of_in_the_log(tmp_path: Path) -> None:
    with running_daemon(tmp_path, *SIMULATED, environ={"GPUORCH_SOKET": "/x"}) as daemon:
        warned = daemon.wait_for_log("config.value_warned")
        assert "did you mean GPUORCH_SOCKET?" in warned["warning"]


# Lowers the limit of open files for good (root would raise it again with CAP_SYS_RESOURCE).
FEW_FILES = """\
import ctypes, os, resource, sys
PR_CAPBSET_DROP, CAP_SYS_RESOURCE = 24, 24
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_RESOURCE, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))
os.execv(sys.executable, [sys.executable, "-m", "gpuorchd", *sys.argv[1:]])
"""


def test_too_few_open_files_lower_the_bounds_loudly(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, *SIMULATED, program=("-c", FEW_FILES))
    try:
        daemon.wait_until_it_answers()
        lowered = daemon.wait_for_log("host.bounds_lowered")
        assert lowered["level"] == "error"
        assert lowered["open_files"] == 1_000
        assert lowered["needed_files"] > 4_096 + 1_024
        assert lowered["wanted_connections"] == 4_096
        assert lowered["max_connections"] + lowered["max_processes"] < 1_000
        # The lowered bound is the one that is kept; a user's share of it is lowered as much.
        share = lowered["max_connections"] * 3_584 // 4_096
        with ExitStack() as clients:
            for _ in range(share):
                clients.enter_context(daemon.client())
            with daemon.client() as one_too_many:
                error = one_too_many.ask("health")["error"]
            assert error["code"] == "limit"
            assert f"at most {share} connections of one user" in error["message"]
        assert daemon.stop() == 0
    finally:
        daemon.end()


def test_the_state_folder_of_the_service_manager_is_used(tmp_path: Path) -> None:
    managed = tmp_path / "managed"
    with running_daemon(tmp_path, *SIMULATED, environ={"STATE_DIRECTORY": str(managed)}) as daemon:
        assert (managed / "settings.json").exists()
        assert not daemon.state.exists()


def test_signals_that_follow_a_stop_spoil_nothing_of_it(daemon: DaemonProcess) -> None:
    with daemon.client() as holder, daemon.client() as waiter:
        assert holder.ask("lease", agent="a", exclusive=True)["granted"]
        waiter.send("lease", id="w", agent="b", exclusive=True, wait_s=600)
        waiter.event("lease.queued")
        daemon.signal(signal.SIGTERM)
        # One after the other until its end, whatever it is doing.
        while daemon.process.poll() is None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                daemon.signal(number)
        assert daemon.wait() == 0
        assert waiter.reply()["error"]["code"] == "shutting_down"
        holder.event("daemon.stopping")
    assert not daemon.socket.exists()


def test_a_start_without_gpus_answers_and_leases_nothing(tmp_path: Path) -> None:
    with running_daemon(tmp_path) as daemon, daemon.client() as client:
        wait_until(lambda: bool(client.ask("ready")["ready"]), "ready without a GPU")
        info = client.ask("gpu_info")
        if info["available"]:
            pytest.skip("needs a host without a GPU, this has a GPU")
        assert info["message"]
        denial = client.ask("lease", agent="a", min_memory_mb=1_024, wait_s=60)
        assert (denial["granted"], denial["note"]) == (False, "NO_GPU")


def test_neither_a_start_nor_safe_mode_opens_the_driver_in_the_daemon(tmp_path: Path) -> None:
    safe = {"SAFE_MODE": "true"}
    with running_daemon(tmp_path, environ=safe) as daemon, daemon.client() as client:
        info = client.ask("gpu_info")
        assert info["available"] is False
        assert "SAFE_MODE" in info["message"]
        assert "libnvidia-ml" not in Path(f"/proc/{daemon.pid}/maps").read_text()
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text()
        assert children.strip() == ""


def test_a_busy_http_port_costs_no_lease_is_told_and_is_taken_once_it_is_free(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running_daemon(tmp_path, *SIMULATED, "--http-port", str(port)) as daemon:
            failed = daemon.wait_for_log("http.bind_failed")
            assert failed["level"] == "error"
            with daemon.client() as client:
                assert client.ask("lease", agent="a", min_memory_mb=1_024)["granted"] is True
                check = client.ask("ready")
                assert check["ready"] is True
                assert "not served" in check["checks"]["http"]["detail"]
                assert str(port) in check["checks"]["http"]["detail"]
                taken.close()
                daemon.wait_for_log("http.bound")
                assert "not served" not in client.ask("ready")["checks"]["http"]["detail"]
            assert len(daemon.logged("http.bind_failed")) == 1
            assert daemon.stop() == 0


def close_standard_streams() -> None:
    for number in range(3):
        os.close(number)


def test_standard_streams_that_are_closed_are_nobody_elses(tmp_path: Path) -> None:
    flags = ("--socket", str(tmp_path / "s"), "--state-dir", str(tmp_path / "state"))
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuorchd", *SIMULATED, *flags, "--http-port", "0"],
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        preexec_fn=close_standard_streams,
    )
    try:
        wait_until((tmp_path / "s").exists, "the socket")
        streams = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        assert streams == [os.devnull] * 3
        with LineClient(tmp_path / "s") as client:
            assert client.ask("lease", agent="a", min_memory_mb=1)["granted"]
        process.terminate()
        assert process.wait(STOP_PROMISE_S) == 0
        # What was once the log's descriptor may have been the lock's.
        assert (tmp_path / "state" / "lock").read_text() == f"{process.pid}\n"
    finally:
        process.kill()
        process.wait()


def test_a_bad_value_is_told_by_its_code_where_nobody_can_be_told_more(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuorchd", "--http-port", "nonsense"],
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        preexec_fn=close_standard_streams,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2


def test_the_command_says_what_is_missing_where_the_daemon_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ModuleNotFoundError(name='uvloop')")
    done = subprocess.run(
        [sys.executable, "-m", "gpuorchd", "--socket", str(tmp_path / "s")],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "gpuorchd: uvloop is missing; install gpuorchd[daemon]\n"
