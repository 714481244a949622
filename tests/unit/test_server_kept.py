"""Connections that outlive the daemon: marked before a part leaves, bounded, deaf to the past."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from gpuorchd.core.effects import (
    CloseDevices,
    Commit,
    ForgetProcess,
    OpenDevices,
    PersistSettings,
    TakeReading,
    WatchProcess,
)
from gpuorchd.core.events import DevicesFound
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import ConnectionId, DeviceFacts, DeviceUuid, Peer, ProcessKey
from gpuorchd.core.state import Settings
from gpuorchd.devices.telemetry import DeviceStatus
from gpuorchd.engine import Engine
from gpuorchd.server.connection import Connection
from gpuorchd.server.listener import Server
from gpuorchd.server.marker import FIRST
from gpuorchd.server.services import Options, Services
from gpuorchd.server.taking import REQUESTS_PER_TURN
from libclient.wire.framing import MAX_REPLY_BYTES, WHOLE_FRAME_BYTES, FrameSplitter
from tests.support.wire import packed

STATUS = DeviceStatus(True, False, None, None, False, "", False, None)
DEADLINE_S = 20.0


class Keeping:
    """A table and a store that are told; `answers` lets a connection be stored, or not."""

    has_store = True

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self._then: dict[int, Callable[[str | None], None]] = {}
        self.at_once = True

    def refusal(self, stored: bool) -> str | None:
        return None

    def keep(self, conn: int, fd: int, then: Callable[[str | None], None]) -> None:
        self.told.append(("keep", conn))
        self._then[conn] = then
        if self.at_once:
            asyncio.get_running_loop().call_soon(self.answer, conn)

    def answer(self, conn: int, reason: str | None = None) -> None:
        self._then.pop(conn)(reason)

    def drop(self, conn: int) -> None:
        self.told.append(("drop", conn))

    def mark_half_sent(self, conn: int, on: bool) -> None:
        self.told.append(("mark", conn, on))


class Served:
    """A server with what it tells, and its connections."""

    def __init__(self, keeping: Keeping) -> None:
        loop = asyncio.get_running_loop()
        self.keeping = keeping
        self.engine = engine = Engine(Machine(Settings(epoch="abcdef", keeps=True)), loop)
        for kind in (
            CloseDevices,
            Commit,
            ForgetProcess,
            OpenDevices,
            PersistSettings,
            TakeReading,
            WatchProcess,
        ):
            engine.on(kind, lambda effect: None)
        self.bugs: list[str] = []
        services = Services(
            identify=lambda fd: Peer(ProcessKey(1, 1), 0),
            look=lambda fd: Peer(ProcessKey(1, 1), 0),
            ready=dict,
            device_status=lambda: STATUS,
            telemetry=dict,
            render_metrics=self._render,
            resolve_users=self._resolve,
            signal_peer=lambda process, uid, name: None,
            on_bug=lambda error, op, request_id: self.bugs.append(repr(error)),
            keeping=keeping,
        )
        self.server = Server(engine, services, Options(version="0"), loop)
        # Long names make a view of them long.
        cards = tuple(
            DeviceFacts(DeviceUuid(f"GPU-{i}"), i, "x" * 1_000, 8_000, drain_ns=0)
            for i in range(64)
        )
        engine.submit(DevicesFound(cards))

    async def _resolve(self, names: Iterable[str]) -> Mapping[str, int]:
        return {}

    async def _render(self) -> str:
        return ""

    @property
    def only(self) -> Connection:
        """The one connection."""
        (found,) = self.server._board.connections.values()
        return found


@asynccontextmanager
async def served(path: Path, keeping: Keeping) -> AsyncIterator[Served]:
    """Serve on a socket at `path` for as long as it lasts."""
    found = Served(keeping)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        found.server.serve(listening)
        try:
            yield found
        finally:
            await found.server.stop()
            found.engine.close()
            assert found.bugs == []


class Client:
    """A socket that is read only when it is asked to be."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.splitter = FrameSplitter(MAX_REPLY_BYTES)

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def message(self) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            while (payload := self.splitter.next_frame()) is None:
                data = await asyncio.get_running_loop().sock_recv(self.sock, 65_536)
                assert data, "the daemon closed the connection"
                self.splitter.feed(data)
        found: dict[str, Any] = msgpack.unpackb(payload)
        return found


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Client]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(path))
        yield Client(sock)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def lease(number: int) -> bytes:
    return packed({"id": number, "op": "lease", "agent": "a", "min_memory_mb": 1})


async def test_who_does_not_read_has_no_65th_request_taken(tmp_path: Path) -> None:
    async with served(tmp_path / "s", Keeping()) as found, connected(tmp_path / "s") as client:
        await client.send(lease(0))
        assert (await client.message())["granted"]
        count = 6_000
        requests = b"".join(packed({"id": n, "op": "whoami"}) for n in range(1, count + 1))
        sending = asyncio.create_task(client.send(requests))
        conn = found.only
        await until(lambda: conn.outbox.blocked and conn._is_halted())
        # All of their answers are kept, and no more are than may have to be given again.
        assert len(conn.outbox._chunks) <= REQUESTS_PER_TURN
        assert conn.outbox.unsent_bytes < conn.bound_bytes
        assert conn.behind == REQUESTS_PER_TURN
        # Who reads gets every answer, once and in order.
        for number in range(1, count + 1):
            assert (await client.message())["id"] == number
        await sending


async def test_a_frame_that_may_be_cut_is_marked_before_it_leaves(tmp_path: Path) -> None:
    keeping = Keeping()
    async with served(tmp_path / "s", keeping), connected(tmp_path / "s") as client:
        await client.send(lease(1))
        assert (await client.message())["granted"]
        assert keeping.told == [("keep", 1)]
        await client.send(packed({"id": 2, "op": "gpu_info"}))
        await until(lambda: ("mark", 1, True) in keeping.told)
        assert len((await client.message())["gpus"]) == 64
        await until(lambda: keeping.told[1:] == [("mark", 1, True), ("mark", 1, False)])
        # What the kernel takes whole needs no mark.
        await client.send(packed({"id": 3, "op": "whoami"}))
        assert (await client.message())["id"] == 3
        assert len(keeping.told) == 3


async def test_a_part_that_is_out_already_is_marked_before_its_connection_is_stored(
    tmp_path: Path,
) -> None:
    keeping = Keeping()
    async with served(tmp_path / "s", keeping) as found, connected(tmp_path / "s") as client:
        views = b"".join(packed({"id": n, "op": "gpu_info"}) for n in range(1, 6))
        await client.send(views + lease(9))
        await until(lambda: ("keep", 1) in keeping.told)
        assert found.only.outbox.unsent_bytes > WHOLE_FRAME_BYTES
        assert keeping.told == [("mark", 1, True), ("keep", 1)]
        for number in (1, 2, 3, 4, 5, 9):
            assert (await client.message())["id"] == number
        await until(lambda: keeping.told[-1] == ("mark", 1, False))


async def test_who_is_not_stored_is_not_marked(tmp_path: Path) -> None:
    keeping = Keeping()
    keeping.at_once = False
    async with served(tmp_path / "s", keeping), connected(tmp_path / "s") as client:
        await client.send(lease(1) + packed({"id": 2, "op": "whoami"}))
        await until(lambda: keeping.told == [("keep", 1)])
        keeping.answer(1, "at most 0 connections in the descriptor store")
        refused = await client.message()
        assert (refused["id"], refused["error"]["code"]) == (1, "limit")
        # What came behind it is answered behind it.
        assert (await client.message())["id"] == 2
        await client.send(packed({"id": 3, "op": "gpu_info"}))
        assert len((await client.message())["gpus"]) == 64
        # And the next try is a new one.
        await client.send(lease(4))
        await until(lambda: len(keeping.told) == 2)
        assert keeping.told == [("keep", 1)] * 2
        keeping.answer(1)
        assert (await client.message())["granted"]


async def test_who_leaves_while_it_is_being_stored_leaves_nothing(tmp_path: Path) -> None:
    keeping = Keeping()
    keeping.at_once = False
    async with served(tmp_path / "s", keeping) as found:
        async with connected(tmp_path / "s") as client:
            await client.send(lease(1))
            await until(lambda: keeping.told == [("keep", 1)])
        await until(lambda: ("drop", 1) in keeping.told)
        keeping.answer(1)
        assert not found.engine.state.leases
        assert not found.engine.state.clients


@pytest.fixture
def outlived() -> Any:
    ours, theirs = socket.socketpair()
    with theirs:
        yield ours, theirs


async def test_nothing_before_the_marker_is_taken_whatever_has_left_meanwhile(
    tmp_path: Path, outlived: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = outlived
    async with served(tmp_path / "s", Keeping()) as found:
        # The earlier daemon's answers fill it: the greeting has to wait.
        ours.setblocking(False)
        filled = 0
        try:
            while True:
                filled += ours.send(b"x" * 4_096)
        except BlockingIOError:
            pass
        found.server.resume({ConnectionId(7): ours}, found.engine.state, 8)
        await until(lambda: found.only._transport is not None)
        client = Client(theirs)
        while filled:
            got = await asyncio.get_running_loop().sock_recv(theirs, min(filled, 65_536))
            filled -= len(got)
        greeting = await client.message()
        assert greeting["event"] == "daemon.resumed"
        assert greeting["epoch"] == "abcdef"
        await until(lambda: not found.only.outbox.unsent_bytes)
        # One read that is one whole frame, as an earlier daemon had it; and then the true ones.
        await client.send(packed({"id": 1, "op": "whoami"}))
        await until(lambda: found.only.marker is not None and bool(found.only.marker._tail))
        await client.send(FIRST + greeting["nonce"] + packed({"id": 2, "op": "whoami"}))
        assert (await client.message())["id"] == 2
        assert found.server.request_counts == {("whoami", "ok"): 1}
