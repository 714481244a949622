"""The daemon is started by its sockets, and neither its end nor a crash makes them deaf."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.daemon_process import wait_until
from tests.systemd.rig import DAEMON, PYTHON, SOCKET, SOCKETS, Rig

pytestmark = [pytest.mark.serial, pytest.mark.slow]

KILLS = 80
ROUNDS = 5
LISTENER, METRICS = SOCKETS
# Asks for health until somebody answers: a client that waits while the daemon is killed.
PATIENT = """
import json, socket, sys, time
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        try:
            sock.connect(sys.argv[1])
            sock.sendall(b"health\\n")
            line = sock.makefile().readline()
        except ConnectionError:
            continue
        if line:
            print(json.loads(line)["status"])
            break
"""
SCRAPE = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=20).status)
"""
# These say what they have, and keep it until their input ends.
OCCUPY = """
import socket, sys
server = socket.create_server(("127.0.0.1", 8014))
print("up", flush=True)
sys.stdin.read()
"""
HOLD = """
import libclient, sys
lease = libclient.lease("analyst", "2GiB")
print("held" if lease.granted else lease.reason, flush=True)
sys.stdin.read()
"""


def test_the_first_client_s_connection_starts_the_daemon(rig: Rig) -> None:
    assert not rig.is_active(DAEMON)
    assert rig.gpuorch("health").stdout.strip() == "ok"
    assert rig.is_active(DAEMON)
    assert rig.show(DAEMON, "User") == "gpuorchd"
    # By the client library, as an agent's user: no more than a lease.
    code = "import libclient; print(libclient.lease('analyst', '2GiB').device)"
    assert rig.python(code).strip() == "cuda:0"


def test_the_first_scrape_starts_the_daemon(rig: Rig) -> None:
    status, body = rig.http("/health")
    assert (status, json.loads(body)["status"]) == (200, "ok")
    assert rig.is_active(DAEMON)


def test_a_scrape_alone_starts_a_daemon_that_clients_reach_too(rig: Rig) -> None:
    rig.systemctl("stop", LISTENER)
    assert rig.http("/health")[0] == 200
    assert rig.is_active(LISTENER)
    assert rig.gpuorch("health").stdout.strip() == "ok"


def test_both_sockets_at_once_start_one_daemon_that_serves_both(rig: Rig) -> None:
    url = "http://127.0.0.1:8014/health"
    for _ in range(ROUNDS):
        rig.systemctl("stop", DAEMON)
        with (
            started(rig, PYTHON, "-I", "-c", PATIENT, SOCKET) as client,
            started(rig, PYTHON, "-I", "-c", SCRAPE, url) as scraper,
        ):
            assert client.communicate(timeout=60)[0].strip() == "ok"
            assert scraper.communicate(timeout=60)[0].strip() == "200"
        assert [rig.is_active(unit) for unit in (*SOCKETS, DAEMON)] == [True] * 3
        assert rig.show(DAEMON, "NRestarts") == "0"


def test_the_socket_file_survives_the_daemon_s_stop(rig: Rig) -> None:
    rig.gpuorch("health")
    path = rig.path(SOCKET)
    before = path.stat()
    assert stat.S_IMODE(before.st_mode) == 0o660
    assert before.st_gid == int(rig.run("id", "-g", "justnews").stdout)
    rig.systemctl("stop", DAEMON)
    assert not rig.is_active(DAEMON)
    after = path.stat()
    assert (after.st_ino, after.st_mode, after.st_gid) == (
        before.st_ino,
        before.st_mode,
        before.st_gid,
    )
    assert rig.gpuorch("health").stdout.strip() == "ok"


def test_who_is_not_in_the_group_does_not_reach_it(rig: Rig) -> None:
    done = rig.run("gpuorch", "health", user="nobody", check=False)
    assert done.returncode != 0
    assert "permission denied (not in its group?)" in done.stderr
    assert not rig.is_active(DAEMON)


def test_a_busy_metrics_port_does_not_stop_leases(rig: Rig) -> None:
    rig.systemctl("stop", METRICS)
    with started(rig, PYTHON, "-I", "-c", OCCUPY, stdin=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "up\n"
        rig.systemctl("start", METRICS, check=False)
        assert rig.show(METRICS, "ActiveState") == "failed"
        lease = "import libclient; print(libclient.lease('analyst', '2GiB').granted)"
        assert rig.python(lease).strip() == "True"
        ready = rig.gpuorch("ready", check=False)
        assert ready.returncode == 1
        assert "no socket for 127.0.0.1:8014 was passed" in ready.stderr
        assert f"systemctl status {METRICS}" in ready.stderr
        other.communicate("", timeout=20)


def test_a_daemon_started_without_its_socket_ends_with_the_reason(rig: Rig) -> None:
    place = rig.cursor()
    done = rig.run(
        "systemd-run", "--unit=deaf", "--property=Type=notify", "--property=StateDirectory=deaf",
        "/usr/bin/gpuorchd", "--simulate", "1x1024", check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert rig.show("deaf.service", "ExecMainStatus") == "1"
    lines = rig.messages("deaf.service", place)
    assert any("started this daemon without its Unix socket" in line for line in lines), lines


def test_eighty_kills_with_a_client_waiting_leave_the_socket_listening(rig: Rig) -> None:
    with started(rig, PYTHON, "-I", "-c", PATIENT, SOCKET) as client:
        killed: set[int] = set()
        while len(killed) < KILLS:
            wait_until(lambda: rig.main_pid() not in {0, *killed}, "the next daemon")
            killed.update({rig.kill_daemon()} - {0})
        assert client.communicate(timeout=60)[0].strip() == "ok"
    assert rig.show(LISTENER, "ActiveState") == "active"
    assert rig.show(LISTENER, "Result") == "success"
    assert rig.show(METRICS, "ActiveState") == "active"
    assert int(rig.show(DAEMON, "NRestarts")) >= KILLS - 1
    assert rig.gpuorch("health").stdout.strip() == "ok"


def test_the_watchdog_ends_a_daemon_that_stands_still_and_the_next_one_answers(rig: Rig) -> None:
    rig.gpuorch("health")
    place = rig.cursor()
    pid = rig.kill_daemon(signal.SIGSTOP)
    assert pid
    assert rig.wait_for_restart(pid) != pid
    lines = rig.messages(DAEMON, place)
    assert any("Watchdog timeout" in line for line in lines), lines
    # Where it stood, for whoever looks why.
    assert any("Fatal Python error: Aborted" in line for line in lines), lines


def test_the_status_says_how_it_goes(rig: Rig) -> None:
    with started(rig, PYTHON, "-I", "-c", HOLD, stdin=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = "2 GPUs (2048 of 163840 MiB leased), 1 lease, 0 waiting"
        wait_until(lambda: rig.show(DAEMON, "StatusText") == said, said)
        holder.communicate("", timeout=20)
    wait_until(lambda: "0 leases" in rig.show(DAEMON, "StatusText"), "the lease's end")


def test_a_reload_takes_the_env_file_and_a_bad_one_keeps_the_old(rig: Rig) -> None:
    rig.gpuorch("health")
    pid = rig.main_pid()
    rig.configure(GPUORCH_SIMULATE="2x81920", SAFE_MODE="true")
    rig.systemctl("reload", DAEMON)
    wait_until(lambda: "SAFE_MODE" in rig.show(DAEMON, "StatusText"), "SAFE_MODE in the status")
    rig.configure(GPUORCH_SIMULATE="2x81920", SAFE_MODE="maybe")
    rig.systemctl("reload", DAEMON)
    wait_until(lambda: "'maybe'" in rig.show(DAEMON, "StatusText"), "the refusal in the status")
    assert "SAFE_MODE: no GPU is granted" in rig.show(DAEMON, "StatusText")
    assert rig.main_pid() == pid
    assert rig.show(DAEMON, "SubState") == "running"


def test_another_port_than_the_socket_s_is_not_ready_and_the_answer_says_how(rig: Rig) -> None:
    rig.configure(GPUORCH_SIMULATE="2x81920", GPU_ORCHESTRATOR_PORT="9014")
    ready = rig.gpuorch("ready", check=False)
    assert ready.returncode == 1
    for part in ("is 9014", "127.0.0.1:8014", f"/etc/systemd/system/{METRICS}.d/port.conf"):
        assert part in ready.stderr
    # Done as it says.
    rig.drop_in(METRICS, "[Socket]\nListenStream=\nListenStream=127.0.0.1:9014\n")
    rig.systemctl("restart", "justnews@gpu_orchestrator")
    wait_until(lambda: rig.gpuorch("ready", check=False).returncode == 0, "ready")
    assert rig.http("/health", port=9014)[0] == 200


@contextmanager
def started(rig: Rig, *command: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Start a process of an agent's user inside, and end it."""
    process = rig.start(*command, user="justnews", stdout=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        rig.end(process)
