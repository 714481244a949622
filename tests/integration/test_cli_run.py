"""`gpuorch run`: the lease lives exactly as long as the command, and no more is left of `run`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from libclient.cli.text import cells
from tests.support.cli_process import gpuorch, start_gpuorch
from tests.support.daemon_process import (
    ANSWER_DEADLINE_S,
    DaemonProcess,
    LineClient,
    running_daemon,
    wait_until,
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, "--simulate", "1x24576") as daemon:
        yield daemon


@pytest.fixture
def full(daemon: DaemonProcess) -> Iterator[LineClient]:
    """A client that holds all of the card."""
    with daemon.client() as client:
        assert client.ask("lease", agent="holder", exclusive=True)["granted"]
        yield client


class Command:
    """A command under `run`, ended in any case."""

    def __init__(self, daemon: DaemonProcess, *words: str, **settings: Any) -> None:
        self.process = start_gpuorch(daemon.socket, "run", *words, **settings)

    def line(self) -> str:
        """Read a line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")

    def end(self) -> int:
        """End it and return its exit code."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait(ANSWER_DEADLINE_S)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def leases(daemon: DaemonProcess) -> list[dict[str, Any]]:
    with daemon.client() as client:
        return list(client.ask("allocations")["allocations"])


def waiting(daemon: DaemonProcess) -> list[dict[str, Any]]:
    with daemon.client() as client:
        return list(client.ask("queue")["waiting"])


def wait_until_free(daemon: DaemonProcess) -> None:
    wait_until(lambda: leases(daemon) == [], "the lease is gone")


TELL = """
import json, os, socket, sys
fds = {}
for name in os.listdir("/proc/self/fd"):
    try:
        fds[int(name)] = os.readlink("/proc/self/fd/" + name)
    except OSError:
        pass
status = open("/proc/self/status").read()
print(json.dumps({
    "pid": os.getpid(),
    "parent": os.getppid(),
    "environ": dict(os.environ),
    "fds": fds,
    "ignored": [line for line in status.splitlines() if line.startswith(("SigIgn", "SigBlk"))],
    "threads": len(os.listdir("/proc/self/task")),
}), flush=True)
sys.stdin.read()
"""


def test_the_command_takes_the_place_of_run(daemon: DaemonProcess) -> None:
    words = ("--mem", "4GiB", "--agent", "analyst", "--purpose", "test", "--", sys.executable, "-c")
    with Command(daemon, *words, TELL, stdin=subprocess.PIPE) as command:
        told = json.loads(command.line())
        assert told["pid"] == command.process.pid
        assert told["parent"] == os.getpid()
        assert told["threads"] == 1
        (lease,) = leases(daemon)
        assert (lease["pid"], lease["agent"], lease["purpose"]) == (told["pid"], "analyst", "test")
        assert lease["gpus"][0]["memory_mb"] == 4_096
        environ = told["environ"]
        assert environ["CUDA_VISIBLE_DEVICES"] == lease["gpus"][0]["uuid"]
        assert environ["GPUORCH_LEASE_ID"] == lease["lease_id"]
        assert {name for name in environ if "TOKEN" in name.upper()} == set()
        sockets = [fd for fd, target in told["fds"].items() if target.startswith("socket:")]
        assert len(sockets) == 1
        assert set(told["fds"]) - {"0", "1", "2"} - set(sockets) <= {"4"}
        command.process.communicate(b"", ANSWER_DEADLINE_S)
        assert command.process.returncode == 0
    wait_until_free(daemon)


def test_signals_are_as_if_the_command_had_been_started_directly(daemon: DaemonProcess) -> None:
    direct = subprocess.run(
        ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"], capture_output=True, check=True
    )
    run = gpuorch(daemon.socket, "run", "--", "grep", "-E", "Sig(Blk|Ign)", "/proc/self/status")
    assert run.stdout == direct.stdout.decode()


def test_the_environment_is_as_if_the_command_had_been_started_directly(
    daemon: DaemonProcess,
) -> None:
    # In the C locale Python sets LC_CTYPE for itself.
    command = start_gpuorch(
        daemon.socket, "run", "--", "env", environ={"LANG": "C", "LC_CTYPE": ""}
    )
    out, _ = command.communicate(timeout=ANSWER_DEADLINE_S)
    names = {line.partition("=")[0]: line for line in out.decode().splitlines()}
    assert names["LC_CTYPE"] == "LC_CTYPE="


def test_the_exit_code_is_the_command_s(daemon: DaemonProcess) -> None:
    assert gpuorch(daemon.socket, "run", "--", "sh", "-c", "exit 43").returncode == 43
    killed = gpuorch(daemon.socket, "run", "--", "sh", "-c", "kill -TERM $$")
    assert killed.returncode == -signal.SIGTERM


def test_the_lease_lives_on_with_a_child_and_ends_with_it(daemon: DaemonProcess) -> None:
    script = "sleep 1000 >/dev/null 2>&1 & echo $!"
    with Command(daemon, "--mem", "4GiB", "--", "sh", "-c", script) as command:
        child = int(command.line())
        try:
            assert command.process.wait(ANSWER_DEADLINE_S) == 0
            # The daemon has seen the end of the process, and keeps the lease for the child.
            assert [lease["state"] for lease in leases(daemon)] == ["active"]
        finally:
            os.kill(child, signal.SIGKILL)
        wait_until_free(daemon)


MISUSE = """
import json, os, socket, sys
fd = next(int(n) for n in os.listdir("/proc/self/fd")
          if int(n) > 2 and os.path.exists("/proc/self/fd/" + n)
          and os.readlink("/proc/self/fd/" + n).startswith("socket:"))
sock = socket.socket(fileno=fd)
sock.setblocking(False)
whoami = b"\\x82\\xa2id\\x07\\xa2op\\xa6whoami"
for attempt in (b"garbage" * 1000, b"health\\n", len(whoami).to_bytes(4, "big") + whoami):
    sock.sendall(attempt)
sys.stdin.readline()
try:
    print(repr(sock.recv(1000)), flush=True)
except BlockingIOError:
    print("nothing", flush=True)
sys.stdin.read()
"""


def test_nothing_can_be_asked_on_the_inherited_connection(daemon: DaemonProcess) -> None:
    with Command(daemon, "--", sys.executable, "-c", MISUSE, stdin=subprocess.PIPE) as command:
        assert command.process.stdin is not None
        wait_until(lambda: len(leases(daemon)) == 1, "the lease is there")
        command.process.stdin.write(b"\n")
        command.process.stdin.flush()
        assert command.line() == "nothing"
        assert [lease["state"] for lease in leases(daemon)] == ["active"]
    wait_until_free(daemon)


def test_a_revoked_command_gets_the_signal_that_was_asked_for(daemon: DaemonProcess) -> None:
    script = "trap 'echo asked; exit 3' USR1; echo ready; while :; do sleep 0.05; done"
    with Command(daemon, "--signal", "USR1", "--", "sh", "-c", script) as command:
        assert command.line() == "ready"
        (lease,) = leases(daemon)
        assert gpuorch(daemon.socket, "revoke", lease["lease_id"]).returncode == 0
        assert command.line() == "asked"
        assert command.process.wait(ANSWER_DEADLINE_S) == 3
    wait_until_free(daemon)


def test_a_closed_standard_stream_is_not_taken_by_the_lease(daemon: DaemonProcess) -> None:
    # With 0 closed, a new descriptor would get that number.
    inner = "test -e /proc/self/fd/0 || echo closed; readlink /proc/$$/fd/* | grep -c socket"
    with Command(daemon, "--", "sh", "-c", inner, preexec_fn=lambda: os.close(0)) as command:
        assert command.line() == "closed"
        assert command.line() == "1"


@pytest.mark.usefixtures("full")
def test_without_a_grant_the_command_does_not_run(daemon: DaemonProcess, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    done = gpuorch(daemon.socket, "run", "--mem", "4GiB", "--", "touch", str(mark))
    assert (done.returncode, done.stdout) == (75, "")
    assert "INSUFFICIENT_MEMORY" in done.stderr
    assert not mark.exists()


def test_without_a_daemon_the_command_does_not_run(tmp_path: Path) -> None:
    done = gpuorch(tmp_path / "nobody", "run", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (69, "")
    assert "NO_DAEMON" in done.stderr


def test_a_name_of_others_is_forbidden(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        changes = {"agents": {"reserved": {"users": [os.getuid() + 1]}}}
        assert client.ask("policy_set", changes=changes)["ok"]
    done = gpuorch(daemon.socket, "run", "--agent", "reserved", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (77, "")
    on_cpu = gpuorch(
        daemon.socket, "run", "--agent", "reserved", "--fallback", "cpu", "--", "echo", "ran"
    )
    assert (on_cpu.returncode, on_cpu.stdout) == (0, "ran\n")
    assert "FORBIDDEN" in on_cpu.stderr


SHOW = 'echo "[$CUDA_VISIBLE_DEVICES] $GPUORCH_CPU_REASON"'


def test_on_the_cpu_the_gpus_are_hidden_and_the_reason_is_said(tmp_path: Path) -> None:
    words = ("run", "--fallback", "cpu", "--", "sh", "-c", SHOW)
    done = gpuorch(tmp_path / "nobody", *words, environ={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert (done.returncode, done.stdout) == (0, "[] NO_DAEMON\n")
    assert "going on with the CPU" in done.stderr


@pytest.mark.parametrize("note", ["TIMEOUT", "INSUFFICIENT_MEMORY", "SAFE_MODE"])
@pytest.mark.usefixtures("full")
def test_on_the_cpu_the_reason_is_the_note(daemon: DaemonProcess, note: str) -> None:
    wait = ("--wait", "100ms") if note == "TIMEOUT" else ()
    if note == "SAFE_MODE":
        with daemon.client() as client:
            client.ask("policy_set", changes={"safe_mode": True})
    words = ("run", "--mem", "4GiB", *wait, "--fallback", "cpu", "--", "sh", "-c", SHOW)
    assert gpuorch(daemon.socket, *words).stdout == f"[] {note}\n"


def test_a_command_that_cannot_run_asks_for_nothing(daemon: DaemonProcess, tmp_path: Path) -> None:
    with daemon.client() as client:
        client.ask("subscribe", topics=["lease"])
        assert gpuorch(daemon.socket, "run", "--", "no-such-command").returncode == 127
        assert gpuorch(daemon.socket, "run", "--", str(tmp_path)).returncode == 126
        assert gpuorch(daemon.socket, "run").returncode == 2
        client.ask("health")
        assert client.events == []


def test_a_command_that_fails_to_start_gives_the_lease_back(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    assert gpuorch(daemon.socket, "run", "--", str(broken)).returncode == 126
    wait_until_free(daemon)


def test_a_waiting_command_starts_when_it_is_its_turn(
    daemon: DaemonProcess, full: LineClient
) -> None:
    with Command(daemon, "--mem", "4GiB", "--wait", "1m", "--", "echo", "ran") as command:
        wait_until(lambda: len(waiting(daemon)) == 1, "it waits")
        full.close()
        assert command.line() == "ran"
        assert command.process.wait(ANSWER_DEADLINE_S) == 0
        assert command.process.stderr is not None
        said = command.process.stderr.read().decode()
    assert "waiting for 4 GiB as echo: next" in said
    assert "granted 4 GiB on GPU 0 after" in said


@pytest.mark.usefixtures("full")
def test_ctrl_c_cancels_the_wait(daemon: DaemonProcess) -> None:
    with Command(daemon, "--mem", "4GiB", "--wait", "1m", "--", "echo", "ran") as command:
        wait_until(lambda: len(waiting(daemon)) == 1, "it waits")
        command.process.send_signal(signal.SIGINT)
        out, err = command.process.communicate(timeout=ANSWER_DEADLINE_S)
        assert (command.process.returncode, out) == (130, b"")
        assert b"Traceback" not in err
    wait_until(lambda: waiting(daemon) == [], "nobody waits any more")


def test_with_json_the_outcome_is_one_document_on_standard_error(daemon: DaemonProcess) -> None:
    done = gpuorch(daemon.socket, "run", "--json", "--mem", "1GiB", "--", "echo", "ran")
    assert done.stdout == "ran\n"
    told = json.loads(done.stderr)
    assert told["granted"] is True
    assert told["gpus"][0]["memory_mb"] == 1_024
    assert "token" not in told
    done = gpuorch(daemon.socket, "run", "--json", "--mem", "1TiB", "--", "echo", "ran")
    told = json.loads(done.stderr)
    assert (done.returncode, told["granted"], told["device"]) == (75, False, None)
    assert told["reason"] == "INSUFFICIENT_MEMORY"


def test_a_terminal_sees_the_wait_on_one_line_that_goes_away(
    daemon: DaemonProcess, full: LineClient
) -> None:
    ours, theirs = pty.openpty()
    try:
        with Command(
            daemon, "--mem", "4GiB", "--wait", "1m", "--", "true",
            stderr=theirs, environ={"TERM": "xterm"},
        ) as command:  # fmt: skip
            os.close(theirs)
            seen = b""
            while b"next" not in seen:
                seen += os.read(ours, 65_536)
            full.close()
            assert command.process.wait(ANSWER_DEADLINE_S) == 0
            while chunk := _rest(ours):
                seen += chunk
    finally:
        os.close(ours)
    assert seen.count(b"\n") == 1
    assert seen.startswith(b"\r\x1b[Kgpuorch: waiting for 4 GiB as true")
    assert b"\r\x1b[K\x1b[1mgpuorch:\x1b[0m granted" in seen


@pytest.mark.usefixtures("full")
def test_the_line_of_the_wait_fits_a_narrow_terminal(daemon: DaemonProcess) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    words = ("--mem", "4GiB", "--wait", "1m", "--agent", "世" * 40, "--", "true")
    try:
        with Command(daemon, *words, stderr=theirs, environ={"TERM": "xterm"}):
            os.close(theirs)
            seen = b""
            while seen.count(b"\r\x1b[K") < 2:
                seen += os.read(ours, 65_536)
    finally:
        os.close(ours)
    line = seen.split(b"\r\x1b[K")[1].decode()
    assert line.startswith("gpuorch: waiting for 4 GiB as 世世")
    # The last column stays free: writing to it wraps on some terminals.
    assert 50 < cells(line) < 60


def _rest(fd: int) -> bytes:
    try:
        return os.read(fd, 65_536)
    except OSError:
        # How a terminal says that the other end is closed.
        return b""
