"""The side port on a real socket: bounds, slow clients, and that nobody else waits for them."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gpuorchd.observe import http_server
from gpuorchd.observe.http import HttpSide, Pages
from gpuorchd.observe.metrics import Metrics
from tests.support.http_client import Answer, fetch, read_answer, request_bytes
from tests.support.observed import SECRET, ObservedEngine, until
from tests.support.uvloop_runner import on_uvloop

SOCKET = "/run/justnews/gpuorch.sock"
BIG = 32 * 1_048_576


class Side:
    """A side port in front of a real engine, on the loop that the daemon uses."""

    def __init__(self, connections_max: int = 64, body: bytes | None = None) -> None:
        self.engine = ObservedEngine()
        self.metrics = Metrics(self.engine)
        self.reports: list[tuple[str, dict[str, object]]] = []
        self.body = body
        self.ready = True
        pages = Pages(
            health=lambda: {"status": "ok", "safe_mode": False},
            ready=lambda: {"ready": self.ready, "checks": {}},
            gpu_info=lambda: {"available": True},
            policy=lambda: {"revision": 1},
            allocations=lambda after, limit: {"allocations": [], "next": None},
            metrics=self._page,
            socket_path=SOCKET,
        )
        self.http = HttpSide(pages, self._report, any_port=True, connections_max=connections_max)

    async def _page(self) -> bytes:
        return await self.metrics.render() if self.body is None else self.body

    def _report(self, event: str, /, **fields: object) -> None:
        self.reports.append((event, fields))

    @property
    def address(self) -> tuple[str, int]:
        address = self.http.address
        assert address is not None, "the port does not answer"
        return address

    async def get(self, path: str, *args: Any, **kwargs: Any) -> Answer:
        return await fetch(self.address, path, *args, **kwargs)


@asynccontextmanager
async def side(connections_max: int = 64, body: bytes | None = None) -> AsyncIterator[Side]:
    running = Side(connections_max, body)
    await running.http.start()
    try:
        yield running
    finally:
        await running.http.stop()
        await running.metrics.stop()


def test_every_page_answers_with_its_type_and_is_kept_by_nobody() -> None:
    async def test() -> None:
        async with side() as port:
            types = {
                "/": "text/plain; charset=utf-8",
                "/metrics": "text/plain; version=0.0.4; charset=utf-8",
                "/health": "application/json; charset=utf-8",
                "/ready": "application/json; charset=utf-8",
                "/gpu/info": "application/json; charset=utf-8",
                "/policy": "application/json; charset=utf-8",
                "/allocations": "application/json; charset=utf-8",
            }
            for path, content_type in types.items():
                answer = await port.get(path)
                assert answer.status == 200, path
                assert answer.headers["content-type"] == content_type
                assert answer.headers["cache-control"] == "no-store"
                assert not [name for name in answer.headers if name.startswith("access-control")]
                head = await port.get(path, "HEAD")
                assert head.status == 200
                assert head.body == b""
                if path != "/metrics":
                    assert head.headers["content-length"] == str(len(answer.body))
            port.ready = False
            assert (await port.get("/ready")).status == 503

    on_uvloop(test)


def test_a_scrape_is_text_for_prometheus_without_any_token() -> None:
    async def test() -> None:
        async with side() as port:
            port.engine.ask("scout")
            text = (await port.get("/metrics")).body.decode()
            assert 'gpu_orchestrator_agent_leased_bytes{agent="scout"}' in text
            assert SECRET not in text

    on_uvloop(test)


def test_a_post_with_a_body_is_refused_and_shown_the_socket() -> None:
    async def test() -> None:
        async with side() as port:
            answer = await port.get("/lease", "POST", body=b'{"agent": "x"}' * 1_000)
            assert answer.status == 405
            assert answer.headers["allow"] == "GET, HEAD"
            assert SOCKET in answer.json()["error"]["message"]

    on_uvloop(test)


@pytest.mark.parametrize("host", ["evil.example", None])
def test_a_foreign_host_is_refused(host: str | None) -> None:
    async def test() -> None:
        async with side() as port:
            assert (await port.get("/health", "GET", host)).status in {400, 403}

    on_uvloop(test)


def test_two_host_headers_are_refused() -> None:
    async def test() -> None:
        async with side() as port:
            answer = await port.get("/health", "GET", "localhost", "Host: evil.example")
            assert answer.status in {400, 403}

    on_uvloop(test)


def test_a_connection_is_kept_for_the_next_scrape() -> None:
    async def test() -> None:
        async with side() as port:
            reader, writer = await asyncio.open_connection(*port.address)
            for _ in range(3):
                writer.write(request_bytes("/health"))
                assert (await read_answer(reader)).status == 200
            writer.close()
            await writer.wait_closed()

    on_uvloop(test)


def test_one_connection_too_many_is_told_so_and_others_go_on() -> None:
    async def test() -> None:
        async with side(connections_max=3) as port:
            kept = [await asyncio.open_connection(*port.address) for _ in range(3)]
            for reader, writer in kept:
                writer.write(request_bytes("/health"))
                assert (await read_answer(reader)).status == 200
            refused = await port.get("/health")
            assert refused.status == 503
            assert refused.headers["connection"] == "close"
            assert "3 connections" in refused.json()["error"]["message"]
            assert (await port.get("/health")).status == 503
            told = [event for event, _ in port.reports if event == "http.connection_refused"]
            assert len(told) == 1, "told once, not for each"
            for _, writer in kept:
                writer.close()
                await writer.wait_closed()
            await until(lambda: port.http._server and not port.http._server._http.connections)
            assert (await port.get("/health")).status == 200

    on_uvloop(test)


def test_connections_that_ask_nothing_keep_nobody_out() -> None:
    async def test() -> None:
        async with side(connections_max=3) as port, asyncio.timeout(10):
            asking = await asyncio.open_connection(*port.address)
            asking[1].write(request_bytes("/health"))
            assert (await read_answer(asking[0])).status == 200
            half_sent = [await asyncio.open_connection(*port.address) for _ in range(2)]
            for _, writer in half_sent:
                writer.write(b"GET /hea")
            await until(lambda: port.http._server and len(port.http._server._http.connections) == 3)
            assert (await port.get("/health")).status == 200
            oldest, other = half_sent
            try:
                assert await oldest[0].read() == b""
            except ConnectionResetError:
                # Ended with what it had sent unread.
                pass
            # Who has asked before stays, and so does the one for whom there was room.
            asking[1].write(request_bytes("/health"))
            assert (await read_answer(asking[0])).status == 200
            other[1].write(request_bytes("/health").removeprefix(b"GET /hea"))
            assert (await read_answer(other[0])).status == 200
            for _, writer in (asking, *half_sent):
                writer.close()

    on_uvloop(test)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A", b"\r\n"]
)
def test_a_client_that_never_finishes_its_request_is_ended(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http_server, "HEADER_S", 0.05)
    monkeypatch.setattr(http_server, "SWEEP_S", 0.02)

    async def test() -> None:
        async with side() as port, asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(*port.address)
            writer.write(sent)
            try:
                assert await reader.read() == b"", "ended without an answer"
            except ConnectionResetError:
                # Ended with some of it unread.
                pass
            writer.close()

    on_uvloop(test)


def test_a_reader_that_takes_nothing_delays_nobody_and_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_S", 0.5)
    monkeypatch.setattr(http_server, "SWEEP_S", 0.05)

    async def test() -> None:
        async with side(body=b"x" * BIG) as port:
            loop = asyncio.get_running_loop()
            slow = [socket.create_connection(port.address) for _ in range(4)]
            try:
                for client in slow:
                    client.setblocking(False)
                    client.sendall(request_bytes("/metrics"))
                server = port.http._server
                assert server is not None
                await until(lambda: len(server._http.connections) == 4)
                # Others are answered while these sit there with their pages unread.
                for _ in range(20):
                    assert (await port.get("/health")).status == 200
                await until(lambda: not server._http.connections)
                await until(lambda: not server._begun_s)
                got = 0
                while True:
                    try:
                        data = await asyncio.wait_for(loop.sock_recv(slow[0], 1_048_576), 10)
                    except ConnectionResetError:
                        break
                    if not data:
                        break
                    got += len(data)
                assert got < BIG
            finally:
                for client in slow:
                    client.close()

    on_uvloop(test)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 1_000 + b"\r\n",
        b"\x00\x00\x00\x05hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    ],
)
def test_nonsense_is_refused_and_the_port_goes_on(data: bytes) -> None:
    async def test() -> None:
        async with side() as port, asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(*port.address)
            writer.write(data)
            try:
                assert (await reader.read()).startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))
            except ConnectionResetError:
                # Ended with some of it unread.
                pass
            writer.close()
            assert (await port.get("/health")).status == 200
            assert not [event for event, _ in port.reports if event != "http.bound"]

    on_uvloop(test)


def test_a_client_that_vanishes_in_the_middle_of_an_answer_is_no_failure() -> None:
    async def test() -> None:
        async with side(body=b"x" * BIG) as port:
            for _ in range(5):
                client = socket.create_connection(port.address)
                client.sendall(request_bytes("/metrics"))
                # A reset, as of a killed process with data unread.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
            server = port.http._server
            assert server is not None
            await until(lambda: not server._http.connections)
            assert (await port.get("/health")).status == 200
            assert [event for event, _ in port.reports] == ["http.bound"]

    on_uvloop(test)


def test_a_port_that_is_taken_is_named_by_readiness_and_does_not_fail_it() -> None:
    async def test() -> None:
        async with side() as first:
            second = Side()
            second.http._port = first.address[1]
            await second.http.start()
            ok, detail = second.http.check()
            assert ok, "leases are asked for on the socket, and get right answers"
            assert detail.startswith("not served: ")
            assert str(first.address[1]) in detail
            assert "in use" in detail
            assert [event for event, _ in second.reports] == ["http.bind_failed"]
            await second.http.stop()
            assert first.http.check() == (True, f"127.0.0.1:{first.address[1]}")

    on_uvloop(test)


def test_a_given_listening_socket_is_served_and_closed_at_the_end() -> None:
    async def test() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        port = Side()
        http = HttpSide(port.http._pages, port._report, sock=listener)
        assert http.check() == (True, "not served yet; leases are")
        await http.start()
        assert http.address == listener.getsockname()
        assert (await fetch(listener.getsockname(), "/health")).status == 200
        await http.stop()
        assert listener.fileno() == -1

    on_uvloop(test)


def test_no_port_is_no_http_and_no_failure() -> None:
    async def test() -> None:
        http = HttpSide(Side().http._pages, lambda event, /, **fields: None, port=0)
        await http.start()
        assert http.address is None
        assert http.check() == (True, "no HTTP port is configured")
        await http.stop()

    on_uvloop(test)


def test_stopping_ends_connections_whatever_they_do() -> None:
    async def test() -> None:
        port = Side(body=b"x" * BIG)
        await port.http.start()
        slow = socket.create_connection(port.address)
        idle = socket.create_connection(port.address)
        try:
            slow.sendall(request_bytes("/metrics"))
            server = port.http._server
            assert server is not None
            await until(lambda: len(server._http.connections) == 2)
            async with asyncio.timeout(5):
                await port.http.stop()
            assert not server._http.connections
        finally:
            slow.close()
            idle.close()

    on_uvloop(test)


def test_stopping_while_it_starts_leaves_nothing_behind() -> None:
    async def test() -> None:
        port = Side()
        starting = asyncio.create_task(port.http.start())
        await asyncio.sleep(0)
        await port.http.stop()
        await starting
        assert port.http.address is None

    on_uvloop(test)
