"""Leases outlive the daemon: its death, its restart, and the loss of everything but the table."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from libclient.wire.framing import MAX_REPLY_BYTES, FrameSplitter, frame
from tests.support.daemon_process import DaemonProcess
from tests.support.init import Init

DEADLINE_S = 20.0
CARD = ("--simulate", "1x8000")


class Client:
    """A connection in frames that shows every message."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(os.fspath(path))
        self._splitter = FrameSplitter(MAX_REPLY_BYTES)

    def send(self, number: int, op: str, **fields: object) -> None:
        self.sock.sendall(self.packed(number, op, **fields))

    @staticmethod
    def packed(number: int, op: str, **fields: object) -> bytes:
        return frame(msgpack.packb({"id": number, "op": op, **fields}))

    def message(self) -> dict[str, Any]:
        while (payload := self._splitter.next_frame()) is None:
            data = self.sock.recv(65_536)
            assert data, "the daemon closed the connection"
            self._splitter.feed(data)
        found: dict[str, Any] = msgpack.unpackb(payload)
        return found

    def reply(self, number: int) -> dict[str, Any]:
        while True:
            found = self.message()
            if found.get("id") == number:
                return found

    def ask(self, number: int, op: str, **fields: object) -> dict[str, Any]:
        self.send(number, op, **fields)
        return self.reply(number)

    def lease(self, number: int, memory_mb: int, wait_s: float = 0) -> dict[str, Any]:
        return self.ask(number, "lease", agent=f"a{number}", min_memory_mb=memory_mb, wait_s=wait_s)

    def resumed(self) -> bytes:
        """Await the greeting; return the marker that answers it."""
        while (found := self.message()).get("event") != "daemon.resumed":
            continue
        assert len(found["nonce"]) == 16
        return b"\xff\xff\xff\xff" + bytes(found["nonce"])

    def go_on(self) -> None:
        self.sock.sendall(self.resumed())

    def ended(self) -> bool:
        """Whether the daemon has closed the connection."""
        try:
            while self.sock.recv(65_536):
                continue
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Init]:
    with Init(tmp_path, *CARD) as found:
        yield found


@pytest.fixture
def clients(manager: Init) -> Iterator[list[Client]]:
    made = [Client(manager.socket) for _ in range(3)]
    yield made
    for client in made:
        client.close()


def joined(manager: Init, clients: list[Client]) -> Client:
    """Open one more connection; the fixture closes it."""
    clients.append(Client(manager.socket))
    return clients[-1]


def test_a_lease_goes_on_after_the_daemon_was_killed(manager: Init, clients: list[Client]) -> None:
    holder = clients[0]
    hello = holder.ask(1, "hello")
    granted = holder.lease(2, 6_000)
    assert granted["granted"]
    manager.restart()
    holder.go_on()
    assert holder.ask(3, "hello")["epoch"] == hello["epoch"]
    assert holder.ask(4, "whoami")["leases"] == [granted["lease_id"]]
    # It is still taken, and it is still its owner's to release.
    other = joined(manager, clients)
    assert other.lease(1, 6_000)["note"] == "INSUFFICIENT_MEMORY"
    assert holder.ask(5, "release", token=granted["token"])["released"]


def test_who_waited_goes_on_waiting_in_the_same_order(manager: Init, clients: list[Client]) -> None:
    holder, first, second = clients
    granted = holder.lease(1, 6_000)
    first.send(1, "lease", agent="first", min_memory_mb=6_000, wait_s=60)
    assert first.message()["event"] == "lease.queued"
    second.send(1, "lease", agent="second", min_memory_mb=6_000, wait_s=60)
    assert second.message()["event"] == "lease.queued"
    manager.restart()
    for client in clients:
        client.go_on()
    for client in (second, first):
        client.send(1, "lease", agent="x", min_memory_mb=6_000, wait_s=60)
    holder.ask(2, "release", token=granted["token"])
    won = first.reply(1)
    assert won["granted"]
    assert won["agent"] == "first"
    first.ask(2, "release", token=won["token"])
    assert second.reply(1)["agent"] == "second"


def test_what_was_done_is_not_done_twice_and_answered_the_same(
    manager: Init, clients: list[Client]
) -> None:
    holder = clients[0]
    granted = holder.lease(1, 6_000)
    released = holder.ask(2, "release", token=granted["token"])
    manager.restart()
    # As a client whose answer was lost on the way.
    marker = holder.resumed()
    again = Client.packed(1, "lease", agent="a1", min_memory_mb=6_000)
    holder.sock.sendall(b"half a requ" + marker + Client.packed(2, "release", token="x") + again)
    assert holder.reply(2) == released
    # The lease itself is over: the request is a new one.
    assert holder.reply(1)["lease_id"] != granted["lease_id"]


def test_a_grant_that_was_not_read_is_the_same_grant(manager: Init, clients: list[Client]) -> None:
    holder = clients[0]
    granted = holder.lease(1, 6_000)
    manager.restart()
    holder.go_on()
    again = holder.lease(1, 6_000)
    assert {**again, "timestamp": 0} == {**granted, "timestamp": 0}
    # A second time it is the client's mistake.
    holder.send(1, "lease", agent="a1", min_memory_mb=6_000)
    refused = holder.message()
    assert (refused["id"], refused["error"]["field"]) == (None, "id")


def test_a_client_that_died_meanwhile_keeps_nothing(manager: Init, clients: list[Client]) -> None:
    dies, lives, _ = clients
    assert dies.lease(1, 4_000)["granted"]
    assert lives.lease(1, 1_000)["granted"]
    manager.kill()
    dies.close()
    manager.start()
    lives.go_on()
    assert joined(manager, clients).lease(1, 6_500, wait_s=10)["granted"]


def test_a_sealed_connection_is_held_without_a_word(manager: Init, clients: list[Client]) -> None:
    sealed, other, _ = clients
    assert sealed.lease(1, 6_000)["granted"]
    assert sealed.ask(2, "seal")["ok"]
    other.lease(1, 100)
    for _ in range(2):
        manager.restart()
        other.go_on()
        assert other.lease(2, 6_000)["note"] == "INSUFFICIENT_MEMORY"
    sealed.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sealed.sock.recv(1)


def test_a_clean_stop_hands_over_and_answers_nobody(manager: Init, clients: list[Client]) -> None:
    holder, waiter, _ = clients
    granted = holder.lease(1, 6_000)
    waiter.send(1, "lease", agent="w", min_memory_mb=6_000, wait_s=60)
    assert waiter.message()["event"] == "lease.queued"
    began = time.monotonic()
    assert manager.stop() == 0
    assert time.monotonic() - began < 1
    manager.start()
    for client in (holder, waiter):
        client.go_on()
    waiter.send(1, "lease", agent="w", min_memory_mb=6_000, wait_s=60)
    assert holder.ask(2, "release", token=granted["token"])["released"]
    assert waiter.reply(1)["granted"]


def test_an_emptied_store_leaves_leases_to_be_reattached(
    manager: Init, clients: list[Client]
) -> None:
    holder, other, _ = clients
    granted = holder.lease(1, 6_000)
    manager.kill()
    manager.empty()
    manager.start()
    assert other.ended()
    holder, other = joined(manager, clients), joined(manager, clients)
    assert other.lease(1, 6_000)["note"] == "INSUFFICIENT_MEMORY"
    (row,) = other.ask(2, "allocations")["allocations"]
    assert row["state"] == "detached"
    back = holder.ask(1, "reattach", token=granted["token"])
    assert back["lease_id"] == granted["lease_id"]
    assert back["token"] == granted["token"]
    assert holder.ask(2, "reattach", token=granted["token"])["error"]["code"] == "not_owner"
    assert holder.ask(3, "release", token=granted["token"])["released"]
    assert holder.ask(4, "reattach", token=granted["token"])["error"]["code"] == "unknown_token"


def test_nobody_comes_back_after_the_grace(tmp_path: Path) -> None:
    with Init(tmp_path, *CARD, "--reattach-grace", "0.3") as manager:
        holder = Client(manager.socket)
        assert holder.lease(1, 6_000)["granted"]
        manager.kill()
        manager.empty()
        manager.start()
        other = Client(manager.socket)
        assert other.lease(1, 6_000, wait_s=10)["granted"]
        holder.close()
        other.close()


def test_without_a_store_leases_are_reattached_too(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, *CARD)
    try:
        daemon.wait_until_it_answers()
        holder = Client(daemon.socket)
        granted = holder.lease(1, 6_000)
        daemon.process.kill()
        daemon.wait()
        holder.close()
        # No memory file system for it here: what lies on the disk must not let anybody in.
        assert granted["token"].encode() not in (daemon.state / "leases").read_bytes()
        daemon = DaemonProcess(tmp_path, *CARD)
        daemon.wait_until_it_answers()
        holder = Client(daemon.socket)
        back = holder.ask(1, "reattach", token=granted["token"])
        assert (back["lease_id"], back["token"]) == (granted["lease_id"], granted["token"])
        holder.close()
    finally:
        daemon.end()


def test_a_full_store_refuses_the_next_and_keeps_the_others(tmp_path: Path) -> None:
    with Init(tmp_path, *CARD, bound=3) as manager:
        clients = [Client(manager.socket) for _ in range(4)]
        for client in clients[:3]:
            assert client.lease(1, 100)["granted"]
        error = clients[3].lease(1, 100)["error"]
        assert error["code"] == "limit"
        assert "3 connections in the descriptor store" in error["message"]
        manager.restart()
        for client in clients[:3]:
            client.go_on()
            assert client.ask(2, "whoami")["leases"]
        # One place is free again, once its connection has left.
        clients[0].close()
        late = joined(manager, clients)
        deadline = time.monotonic() + DEADLINE_S
        while "error" in late.lease(2, 100):
            assert time.monotonic() < deadline, "its place is never free"
        for client in clients:
            client.close()


def test_a_burst_of_first_leases_is_stored_whole_however_short_the_manager_s_queue(
    manager: Init, clients: list[Client]
) -> None:
    # The queue of a datagram socket holds 10 messages where nobody has raised it.
    crowd = [joined(manager, clients) for _ in range(80)]
    for client in crowd:
        client.send(1, "lease", agent="a", min_memory_mb=10)
    assert all(client.reply(1).get("granted") for client in crowd)
    manager.wait_until_kept(80)


def test_a_manager_that_does_not_read_costs_a_refusal_and_no_lease(
    manager: Init, clients: list[Client]
) -> None:
    assert clients[0].lease(1, 100)["granted"]
    manager.deaf = True
    refused = clients[1].lease(1, 100)
    assert refused["error"]["code"] == "limit"
    # Whoever is in the store already needs nothing of it.
    assert clients[0].lease(2, 100)["granted"]
    manager.deaf = False


def test_a_connection_with_half_a_frame_is_ended_and_comes_back(
    manager: Init, clients: list[Client]
) -> None:
    holder, other, _ = clients
    # Frames of more than 32 KiB may be cut by the kernel.
    purpose = "\u2603" * 256
    tokens = []
    for number in range(60):
        reply = holder.ask(number, "lease", agent="a", min_memory_mb=1, purpose=purpose)
        tokens.append(reply["token"])
    assert other.lease(1, 1)["granted"]
    # More than the kernel takes, from a client that does not read.
    for number in range(100, 130):
        holder.send(number, "allocations")
    time.sleep(0.3)
    manager.restart()
    other.go_on()
    assert holder.ended()
    holder = joined(manager, clients)
    back = [holder.ask(n, "reattach", token=token) for n, token in enumerate(tokens)]
    assert all(reply["granted"] for reply in back)


def test_a_bad_setting_does_not_end_what_agents_hold(manager: Init, clients: list[Client]) -> None:
    holder = clients[0]
    granted = holder.lease(1, 6_000)
    manager.environ["GPU_ORCHESTRATOR_LEASE_TTL"] = "soon"
    manager.restart()
    holder.go_on()
    assert holder.ask(2, "whoami")["leases"] == [granted["lease_id"]]
    check = holder.ask(3, "ready")["checks"]["config"]
    assert not check["ok"]
    assert "GPU_ORCHESTRATOR_LEASE_TTL" in check["detail"]
    assert "GPU_ORCHESTRATOR_LEASE_TTL" in manager.said["STATUS"]


def test_garbage_in_place_of_the_marker_is_thrown_away(
    manager: Init, clients: list[Client]
) -> None:
    holder = clients[0]
    granted = holder.lease(1, 6_000)
    manager.restart()
    marker = holder.resumed()
    holder.sock.sendall(struct.pack(">I", 2**31) + os.urandom(300_000))
    for piece in (marker[:7], marker[7:], b"\0\0", Client.packed(2, "whoami")[2:]):
        holder.sock.sendall(piece)
        time.sleep(0.02)
    assert holder.reply(2)["leases"] == [granted["lease_id"]]
