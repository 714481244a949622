"""The server by itself: a bug is answered and told, requests are counted, a stop leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from gpuorchd.core.effects import (
    CloseDevices,
    ForgetProcess,
    OpenDevices,
    PersistSettings,
    TakeReading,
    WatchProcess,
)
from gpuorchd.core.events import SettingsPersisted
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import Peer, ProcessKey, RequestId
from gpuorchd.core.state import Settings
from gpuorchd.devices.telemetry import DeviceStatus
from gpuorchd.engine import Engine
from gpuorchd.server.connection import Connection
from gpuorchd.server.listener import Server
from gpuorchd.server.services import Options, Services
from tests.support.wire import LENGTH, packed

OPTIONS = Options(version="0")
STATUS = DeviceStatus(False, False, None, None, False, "", False, None)


class Bugs:
    """What the server reports as bugs, and services that have one."""

    def __init__(self) -> None:
        self.met: list[tuple[str, str, RequestId]] = []
        # A directory of users that answers once this is set.
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    def on_bug(self, error: Exception, op: str, request_id: RequestId) -> None:
        self.met.append((str(error), op, request_id))

    def ready(self) -> Mapping[str, object]:
        raise RuntimeError("a bug in ready")

    def identify(self, fd: int) -> Peer:
        return Peer(ProcessKey(1, 1), 0)

    async def resolve(self, names: Iterable[str]) -> Mapping[str, int]:
        self.asked.set()
        await self.answer.wait()
        return dict.fromkeys(names, 7)

    async def render(self) -> str:
        raise RuntimeError("a bug in metrics")


@asynccontextmanager
async def served(bugs: Bugs, path: Path, options: Options = OPTIONS) -> AsyncIterator[Server]:
    """Serve on a socket at `path` for as long as it lasts."""
    loop = asyncio.get_running_loop()
    engine = Engine(Machine(Settings(epoch="abcdef")), loop)
    for kind in (
        CloseDevices,
        ForgetProcess,
        OpenDevices,
        TakeReading,
        WatchProcess,
    ):
        engine.on(kind, lambda effect: None)

    def persist(effect: PersistSettings) -> None:
        loop.call_soon(engine.submit, SettingsPersisted())

    engine.on(PersistSettings, persist)
    services = Services(
        identify=bugs.identify,
        look=bugs.identify,
        ready=bugs.ready,
        device_status=lambda: STATUS,
        telemetry=dict,
        render_metrics=bugs.render,
        resolve_users=bugs.resolve,
        signal_peer=lambda process, uid, name: None,
        on_bug=bugs.on_bug,
    )
    server = Server(engine, services, options, loop)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        server.serve(listening)
        try:
            yield server
        finally:
            await server.stop()
            engine.close()


async def asked(path: Path, *messages: Mapping[str, object]) -> list[dict[str, Any]]:
    """Send requests on one connection and return as many replies."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"".join(packed(message) for message in messages))
        replies = []
        for _ in messages:
            (length,) = LENGTH.unpack(await reader.readexactly(4))
            replies.append(msgpack.unpackb(await reader.readexactly(length)))
        return replies
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("op", ["ready", "metrics"])
async def test_a_bug_is_answered_and_told(tmp_path: Path, op: str) -> None:
    bugs = Bugs()
    async with served(bugs, tmp_path / "s"):
        first, second = await asked(
            tmp_path / "s", {"id": "me", "op": op}, {"id": 2, "op": "health"}
        )
    assert (first["id"], first["error"]["code"]) == ("me", "internal")
    assert f"a bug in {op}" not in first["error"]["message"]
    assert bugs.met == [(f"a bug in {op}", op, "me")]
    assert second["ok"] is True


async def test_a_bug_in_the_core_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs = Bugs()

    def handle(self: Machine, event: object, now_ns: int, unix_ns: int) -> list[object]:
        raise RuntimeError("a bug in the core")

    async with served(bugs, tmp_path / "s"):
        monkeypatch.setattr(Machine, "handle", handle)
        (reply,) = await asked(tmp_path / "s", {"id": 1, "op": "release", "token": "x"})
        monkeypatch.undo()
    assert reply["error"]["code"] == "internal"
    assert bugs.met == [("a bug in the core", "release", 1)]


async def test_requests_are_counted_by_op_and_outcome(tmp_path: Path) -> None:
    bugs = Bugs()
    async with served(bugs, tmp_path / "s") as server:
        await asked(
            tmp_path / "s",
            {"id": 1, "op": "health"},
            {"id": 2, "op": "nonsense"},
            {"id": 3, "op": "lease", "agent": "a"},
            {"id": 4, "op": "lease"},
            {"id": 5, "op": "release", "token": "x"},
            {"id": 6, "op": "health"},
        )
        assert server.request_counts == {
            ("health", "ok"): 2,
            ("unknown", "unknown_op"): 1,
            ("lease", "NO_GPU"): 1,
            ("lease", "bad_request"): 1,
            ("release", "unknown_token"): 1,
        }
    assert bugs.met == []


async def test_a_stop_closes_everyone_and_leaves_the_socket_to_its_owner(tmp_path: Path) -> None:
    listening_at = os.fspath(tmp_path / "s")
    async with served(Bugs(), tmp_path / "s") as server:
        reader, writer = await asyncio.open_unix_connection(listening_at)
        writer.write(packed({"id": 1, "op": "health"}))
        await reader.readexactly(4)
        assert server.connections == 1
        await server.stop()
        assert await reader.read(1_000) != b""
        assert await reader.read() == b""
        assert server.connections == 0
        writer.close()
        await writer.wait_closed()
        assert is_there(listening_at), "the file is its owner's"


def is_there(path: str) -> bool:
    """Whether the socket file still has its name."""
    return os.path.exists(path)


def connections() -> int:
    """Count the connections that anything still knows."""
    gc.collect()
    return sum(1 for each in gc.get_objects() if isinstance(each, Connection))


async def until(server: Server, open_connections: int) -> None:
    """Wait until the server has so many connections; the test's own limit ends a vain wait."""
    while server.connections != open_connections:
        await asyncio.sleep(0.01)


async def test_who_is_closed_for_a_fault_and_does_not_read_is_cut_off(tmp_path: Path) -> None:
    options = Options(version="0", unsent_bytes_per_connection=10_000_000, linger_s=0.2)
    async with served(Bugs(), tmp_path / "s", options) as server:
        _, writer = await asyncio.open_unix_connection(tmp_path / "s", limit=1)
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # it has the method
        await until(server, 1)
        for number in range(3_000):
            writer.write(packed({"id": number, "op": "policy_get"}))
        writer.write(bytes(4))
        await writer.drain()
        await until(server, 0)
        writer.close()


async def test_nothing_is_kept_of_a_connection_that_was_closed_for_a_fault(tmp_path: Path) -> None:
    before = connections()
    async with served(Bugs(), tmp_path / "s") as server:
        for _ in range(20):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            writer.write(bytes(4))
            while await reader.read(1_000):
                pass
            writer.close()
            await writer.wait_closed()
        await until(server, 0)
        await asyncio.sleep(0)
        assert connections() - before <= 1


async def test_a_stop_gives_the_answers_that_take_time(tmp_path: Path) -> None:
    bugs = Bugs()
    changes = {"agents": {"a": {"users": ["somebody"]}}}
    async with served(bugs, tmp_path / "s") as server:
        asking = asyncio.create_task(
            asked(tmp_path / "s", {"id": 1, "op": "policy_set", "changes": changes})
        )
        await bugs.asked.wait()
        stopping = asyncio.create_task(server.stop())
        # It is under way before the directory answers.
        await asyncio.sleep(0)
        bugs.answer.set()
        await stopping
        assert (await asking)[0]["policy"]["agents"] == changes["agents"]


async def test_a_stop_does_not_wait_for_a_directory_that_does_not_answer(tmp_path: Path) -> None:
    bugs = Bugs()
    changes = {"agents": {"a": {"users": ["somebody"]}}}
    async with served(bugs, tmp_path / "s", Options(version="0", stop_s=0.1)) as server:
        asking = asyncio.create_task(
            asked(tmp_path / "s", {"id": 1, "op": "policy_set", "changes": changes})
        )
        await bugs.asked.wait()
        await server.stop()
        with pytest.raises(asyncio.IncompleteReadError):
            await asking


async def test_others_are_served_while_a_directory_is_asked(tmp_path: Path) -> None:
    bugs = Bugs()
    async with served(bugs, tmp_path / "s"):
        changes = {"agents": {"a": {"users": ["somebody"]}}}
        asking = asyncio.create_task(
            asked(tmp_path / "s", {"id": 1, "op": "policy_set", "changes": changes})
        )
        await bugs.asked.wait()
        assert (await asked(tmp_path / "s", {"id": 2, "op": "health"}))[0]["ok"] is True
        bugs.answer.set()
        assert (await asking)[0]["ok"] is True
