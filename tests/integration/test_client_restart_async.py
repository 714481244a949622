"""The asyncio client while its daemon is killed, absent, and started again; on both loops."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from libclient import absence, aio
from libclient.errors import Unavailable
from tests.support.proxy import (
    FakeDaemon,
    Served,
    denial_fields,
    grant_everything,
    grant_fields,
)
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


def grants_one(conn: Served) -> None:
    conn.reply(conn.expect("lease"), **grant_fields(1))


def grants_and_stays(conn: Served) -> None:
    """Grant one lease; the connection ends with the daemon, which is not there any more then."""
    grants_one(conn)
    conn.wait_for_end()


def reattaches(conn: Served) -> None:
    request = conn.expect("reattach")
    assert request["token"] == "secret-1"
    conn.reply(request, **grant_fields(1))
    grant_everything(conn, held=1)


def test_restarts_are_not_seen_by_those_who_wait(run: Run, tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        before = [conn.request() for _ in range(5)]
        for number in range(1, 4):
            assert conn.take_over(number) == b""
            assert [conn.request() for _ in range(5)] == before
        for number, request in enumerate(before):
            conn.reply(request, **grant_fields(number))
        for _ in before:
            conn.reply(conn.expect("release"))
        conn.wait_for_end()

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            leases = await asyncio.gather(
                *(client.lease(f"agent {number}", wait_s=60) for number in range(5))
            )
            assert [lease.lease_id for lease in leases] == [f"L{number}" for number in range(5)]
            for lease in leases:
                await lease.release()

    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


def test_a_task_that_is_cancelled_during_a_restart_leaves_nothing_behind(
    run: Run, tmp_path: Path
) -> None:
    def script(conn: Served) -> None:
        waiting = conn.expect("lease")
        conn.take_over(1)
        assert conn.request() == waiting
        asked.set()
        cancel = conn.expect("cancel")
        conn.take_over(2)
        assert [conn.request(), conn.request()] == [waiting, cancel]
        conn.reply(cancel, cancelled=True)
        conn.reply(waiting, **denial_fields("CANCELLED"))
        conn.reply(conn.expect("health"))
        conn.wait_for_end()

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            task = asyncio.ensure_future(client.lease("analyst", wait_s=600))
            await asyncio.to_thread(asked.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await client.call("health")
            assert not client.link.session.expects_input

    asked = threading.Event()
    with FakeDaemon(tmp_path, script) as daemon:
        run(scenario)


def test_a_lease_comes_back_with_nobody_asking(run: Run, tmp_path: Path) -> None:
    events: list[str] = []

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            lease = await client.lease(
                "analyst", on_event=lambda event: events.append(event["event"])
            )
            await until(lambda: bool(events))
            assert events == ["connection.resumed"]
            assert (lease.live, lease.detached) == (True, False)
            await lease.release()

    with FakeDaemon(tmp_path, grants_one, reattaches) as daemon:
        run(scenario)
        assert daemon.ops() == ["lease", "reattach", "release"]


def test_a_lease_lives_while_no_daemon_is_there_and_is_reattached_when_one_is(
    run: Run, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with FakeDaemon(tmp_path, grants_and_stays) as daemon:
            client = await aio.connect(daemon.path)
            lease = await client.lease("analyst")
        await until(lambda: lease.detached)
        away = client.link.session.away
        await until(lambda: away is not None and away.tries >= 8)
        assert lease.live
        assert not client.closed
        with FakeDaemon(tmp_path, reattaches) as daemon:
            waiting = client.lease("other", wait_s=5)
            assert (await waiting).granted
            await until(lambda: not lease.detached)
            client.close()
            await asyncio.to_thread(daemon.wait_for_hangup)
        assert lease.ended == "closed"

    run(scenario)


@pytest.mark.parametrize("code", ["unknown_token", "not_owner"])
def test_a_lease_that_is_not_given_back_is_over_and_the_client_goes_on(
    run: Run, tmp_path: Path, code: str
) -> None:
    def refuses(conn: Served) -> None:
        conn.refuse(conn.expect("reattach"), code)
        grant_everything(conn)

    events: list[str] = []

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            lease = await client.lease(
                "analyst", on_event=lambda event: events.append(event["event"])
            )
            await until(lambda: bool(events))
            assert events == ["connection.lost"]
            assert str(lease.ended).startswith("lost: ")
            await lease.release()
            assert (await client.lease("analyst")).granted

    with FakeDaemon(tmp_path, grants_one, refuses) as daemon:
        run(scenario)
        assert daemon.ops() == ["lease", "reattach", "lease"]


def test_a_task_that_is_cancelled_while_the_daemon_is_away_is_not_asked_for_again(
    run: Run, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with FakeDaemon(tmp_path, grants_and_stays) as daemon:
            client = await aio.connect(daemon.path)
            lease = await client.lease("analyst")
        await until(lambda: lease.detached)
        cancelled = asyncio.ensure_future(client.lease("never", wait_s=600))
        waits = asyncio.ensure_future(client.lease("waits", wait_s=600))
        await until(lambda: len(client.link.session.pending) == 2)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        with FakeDaemon(tmp_path, reattaches) as daemon:
            assert (await waits).granted
            assert daemon.ops() == ["reattach", "lease"]
            assert daemon.requests[1]["agent"] == "waits"
            client.close()

    run(scenario)


def test_a_lease_that_is_released_while_the_daemon_is_away_does_not_come_back(
    run: Run, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with FakeDaemon(tmp_path, grants_and_stays) as daemon:
            client = await aio.connect(daemon.path)
            lease = await client.lease("analyst")
        await until(lambda: lease.detached)
        start_s = time.monotonic()
        await lease.release()
        assert time.monotonic() - start_s < 0.5
        with FakeDaemon(tmp_path) as daemon:
            await client.call("health")
            assert sorted(daemon.ops()) == ["health", "release"]
            client.close()

    run(scenario)


def test_a_client_whose_daemon_went_away_is_answered_by_the_next(run: Run, tmp_path: Path) -> None:
    async def scenario() -> None:
        with FakeDaemon(tmp_path) as daemon:
            client = await aio.connect(daemon.path)
            await client.call("health")
        with FakeDaemon(tmp_path) as daemon:
            assert await client.call("cordon", gpu=0) == {}
            assert daemon.ops() == ["cordon"]
            client.close()

    run(scenario)


@pytest.mark.serial
def test_no_daemon_is_the_cpu_within_two_seconds_and_at_once_when_it_is_long_gone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        with FakeDaemon(tmp_path) as daemon:
            client = await aio.connect(daemon.path)
            await client.call("health")
        await until(lambda: client.closed)
        start_s = time.monotonic()
        assert (await client.lease("analyst")).reason == "NO_DAEMON"
        assert 1.9 < time.monotonic() - start_s < 2.8
        monkeypatch.setattr(absence, "RESTART_S", 0.0)
        start_s = time.monotonic()
        assert (await client.lease("analyst", wait_s=60)).reason == "NO_DAEMON"
        with pytest.raises(Unavailable, match="nobody answers"):
            await client.call("health")
        assert time.monotonic() - start_s < 1
        client.close()

    run(scenario)


def test_a_thousand_lost_connections_leave_no_descriptor_behind(run: Run, tmp_path: Path) -> None:
    def loses(conn: Served) -> None:
        request = conn.expect("reattach")
        conn.reply(request, **grant_fields(1))

    async def scenario() -> None:
        async with aio.connect(daemon.path) as client:
            lease = await client.lease("analyst")
            await until(lambda: daemon.ops().count("reattach") >= 100)
            descriptors = len(os.listdir("/proc/self/fd"))
            await until(lambda: daemon.ops().count("reattach") >= 1_000)
            # Both ends are of this process; the other may be closing a few.
            assert len(os.listdir("/proc/self/fd")) < descriptors + 20
            assert lease.live

    with FakeDaemon(tmp_path, grants_one, *[loses] * 1_001, reattaches) as daemon:
        run(scenario)
