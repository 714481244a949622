"""What `gpuorch` answers: text for eyes, JSON for programs, and an exit code in every case."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli_process import COMMAND, cli_environ, gpuorch, gpuorch_json, start_gpuorch
from tests.support.daemon_process import DaemonProcess, LineClient, running_daemon, wait_until


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, "--simulate", "1x24576") as daemon:
        yield daemon


@pytest.fixture
def holder(daemon: DaemonProcess) -> Iterator[LineClient]:
    """A client that holds 20 GiB as `analyst`."""
    with daemon.client() as client:
        reply = client.ask("lease", agent="analyst", min_memory_mb=20_480, purpose="night run")
        assert reply["granted"]
        yield client


@pytest.fixture
def waiter(daemon: DaemonProcess, holder: LineClient) -> Iterator[LineClient]:
    """A client that waits for 8 GiB as `scout`, behind the holder."""
    with daemon.client() as client:
        client.send("lease", agent="scout", min_memory_mb=8_192, wait_s=300)
        client.event("lease.queued")
        yield client


@pytest.mark.usefixtures("waiter")
def test_status_shows_the_card_the_holder_and_the_waiter(daemon: DaemonProcess) -> None:
    seen = gpuorch_json(daemon.socket, "status")
    assert set(seen) == {"daemon", "ready", "gpu_info", "allocations", "waiting"}
    assert seen["ready"]["ready"] is True
    assert seen["gpu_info"]["gpus"][0]["memory_leased_mb"] == 20_480
    assert [lease["agent"] for lease in seen["allocations"]] == ["analyst"]
    assert [request["agent"] for request in seen["waiting"]] == ["scout"]
    assert "token" not in seen["allocations"][0]
    text = gpuorch(daemon.socket, "status")
    assert text.returncode == 0
    assert "\x1b" not in text.stdout
    lines = text.stdout.splitlines()
    assert any("ready" in line and str(daemon.socket) in line for line in lines)
    assert any("20 GiB" in line and "4 GiB" in line and "24 GiB" in line for line in lines)
    assert any(line.startswith("analyst") and "night run" in line for line in lines)
    assert any("scout" in line and "8 GiB" in line for line in lines)


@pytest.mark.usefixtures("waiter")
def test_leases_and_queue_are_listed(daemon: DaemonProcess) -> None:
    leases = gpuorch_json(daemon.socket, "leases")["allocations"]
    assert [lease["agent"] for lease in leases] == ["analyst"]
    waiting = gpuorch_json(daemon.socket, "queue")["waiting"]
    assert [request["position"] for request in waiting] == [1]
    assert leases[0]["lease_id"] in gpuorch(daemon.socket, "leases").stdout
    assert "scout" in gpuorch(daemon.socket, "queue").stdout


def test_with_nothing_there_the_lists_say_so(daemon: DaemonProcess) -> None:
    assert gpuorch(daemon.socket, "leases").stdout == "nobody holds a lease\n"
    assert gpuorch(daemon.socket, "queue").stdout == "nobody waits\n"


def test_health_and_ready_answer_by_their_exit_code(daemon: DaemonProcess) -> None:
    assert gpuorch(daemon.socket, "health").stdout == "ok\n"
    assert gpuorch(daemon.socket, "ready").stdout == "ready\n"
    assert gpuorch_json(daemon.socket, "health") == {"status": "ok", "safe_mode": False}
    assert gpuorch_json(daemon.socket, "ready")["ready"] is True


@pytest.mark.usefixtures("holder")
def test_explain_says_yes_or_no_and_why(daemon: DaemonProcess) -> None:
    yes = gpuorch(daemon.socket, "explain", "--mem", "1GiB", "--agent", "x")
    assert (yes.returncode, yes.stdout.partition(":")[0]) == (0, "yes")
    no = gpuorch(daemon.socket, "explain", "--mem", "8GiB", "--", "python", "x.py")
    assert no.returncode == 1
    assert no.stdout.startswith("no: 8 GiB as python would not be granted now")
    assert "INSUFFICIENT_MEMORY" in no.stdout
    document = gpuorch_json(daemon.socket, "explain", "--mem", "8GiB", code=1)
    assert document["would_grant"] is False
    assert document["note"] == "INSUFFICIENT_MEMORY"


def test_policy_is_changed_as_people_write_it(daemon: DaemonProcess) -> None:
    done = gpuorch(
        daemon.socket, "policy", "set", "max_memory_per_agent_mb=8GiB", "drain_timeout_s=20s",
        "agents.scout.gpu=false", "agents.*.max_priority=normal",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8GiB" in done.stdout
    policy = gpuorch_json(daemon.socket, "policy", "get")["policy"]
    assert policy["max_memory_per_agent_mb"] == 8_192
    assert policy["drain_timeout_s"] == 20
    assert policy["agents"] == {"scout": {"gpu": False}, "*": {"max_priority": "normal"}}
    done = gpuorch(daemon.socket, "policy", "set", "agents.scout=null", "agents.a.gpu=true")
    assert done.returncode == 0, done.stderr
    assert gpuorch_json(daemon.socket, "policy", "get", "agents") == {
        "agents": {"*": {"max_priority": "normal"}, "a": {"gpu": True}}
    }
    one = gpuorch(daemon.socket, "policy", "get", "max_memory_per_agent_mb")
    assert one.stdout == "8GiB\n"
    assert gpuorch(daemon.socket, "policy", "get", "agents.a").stdout == '{"gpu": true}\n'
    null = gpuorch(daemon.socket, "policy", "set", "max_memory_per_agent_mb=null", "agents=null")
    assert null.returncode == 0
    policy = gpuorch_json(daemon.socket, "policy", "get")["policy"]
    assert (policy["max_memory_per_agent_mb"], policy["agents"]) == (0, {})
    first = gpuorch(daemon.socket, "policy", "set", "agents.a.gpu=false")
    assert first.stdout.splitlines()[:-1] == ["agents.a.gpu  null -> false"]
    assert "max_memory_per_agent_mb  0 (no cap)" in gpuorch(daemon.socket, "policy", "get").stdout


def test_a_change_to_another_revision_is_refused(daemon: DaemonProcess) -> None:
    revision = gpuorch_json(daemon.socket, "policy", "get")["revision"]
    words = ("policy", "set", "default_memory_mb=1GiB", "--if-revision")
    refused = gpuorch(daemon.socket, *words, str(revision + 1))
    assert refused.returncode == 75
    assert "conflict" in refused.stderr
    assert gpuorch(daemon.socket, *words, str(revision)).returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("policy", "set", "colour=red"), 65, "bad_request"),
        (("policy", "set", "max_memory_per_agent_mb=1"), 65, "bad_request"),
        (("policy", "set", "agents.a.colour=red"), 2, "FIELD"),
        (("policy", "get", "colour"), 2, "colour"),
        (("cordon", "7"), 65, "not_found"),
        (("revoke", "nothing"), 65, "not_found"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_code(
    daemon: DaemonProcess, words: tuple[str, ...], code: int, said: str
) -> None:
    done = gpuorch(daemon.socket, *words)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_safe_mode_is_told_before_all_else_and_keeps_the_policy(daemon: DaemonProcess) -> None:
    assert gpuorch(daemon.socket, "policy", "set", "safe_mode=true").returncode == 0
    assert gpuorch(daemon.socket, "status").stdout.startswith("SAFE_MODE is on")
    assert "SAFE_MODE" in gpuorch(daemon.socket, "health").stdout
    kept = gpuorch(daemon.socket, "policy", "set", "default_memory_mb=1GiB")
    assert kept.returncode == 1
    assert "SAFE_MODE" in kept.stderr
    done = gpuorch(daemon.socket, "policy", "set", "default_memory_mb=1GiB", "safe_mode=false")
    assert done.returncode == 0
    assert gpuorch_json(daemon.socket, "policy", "get", "default_memory_mb", "safe_mode") == {
        "default_memory_mb": 1_024,
        "safe_mode": False,
    }


def test_a_gpu_is_cordoned_and_uncordoned(daemon: DaemonProcess) -> None:
    done = gpuorch(daemon.socket, "cordon", "0", "--reason", "fan\x1b[2J")
    assert done.returncode in {0, 65}
    assert gpuorch(daemon.socket, "cordon", "0", "--reason", "fan").returncode == 0
    assert "cordoned" in gpuorch(daemon.socket, "status").stdout
    assert gpuorch(daemon.socket, "explain", "--mem", "1GiB").returncode == 1
    assert gpuorch(daemon.socket, "uncordon", "0").returncode == 0
    assert gpuorch(daemon.socket, "explain", "--mem", "1GiB").returncode == 0


def test_a_lease_is_revoked(daemon: DaemonProcess, holder: LineClient) -> None:
    (lease,) = gpuorch_json(daemon.socket, "leases")["allocations"]
    words = ("revoke", lease["lease_id"], "--grace", "0s", "--reason", "maintenance")
    assert gpuorch(daemon.socket, *words).returncode == 0
    assert holder.event("lease.revoked")["reason"] == "maintenance"


def test_events_are_told_as_they_happen(daemon: DaemonProcess) -> None:
    watching = start_gpuorch(daemon.socket, "events", "--json", "--topic", "lease", "--count", "2")
    try:
        assert watching.stdout is not None
        lines: list[bytes] = []
        with daemon.client() as client:
            # Nothing says when the subscription stands, so there is something to see all the time.
            while watching.poll() is None:
                token = client.ask("lease", agent="scout", min_memory_mb=1_024)["token"]
                client.ask("release", token=token)
                time.sleep(0.01)
        lines = watching.stdout.read().splitlines()
        assert watching.returncode == 0
    finally:
        end(watching)
    events = [json.loads(line) for line in lines]
    assert len(events) == 2
    assert all(event["event"].startswith("lease.") for event in events)


def test_events_go_on_with_a_daemon_that_comes_back(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, "--simulate", "1x24576")
    watching = None
    try:
        daemon.wait_until_it_answers()
        log = tmp_path / "events"
        with log.open("wb") as out:
            words = ("events", "-f", "--topic", "policy")
            watching = start_gpuorch(daemon.socket, *words, stdout=out, stderr=out)
        wait_for_change(daemon, log, revision_from=1)
        daemon.stop()
        wait_until(lambda: b"waiting for it" in log.read_bytes(), "it says that the daemon is gone")
        daemon = DaemonProcess(tmp_path, "--simulate", "1x24576")
        daemon.wait_until_it_answers()
        wait_until(lambda: b"back" in log.read_bytes(), "it says that the daemon is back")
        wait_for_change(daemon, log, revision_from=log.read_bytes().count(b"policy.changed") + 1)
    finally:
        if watching is not None:
            end(watching)
        daemon.end()


def wait_for_change(daemon: DaemonProcess, log: Path, revision_from: int) -> None:
    """Change the policy until the log has so many changes."""

    def changed() -> bool:
        with daemon.client() as client:
            now = client.ask("policy_get")["policy"]["default_memory_mb"]
            client.ask("policy_set", changes={"default_memory_mb": now + 1})
        return log.read_bytes().count(b"policy.changed") >= revision_from

    wait_until(changed, "a change of policy among the events")


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


@pytest.mark.parametrize(
    "words",
    [
        ("status",), ("leases",), ("queue",), ("health",), ("ready",), ("policy", "get"),
        ("policy", "set", "safe_mode=true"), ("cordon", "0"), ("uncordon", "0"), ("revoke", "x"),
        ("explain",), ("events",), ("top",),
    ],
)  # fmt: skip
def test_without_a_daemon_every_command_says_so(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = gpuorch(tmp_path / "nobody", *words, "--json")
    assert done.returncode == 69
    assert json.loads(done.stdout)["error"]["code"] == "NO_DAEMON"
    assert done.stderr.count("\n") == 1
    assert "no such socket" in done.stderr


def test_a_daemon_that_does_not_answer_costs_the_timeout_and_no_more(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "s"))
        deaf.listen()
        start = time.monotonic()
        done = gpuorch(tmp_path / "s", "status", "--timeout", "300ms", "--json")
        took_s = time.monotonic() - start
    assert done.returncode == 69
    assert json.loads(done.stdout)["error"]["code"] == "TIMEOUT"
    assert took_s < 10


def test_ready_waits_for_a_daemon_that_comes_later(tmp_path: Path) -> None:
    waiting = start_gpuorch(tmp_path / "s", "ready", "--wait", "1m")
    try:
        with running_daemon(tmp_path, "--simulate", "1x24576"):
            out, _ = waiting.communicate(timeout=60)
        assert (waiting.returncode, out) == (0, b"ready\n")
    finally:
        end(waiting)


def test_a_reader_that_goes_away_ends_the_command_quietly(daemon: DaemonProcess) -> None:
    command = start_gpuorch(daemon.socket, "events", "--topic", "policy")
    try:
        assert command.stdout is not None
        command.stdout.close()
        with daemon.client() as client:
            memory = 1_024
            while command.poll() is None:
                memory += 1
                client.ask("policy_set", changes={"default_memory_mb": memory})
                time.sleep(0.01)
        assert command.stderr is not None
        assert (command.returncode, command.stderr.read()) == (141, b"")
    finally:
        end(command)


@pytest.mark.parametrize(
    ("environ", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
@pytest.mark.usefixtures("holder")
def test_colours_are_for_terminals_that_want_them(
    daemon: DaemonProcess, environ: dict[str, str], coloured: bool
) -> None:
    shown = on_terminal(daemon.socket, "status", environ=environ)
    assert b"analyst" in shown
    assert (b"\x1b[" in shown) is coloured


def on_terminal(path: Path, *words: str, environ: dict[str, str]) -> bytes:
    """Run a command with a terminal as its output and return what the terminal got."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*COMMAND, *words], env=cli_environ(path, **environ), stdout=theirs, stdin=theirs
        )
        os.close(theirs)
        shown = b""
        while chunk := read_terminal(ours):
            shown += chunk
        assert process.wait() == 0
        return shown
    finally:
        os.close(ours)


def read_terminal(fd: int) -> bytes:
    try:
        return os.read(fd, 65_536)
    except OSError:
        # The other end is closed: how a terminal says it.
        return b""
