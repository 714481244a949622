"""How `gpuorch` fails: one line, a code, a document for programs, and never a traceback."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from libclient.cli import asking, exits
from libclient.cli.main import main
from tests.support.cli_process import gpuorch, start_gpuorch
from tests.support.daemon_process import (
    ANSWER_DEADLINE_S,
    DaemonProcess,
    LineClient,
    running_daemon,
    wait_until,
)
from tests.support.proxy import FakeDaemon, Served, grant_everything, grant_fields

# A byte of the command line that is no text of this locale.
NO_TEXT = "\udcff"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, "--simulate", "1x24576") as daemon:
        yield daemon


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--purpose", NO_TEXT, "--", "true"),
        ("run", "--agent", NO_TEXT, "--", "true"),
        ("run", "--device", NO_TEXT, "--", "true"),
        ("run", "--device", "9" * 23, "--", "true"),
        ("run", "--mem", "9" * 5_000, "--", "true"),
        ("cordon", NO_TEXT),
        ("cordon", "0", "--reason", NO_TEXT),
        ("cordon", "9" * 23),
        ("policy", "set", "x=" + "9" * 26),
        ("policy", "set", f"x={NO_TEXT}"),
        ("policy", "set", "x_s=" + "9" * 400),
        ("revoke", "x" * 70_000),
        ("revoke", NO_TEXT),
        ("events", "--for", "9" * 13),
        ("events", "--for", "9" * 400),
    ],
    ids=lambda words: " ".join(words)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_a_value_that_cannot_be_is_a_wrong_command_line(
    daemon: DaemonProcess, words: tuple[str, ...]
) -> None:
    done = gpuorch(daemon.socket, *words)
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert done.stderr.startswith("gpuorch: ")
    assert done.stderr.count("\n") == 1
    assert "--help)" in done.stderr


def test_a_bug_is_one_line_and_its_place_is_told_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(invocation: object) -> int:
        raise RuntimeError("of the test")

    monkeypatch.setattr(asking, "health", broken)
    assert main(["health"]) == exits.BUG
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "RuntimeError: of the test" in said
    assert "GPUORCH_TRACEBACK" in said
    assert main(["health", "--json"]) == exits.BUG
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "BUG"
    monkeypatch.setenv("GPUORCH_TRACEBACK", "1")
    assert main(["health"]) == exits.BUG
    assert "in broken" in capsys.readouterr().err


def test_what_the_system_refuses_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(invocation: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asking, "health", refused)
    assert main(["health"]) == exits.SYSTEM_REFUSED
    assert "Too many open files" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("ready",), ("status", "--json"), ("completion", "bash")])
def test_an_answer_that_cannot_be_written_is_told_by_its_code(
    daemon: DaemonProcess, words: tuple[str, ...]
) -> None:
    with open("/dev/full", "wb") as full:
        process = start_gpuorch(daemon.socket, *words, stdout=full)
        _, said = process.communicate(timeout=ANSWER_DEADLINE_S)
    assert process.returncode == exits.CANNOT_WRITE
    assert said.count(b"\n") == 1
    assert b"No space left" in said


def broken_pipe() -> int:
    """A descriptor that nobody reads from."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("how", ["broken", "full", "closed"])
def test_the_command_runs_whatever_becomes_of_standard_error(tmp_path: Path, how: str) -> None:
    words = ("run", "--fallback", "cpu", "--", "echo", "ran")
    # With 2 closed, only the command itself can tell.
    settings = {"preexec_fn": lambda: os.close(2)} if how == "closed" else {}
    stderr = broken_pipe() if how == "broken" else os.open("/dev/full", os.O_WRONLY)
    try:
        process = start_gpuorch(tmp_path / "nobody", *words, stderr=stderr, **settings)
        said, _ = process.communicate(timeout=ANSWER_DEADLINE_S)
    finally:
        os.close(stderr)
    assert (process.returncode, said) == (0, b"ran\n")


def test_a_waiting_command_runs_although_nobody_reads_what_it_says(daemon: DaemonProcess) -> None:
    stderr = broken_pipe()
    with daemon.client() as holder:
        assert holder.ask("lease", agent="holder", exclusive=True)["granted"]
        words = ("run", "--mem", "4GiB", "--wait", "1m", "--", "echo", "ran")
        process = start_gpuorch(daemon.socket, *words, stderr=stderr)
        os.close(stderr)
        with daemon.client() as other:
            wait_until(lambda: bool(other.ask("queue")["waiting"]), "it waits")
    said, _ = process.communicate(timeout=ANSWER_DEADLINE_S)
    assert (process.returncode, said) == (0, b"ran\n")


@pytest.mark.parametrize(
    ("words", "code", "word"),
    [
        (("leases", "--colour"), exits.USAGE, "USAGE"),
        (("policy", "get", "colour"), exits.USAGE, "USAGE"),
        (("--json",), exits.USAGE, "USAGE"),
        (("nonsense",), exits.USAGE, "USAGE"),
        (("cordon", NO_TEXT), exits.USAGE, "USAGE"),
    ],
    ids=["flag", "field", "nothing", "command", "value"],
)
def test_a_wrong_command_line_is_a_document_too(
    daemon: DaemonProcess, words: tuple[str, ...], code: int, word: str
) -> None:
    done = gpuorch(daemon.socket, *words, *(() if "--json" in words else ("--json",)))
    assert done.returncode == code
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"code", "message", "field", "retryable"}
    assert error["code"] == word


@pytest.mark.parametrize(
    ("words", "code", "word"),
    [
        (("run", "--json", "--", "no-such-command"), exits.NOT_FOUND, "COMMAND_NOT_FOUND"),
        (("run", "--json", "--", "/"), exits.NOT_EXECUTABLE, "NOT_EXECUTABLE"),
        (("run", "--json", "--mem", "lots", "--", "true"), exits.USAGE, "USAGE"),
        (("run", "--json"), exits.USAGE, "USAGE"),
    ],
    ids=["missing", "folder", "flag", "nothing"],
)
def test_of_run_the_document_is_all_that_standard_error_has(
    daemon: DaemonProcess, words: tuple[str, ...], code: int, word: str
) -> None:
    done = gpuorch(daemon.socket, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert json.loads(done.stderr)["error"]["code"] == word


def test_a_json_flag_of_the_command_to_run_is_not_ours(daemon: DaemonProcess) -> None:
    done = gpuorch(daemon.socket, "run", "--", "no-such-command", "--json")
    assert done.stderr == "gpuorch: no-such-command: command not found\n"


@pytest.mark.parametrize("words", [("events", "--json"), ("run", "--json", "--wait", "1m")])
def test_ctrl_c_is_a_document_too(daemon: DaemonProcess, words: tuple[str, ...]) -> None:
    with daemon.client() as holder:
        assert holder.ask("lease", agent="holder", exclusive=True)["granted"]
        line = (*words, "--", "true") if words[0] == "run" else words
        process = start_gpuorch(daemon.socket, *line)
        with daemon.client() as other:
            if words[0] == "run":
                wait_until(lambda: bool(other.ask("queue")["waiting"]), "it waits")
            else:
                wait_until(lambda: said_something(process, other), "it shows events")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=ANSWER_DEADLINE_S)
    assert process.returncode == exits.INTERRUPTED
    said = err if words[0] == "run" else out
    assert json.loads(said.splitlines()[-1])["error"]["code"] == "INTERRUPTED"


def said_something(process: subprocess.Popen[bytes], client: LineClient) -> bool:
    """Make something happen, and look whether the process has written about it."""
    policy = client.ask("policy_get")["policy"]
    client.ask("policy_set", changes={"default_memory_mb": policy["default_memory_mb"] + 1})
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0.0)[0])


@pytest.mark.parametrize("code", ["shutting_down", "limit"])
def test_a_gate_waits_out_what_may_pass(tmp_path: Path, code: str) -> None:
    asked: list[str] = []

    def serve(conn: Served) -> None:
        while True:
            request = conn.request()
            asked.append(request["op"])
            if len(asked) == 1:
                conn.refuse(request, code, retryable=True)
            else:
                conn.reply(request, ready=True, checks={})

    with FakeDaemon(tmp_path, serve) as fake:
        done = gpuorch(Path(fake.path), "ready", "--wait", "20s")
    assert (done.returncode, done.stdout) == (0, "ready\n")
    assert asked == ["ready", "ready"]


def test_a_gate_does_not_wait_for_what_will_not_change(tmp_path: Path) -> None:
    def serve(conn: Served) -> None:
        conn.refuse(conn.request(), "unknown_op")
        conn.wait_for_end()

    with FakeDaemon(tmp_path, serve) as fake:
        done = gpuorch(Path(fake.path), "ready", "--wait", "20s")
    assert done.returncode == exits.REFUSED


def test_a_gate_without_time_left_says_why(tmp_path: Path) -> None:
    def serve(conn: Served) -> None:
        while True:
            conn.refuse(conn.request(), "shutting_down", "the daemon stops", retryable=True)

    with FakeDaemon(tmp_path, serve) as fake:
        done = gpuorch(Path(fake.path), "ready", "--wait", "300ms")
    assert done.returncode == exits.NOT_GRANTED
    assert "the daemon stops" in done.stderr


def test_following_events_waits_out_what_may_pass(tmp_path: Path) -> None:
    asked: list[str] = []

    def serve(conn: Served) -> None:
        while True:
            request = conn.expect("subscribe")
            asked.append(request["op"])
            if len(asked) == 1:
                conn.refuse(request, "shutting_down", "the daemon stops", retryable=True)
                continue
            conn.reply(request, subscription=1, seq=0)
            conn.send(event="policy.changed", seq=1, time=1.0, subscription=1)

    with FakeDaemon(tmp_path, serve) as fake:
        done = gpuorch(Path(fake.path), "events", "-f", "--count", "1")
    assert done.returncode == 0
    assert "policy.changed" in done.stdout
    assert "the daemon stops" in done.stderr


@pytest.mark.serial
def test_the_timeout_of_run_is_for_all_of_it(tmp_path: Path) -> None:
    # Each answer by itself would be in time.
    def serve(conn: Served) -> None:
        lease = conn.expect("lease")
        time.sleep(1.5)
        conn.reply(lease, **grant_fields())
        conn.expect("seal")
        conn.wait_for_end()

    with FakeDaemon(tmp_path, serve) as fake:
        start_s = time.monotonic()
        done = gpuorch(Path(fake.path), "run", "--timeout", "2s", "--", "true")
        took_s = time.monotonic() - start_s
    assert done.returncode == exits.UNAVAILABLE
    assert "TIMEOUT" in done.stderr
    # 3.5 s if the seal had a time of its own; the start of Python is in it, too.
    assert took_s < 3.3


@pytest.mark.parametrize(
    ("ending", "word"),
    [
        ({"name": "lease.revoked", "reason": "SAFE_MODE"}, "REVOKED"),
        ({"name": "lease.expired"}, "EXPIRED"),
    ],
    ids=["revoked", "expired"],
)
def test_a_lease_that_ended_before_the_seal_runs_nothing(
    tmp_path: Path, ending: dict[str, str], word: str
) -> None:
    def serve(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields())
        conn.event(lease_id="L1", **ending)
        conn.reply(conn.expect("seal"))
        conn.wait_for_end()

    with FakeDaemon(tmp_path, serve) as fake:
        done = gpuorch(Path(fake.path), "run", "--", "echo", "ran")
        assert (done.returncode, done.stdout) == (exits.NOT_GRANTED, "")
        assert word in done.stderr
        script = ("sh", "-c", 'echo "$GPUORCH_CPU_REASON [$CUDA_VISIBLE_DEVICES]"')
        done = gpuorch(Path(fake.path), "run", "--fallback", "cpu", "--", *script)
        assert (done.returncode, done.stdout) == (0, f"{word} []\n")


def test_a_lease_that_lives_at_the_seal_runs_the_command(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, grant_everything) as fake:
        done = gpuorch(Path(fake.path), "run", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (0, "ran\n")
