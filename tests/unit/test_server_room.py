"""The server by itself: a bug is answered and told, requests are counted, a stop leaves nothing."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
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
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import Peer, ProcessKey, RequestId
from gpuorchd.core.state import Settings
from gpuorchd.devices.telemetry import DeviceStatus
from gpuorchd.engine import Engine
from gpuorchd.server.listener import Server
from gpuorchd.server.services import Options, Services
from tests.support.wire import LENGTH, packed

STATUS = DeviceStatus(False, False, None, None, False, "", False, None)


class Bugs:
    """What the server reports as bugs, and services that have one."""

    def __init__(self) -> None:
        self.met: list[tuple[str, str, RequestId]] = []

    def on_bug(self, error: Exception, op: str, request_id: RequestId) -> None:
        self.met.append((str(error), op, request_id))

    def ready(self) -> Mapping[str, object]:
        raise RuntimeError("a bug in ready")

    def identify(self, fd: int) -> Peer:
        return Peer(ProcessKey(1, 1), 0)

    async def render(self) -> str:
        raise RuntimeError("a bug in metrics")


@asynccontextmanager
async def served(bugs: Bugs, path: Path) -> AsyncIterator[Server]:
    """Serve on a socket at `path` for as long as it lasts."""
    loop = asyncio.get_running_loop()
    engine = Engine(Machine(Settings(epoch="abcdef")), loop)
    for kind in (
        CloseDevices,
        ForgetProcess,
        OpenDevices,
        PersistSettings,
        TakeReading,
        WatchProcess,
    ):
        engine.on(kind, lambda effect: None)
    services = Services(
        identify=bugs.identify,
        ready=bugs.ready,
        device_status=lambda: STATUS,
        telemetry=dict,
        render_metrics=bugs.render,
        resolve_user=lambda name: None,
        signal_peer=lambda process, uid, name: None,
        on_bug=bugs.on_bug,
    )
    server = Server(engine, services, Options(version="0"), loop)
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

    def handle(self: Machine, event: object, now_ns: int) -> list[object]:
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
