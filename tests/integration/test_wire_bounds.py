"""Bounds on connections: over one, a client is told which and why, and nobody else suffers."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon_process import LineClient, running_daemon, wait_until
from tests.support.wire import FrameClient, packed

SIMULATED = ("--simulate", "1x24576")
# `refused_connections` of the server: how many are told, rather than closed without a word.
TOLD = 64


@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        (("--max-connections", "5", "--max-holders", "5"), "at most 5 connections"),
        (("--max-connections-per-uid", "5"), "at most 5 connections of one user"),
    ],
    ids=["in all", "of one user"],
)
def test_a_connection_too_many_is_told_so_in_its_mode(
    tmp_path: Path, flags: tuple[str, ...], bound: str
) -> None:
    with ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(tmp_path, *SIMULATED, *flags))
        inside = [stack.enter_context(let_in(daemon.socket)) for _ in range(5)]
        frames = stack.enter_context(FrameClient(daemon.socket))
        frames.send("health", id="me")
        (reply,) = frames.rest()
        assert (reply["id"], reply["error"]["code"]) == ("me", "limit")
        assert reply["error"]["retryable"] is True
        assert bound in reply["error"]["message"]
        lines = stack.enter_context(LineClient(daemon.socket))
        lines.send("health", id="me")
        (reply,) = lines.rest()
        assert (reply["id"], reply["error"]["code"]) == ("me", "limit")
        inside.pop().close()
        let_in(daemon.socket).close()


def let_in(path: Path) -> FrameClient:
    """A connection within the bounds, once the daemon has seen the end of earlier ones."""
    found: list[FrameClient] = []

    def is_let_in() -> bool:
        client = FrameClient(path)
        if client.ask("health")["ok"]:
            found.append(client)
        else:
            client.close()
        return bool(found)

    wait_until(is_let_in, "a place among the connections")
    return found[0]


def test_those_that_are_too_many_and_say_nothing_are_closed(tmp_path: Path) -> None:
    flags = (*SIMULATED, "--max-connections-per-uid", "2")
    with ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(tmp_path, *flags))
        inside = [stack.enter_context(let_in(daemon.socket)) for _ in range(2)]
        began = time.monotonic()
        silent = [stack.enter_context(FrameClient(daemon.socket)) for _ in range(TOLD)]
        # Those over what is kept to be told are closed at once.
        extra = stack.enter_context(FrameClient(daemon.socket))
        assert extra.rest() == []
        assert time.monotonic() - began < 4.0
        assert inside[0].ask("lease", agent="a", min_memory_mb=1)["granted"] is True
        for client in silent:
            assert client.rest() == []
        assert 4.0 < time.monotonic() - began < 15.0


def test_a_burst_of_connections_is_taken(tmp_path: Path) -> None:
    with ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(tmp_path, *SIMULATED))
        burst = []
        for _ in range(800):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            # Refused at once (EAGAIN) where the backlog is full.
            sock.connect(str(daemon.socket))
            burst.append(sock)
        for sock in burst:
            sock.settimeout(20)
            sock.sendall(packed({"id": 1, "op": "health"}))
        for sock in burst:
            assert b"status" in sock.recv(1_000)


def test_leases_of_a_connection_are_bounded(tmp_path: Path) -> None:
    flags = (*SIMULATED, "--max-leases-per-connection", "3", "--max-waiting-per-connection", "1")
    with running_daemon(tmp_path, *flags) as daemon, FrameClient(daemon.socket) as client:
        for _ in range(3):
            assert client.ask("lease", agent="a", min_memory_mb=1)["granted"] is True
        reply = client.ask("lease", agent="a", min_memory_mb=1)
        assert (reply["error"]["code"], reply["error"]["retryable"]) == ("limit", True)
        assert "at most 3" in reply["error"]["message"]
        assert len(client.ask("whoami")["leases"]) == 3


def test_subscriptions_of_a_connection_are_bounded(tmp_path: Path) -> None:
    flags = (*SIMULATED, "--max-subscriptions-per-connection", "2")
    with running_daemon(tmp_path, *flags) as daemon, FrameClient(daemon.socket) as client:
        assert [client.ask("subscribe")["subscription"] for _ in range(2)] == [1, 2]
        reply = client.ask("subscribe")
        assert reply["error"]["code"] == "limit"
        assert "at most 2" in reply["error"]["message"]
        assert client.ask("unsubscribe", subscription=1)["ok"] is True
        assert client.ask("subscribe")["subscription"] == 3
