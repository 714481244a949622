"""The asyncio client, on the standard loop and on uvloop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from libclient import aio
from libclient.errors import RequestError, Unavailable
from tests.support.proxy import FakeDaemon, Served, denial_fields, grant_fields
from tests.support.uvloop_runner import on_uvloop

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


def on_asyncio(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


@pytest.fixture(params=[on_asyncio, on_uvloop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that no event announces."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_lease_is_held_for_the_length_of_its_block(run: Run, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            async with client.lease("analyst", "2GiB") as lease:
                assert lease.granted
                assert lease.device == "cuda:0"
                assert daemon.ops() == ["lease"]
            assert lease.ended == "released"
            awaited = await client.lease("analyst")
            await client.release(awaited)
            by_token = await client.lease("analyst")
            assert by_token.token is not None
            await client.release(by_token.token)
            assert by_token.ended == "released"
        async with aio.lease("analyst", socket=daemon.path) as own:
            assert own.granted

    with FakeDaemon(tmp_path) as daemon:
        run(scenario)
        assert daemon.ops() == ["lease", "release"] * 4
        assert daemon.requests[0]["min_memory_mb"] == 2_048


def test_a_lease_of_its_own_closes_its_connection_at_its_end(run: Run, tmp_path: Path) -> None:
    async def scenario() -> None:
        lease = await aio.lease("analyst", socket=daemon.path)
        await lease.release()
        await asyncio.to_thread(daemon.wait_for_hangup)
        await lease.release()

    with FakeDaemon(tmp_path) as daemon:
        run(scenario)


def test_a_denied_lease_of_its_own_leaves_no_connection(run: Run, tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **denial_fields())
        conn.wait_for_end()

    async def scenario() -> None:
        lease = await aio.lease("analyst", socket=daemon.path)
        assert lease.reason == "INSUFFICIENT_MEMORY"
        await asyncio.to_thread(daemon.wait_for_hangup)

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


def test_many_tasks_each_get_their_own_answers(run: Run, tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        while True:
            requests = [conn.request() for _ in range(10)]
            for request in reversed(requests):
                conn.reply(request, same=request["ours"])

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            replies = await asyncio.gather(*(client.call("echo", ours=n) for n in range(100)))
            assert [reply["same"] for reply in replies] == list(range(100))

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


def test_more_requests_than_the_socket_takes_are_sent_in_time(run: Run, tmp_path: Path) -> None:
    reading = threading.Event()

    def script(conn: Served) -> None:
        reading.wait(20)
        while True:
            request = conn.request()
            conn.reply(request, size=len(request["text"]))

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            calls = [
                asyncio.ensure_future(client.call("x", text="t" * 60_000, timeout_s=20))
                for _ in range(20)
            ]
            await until(lambda: bool(client.link.session.outgoing))
            reading.set()
            assert {reply["size"] for reply in await asyncio.gather(*calls)} == {60_000}

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


def test_a_refusal_is_raised_and_the_connection_stays(run: Run, tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.refuse(conn.request(), "not_found", "no GPU 9")
        conn.reply(conn.request())
        conn.wait_for_end()

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            with pytest.raises(RequestError, match="not_found"):
                await client.call("cordon", gpu=9)
            await client.call("health")

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


def test_events_come_in_order_and_end_with_the_connection(run: Run, tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("subscribe"), subscription=1, seq=0)
        for seq in range(1, 51):
            conn.send(event="lease.granted", subscription=1, seq=seq, time=0.0)

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            events = client.events(["lease.*"])
            assert [(await anext(events))["seq"] for _ in range(50)] == list(range(1, 51))
            with pytest.raises(Unavailable):
                await anext(events)
            assert client.closed

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


def test_handlers_and_renewals_run_on_the_loop(run: Run, tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        now = 1_000.0
        conn.reply(conn.expect("lease"), **grant_fields(timestamp=now, expires_at=now + 0.3))
        for _ in range(3):
            now += 0.1
            conn.reply(conn.expect("renew"), expires_at=now + 0.3)
        conn.event("lease.revoked", lease_id="L1", reason="admin")
        conn.wait_for_end()

    events: list[str] = []
    threads: set[int] = set()

    def handler(event: dict[str, Any]) -> None:
        events.append(event["event"])
        threads.add(threading.get_ident())

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            lease = await client.lease("analyst", on_event=handler)
            await until(lambda: bool(events))
            assert lease.ended == "revoked: admin"
            assert threads == {threading.get_ident()}

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)
    assert events == ["lease.revoked"]


@pytest.mark.parametrize("use", ["timeout", "wait_for", "task group"])
def test_a_wait_that_is_cancelled_from_outside_is_cancelled_at_the_daemon(
    run: Run, tmp_path: Path, use: str
) -> None:
    def script(conn: Served) -> None:
        waiting = conn.expect("lease")
        cancel = conn.expect("cancel")
        assert cancel["request_id"] == waiting["id"]
        conn.reply(cancel, cancelled=True)
        conn.reply(waiting, **denial_fields("CANCELLED"))
        conn.reply(conn.expect("health"))
        conn.wait_for_end()

    async def ask(client: aio.AsyncClient) -> None:
        async with client.lease("analyst", wait_s=600):
            pytest.fail("granted by nobody")

    async def fail() -> None:
        await asyncio.to_thread(daemon.wait_for_op, "lease")
        raise LookupError

    async def in_a_group(client: aio.AsyncClient) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(client))
            group.create_task(fail())

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            ways: dict[str, Callable[[], Awaitable[None]]] = {
                "timeout": lambda: _timeout(0.1, ask(client)),
                "wait_for": lambda: asyncio.wait_for(ask(client), 0.1),
                "task group": lambda: in_a_group(client),
            }
            with pytest.raises((TimeoutError, ExceptionGroup)):
                await ways[use]()
            await client.call("health")
            assert not client.link.session.expects_input

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


async def _timeout(seconds: float, work: Awaitable[None]) -> None:
    async with asyncio.timeout(seconds):
        await work


def test_closing_a_client_ends_the_tasks_inside_it(run: Run, tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.wait_for_end()

    async def scenario() -> None:
        client = await aio.connect(daemon.path)
        waiting = asyncio.ensure_future(client.lease("analyst", wait_s=600))
        await asyncio.to_thread(daemon.wait_for_op, "lease")
        client.close()
        assert (await waiting).reason == "CLOSED"
        client.close()

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


def test_closing_a_client_whose_requests_are_not_all_sent_says_so_to_each(
    run: Run, tmp_path: Path
) -> None:
    def deaf(conn: Served) -> None:
        closed.wait(20)

    async def scenario() -> None:
        client = await aio.connect(daemon.path)
        asked = [
            asyncio.create_task(client.call("explain", agent="a", purpose="x" * 60_000))
            for _ in range(8)
        ]
        await until(lambda: client.link._writing)
        client.close()
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
            assert outcome.reason == "CLOSED"
        closed.set()

    closed = threading.Event()
    with FakeDaemon(tmp_path, deaf) as daemon:
        run(scenario)
