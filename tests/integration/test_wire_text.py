"""Text mode as the contract has it: lines by hand and by `nc`, and what the end of input means."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.daemon_process import DaemonProcess, LineClient, running_daemon, wait_until
from tests.support.wire import FrameClient, packed

LIMIT = 65_536
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
    folder = tmp_path_factory.mktemp("d")
    with running_daemon(folder, "--simulate", "1x24576", environ=environ) as daemon:
        yield daemon


@pytest.fixture
def sock(daemon: DaemonProcess) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(str(daemon.socket))
        yield sock


def rest(sock: socket.socket) -> list[dict[str, Any]]:
    """Everything until the daemon closes, a JSON object a line."""
    data = b""
    while piece := sock.recv(65_536):
        data += piece
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def said(sock: socket.socket, data: bytes) -> list[dict[str, Any]]:
    """Send bytes, end the input, and return everything that comes back."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    return rest(sock)


def test_a_bare_op_name_is_a_request(sock: socket.socket) -> None:
    (reply,) = said(sock, b"health\n")
    assert reply == {"id": None, "ok": True, "status": "ok", "safe_mode": False}


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n", b" \r\n\r\n"])
def test_a_line_may_end_as_it_likes(sock: socket.socket, end: bytes) -> None:
    (reply,) = said(sock, b'{"op":"health","id":"a"}' + end)
    assert (reply["id"], reply["ok"]) == ("a", True)


def test_an_object_without_an_id_is_answered_with_null(sock: socket.socket) -> None:
    replies = said(sock, b'{"op":"health"}\n{"op":"health","id":null}\n')
    assert [(reply["id"], reply["ok"]) for reply in replies] == [(None, True)] * 2


def test_the_connection_speaks_lines_for_its_whole_life(sock: socket.socket) -> None:
    frame = packed({"id": 1, "op": "health"})
    replies = said(sock, b"health\n" + frame + b"\n")
    assert [reply["ok"] for reply in replies] == [True, False]
    assert replies[1]["error"]["code"] == "bad_frame"


def test_a_first_byte_that_is_not_printable_begins_frames(daemon: DaemonProcess) -> None:
    for first in (b"\n", b"\x1f", b"\x7f", b"\x80"):
        with FrameClient(daemon.socket) as client:
            client.send_bytes(first + b"ealth\n")
            (reply,) = client.rest()
            assert reply["error"]["code"] == "frame_too_large"


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b'"health"', b"null", b"5", b"health now", b"{}x", b'{"op":"\\ud800"}'],
)
def test_a_bad_line_is_answered_and_ends_the_connection(sock: socket.socket, line: bytes) -> None:
    sock.sendall(line + b"\nhealth\n")
    (reply,) = rest(sock)
    assert (reply["id"], reply["error"]["code"]) == (None, "bad_frame")


def test_an_unknown_word_is_an_unknown_op(sock: socket.socket) -> None:
    replies = said(sock, b"helth\nhealth\n")
    assert [reply["ok"] for reply in replies] == [False, True]
    assert replies[0]["error"]["code"] == "unknown_op"


def test_a_line_of_the_largest_size_is_taken(sock: socket.socket) -> None:
    line = b'{"op":"health"' + b" " * (LIMIT - 15) + b"}"
    assert len(line) == LIMIT
    replies = said(sock, line + b"\r\n" + line)
    assert [reply["ok"] for reply in replies] == [True, True]


def test_a_line_that_is_too_long_is_refused_before_it_ends(sock: socket.socket) -> None:
    sock.sendall(b"health" + b" " * (LIMIT - 5))
    (reply,) = rest(sock)
    assert reply["error"]["code"] == "frame_too_large"


def test_a_line_that_comes_byte_by_byte_is_answered(sock: socket.socket) -> None:
    for byte in b'{"op":"health","id":4}\r\n':
        sock.sendall(bytes([byte]))
    assert json.loads(sock.recv(1_000))["id"] == 4


def test_the_end_of_input_answers_what_is_complete_in_order(sock: socket.socket) -> None:
    lines = [json.dumps({"op": "metrics" if n % 9 == 4 else "health", "id": n}) for n in range(300)]
    replies = said(sock, "\n".join(lines).encode())
    assert [reply["id"] for reply in replies] == list(range(300))


def test_the_end_of_input_cancels_who_waits_and_ends_who_holds(
    daemon: DaemonProcess, sock: socket.socket
) -> None:
    ask = '{"op":"lease","agent":"x","exclusive":true,"wait_s":600}\n'
    messages = said(sock, (ask * 3).encode())
    replies = [message for message in messages if "event" not in message]
    assert [reply["granted"] for reply in replies] == [True, False, False]
    assert [reply["note"] for reply in replies[1:]] == ["CANCELLED", "CANCELLED"]
    with LineClient(daemon.socket) as other:
        assert other.ask("queue")["waiting"] == []
        assert other.ask("allocations")["allocations"] == []


def test_a_killed_reader_ends_its_leases(daemon: DaemonProcess) -> None:
    with LineClient(daemon.socket) as other:
        with LineClient(daemon.socket) as gone:
            gone.ask("lease", agent="x", min_memory_mb=1)
            gone.send_until_full("policy_get")
            assert len(other.ask("allocations")["allocations"]) == 1
        wait_until(lambda: other.ask("allocations")["allocations"] == [], "the end of the lease")


def test_a_reader_that_comes_late_misses_nothing(sock: socket.socket) -> None:
    # More answers than the socket holds: they wait until they are read, also past the end of input.
    count = 2_000
    lines = [json.dumps({"op": "policy_get", "id": n}) for n in range(count)]
    sock.sendall("\n".join(lines).encode()[:60_000])
    wanted = "\n".join(lines).encode()[60_000:]
    replies: list[dict[str, Any]] = []
    data = b""
    sock.setblocking(False)
    while len(replies) < count:
        if wanted:
            try:
                wanted = wanted[sock.send(wanted) :]
            except BlockingIOError:
                pass
            if not wanted:
                sock.shutdown(socket.SHUT_WR)
        sock.settimeout(DEADLINE_S)
        data += sock.recv(4_096)
        *whole, data = data.split(b"\n")
        replies += [json.loads(line) for line in whole]
        sock.setblocking(False)
    assert [reply["id"] for reply in replies] == list(range(count))
    sock.settimeout(DEADLINE_S)
    assert sock.recv(1) == b""


def test_events_are_lines_too(daemon: DaemonProcess) -> None:
    with LineClient(daemon.socket) as watcher, LineClient(daemon.socket) as holder:
        assert watcher.ask("subscribe", topics=["lease.granted"])["subscription"] == 1
        holder.ask("lease", agent="x", min_memory_mb=1)
        event = watcher.event("lease.granted")
        assert (event["subscription"], event["seq"], event["agent"]) == (1, 1, "x")
        assert "token" not in event
