"""Leases whose object nobody keeps: one of its own ends at once, a client's with its client."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import libclient
from libclient import aio
from tests.support.proxy import FakeDaemon
from tests.support.sources import ROOT


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """What is asserted here does not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


said = pytest.mark.filterwarnings("ignore::ResourceWarning")


@said
def test_a_lease_of_its_own_that_is_dropped_is_given_back_at_once(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        lease = libclient.lease("analyst", socket=daemon.path)
        assert lease.live
        del lease
        daemon.wait_for_hangup(2.0)


def test_a_lease_of_its_own_that_is_dropped_is_warned_of(tmp_path: Path) -> None:
    code = (
        "import libclient, sys\n"
        "lease = libclient.lease('analyst', socket=sys.argv[1])\n"
        "assert lease.live\n"
        "del lease\n"
        "sys.stdin.read()\n"
    )
    with FakeDaemon(tmp_path) as daemon:
        with subprocess.Popen(
            [sys.executable, "-W", "default", "-c", code, daemon.path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            daemon.wait_for_hangup()
            _, said = child.communicate()
        assert b"ResourceWarning: unclosed" in said


def test_a_clients_lease_lives_as_long_as_its_client(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, libclient.connect(daemon.path) as client:
        token = client.lease("analyst").token
        gc.collect()
        assert client.call("health") == {}
        assert daemon.ops() == ["lease", "health"]
        assert token is not None
        client.release(token)
        assert daemon.ops() == ["lease", "health", "release"]


@said
def test_a_client_that_is_dropped_gives_its_leases_back_with_the_last_of_them(
    tmp_path: Path,
) -> None:
    with FakeDaemon(tmp_path) as daemon:
        client = libclient.connect(daemon.path)
        kept, dropped = client.lease("a"), client.lease("b")
        del client, dropped
        with pytest.raises(AssertionError, match="the client to close"):
            daemon.wait_for_hangup(0.1)
        assert kept.live
        del kept
        daemon.wait_for_hangup(2.0)


def test_an_async_lease_of_its_own_that_is_dropped_is_given_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        lease = await aio.lease("analyst", socket=daemon.path)
        assert lease.live
        with pytest.warns(ResourceWarning, match="unclosed"):
            del lease
        async with asyncio.timeout(20):
            await asyncio.to_thread(daemon.wait_for_hangup, 2.0)

    with FakeDaemon(tmp_path) as daemon:
        asyncio.run(scenario())


def test_an_async_client_that_is_dropped_with_its_loop_is_closed(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:

        async def scenario() -> aio.AsyncLease:
            return await aio.lease("analyst", socket=daemon.path)

        lease = asyncio.run(scenario())
        with pytest.warns(ResourceWarning, match="unclosed"):
            del lease
        daemon.wait_for_hangup(2.0)


def test_the_events_of_a_dropped_async_client_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        client = await aio.connect(daemon.path)
        stream = client.events()
        fd = client.fileno()
        del client
        await asyncio.sleep(0)
        # Still there: it was closed in the loop's next turn otherwise.
        assert stream._link.sock.fileno() == fd
        stream._link.close()

    with FakeDaemon(tmp_path) as daemon:
        asyncio.run(scenario())
