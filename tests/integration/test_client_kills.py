"""Many clients, and a daemon that is killed again and again at any moment."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import libclient
from libclient import aio
from tests.support.restarting import RestartingDaemon

KILLS = int(os.environ.get("GPUORCH_TEST_KILLS", "150"))
SEED = int(os.environ.get("GPUORCH_TEST_SEED", "5"))


def kill_often(daemon: RestartingDaemon, keep: bool | None) -> None:
    """Kill it; where `keep` is None, sometimes with and sometimes without the connections."""
    chance = random.Random(SEED)
    for _ in range(KILLS):
        daemon.kill(keep=chance.random() < 0.5 if keep is None else keep)
        # So that no client is refused for good, which is another promise.
        daemon.wait_until_served(chance.randrange(1, 30))


ways = pytest.mark.parametrize(
    "keep", [True, False, None], ids=["connections kept", "connections lost", "either"]
)


@ways
def test_threads_hold_and_ask_through_kills_and_lose_nothing(
    tmp_path: Path, keep: bool | None
) -> None:
    over = threading.Event()

    def take_and_give_back(client: libclient.Client) -> int:
        count = 0
        while not over.is_set():
            lease = client.lease("asks", wait_s=10)
            assert lease.live, lease.detail
            client.call("health")
            assert lease.live, lease.ended
            lease.release()
            assert lease.ended == "released"
            count += 1
        return count

    with RestartingDaemon(tmp_path, SEED) as daemon, ThreadPoolExecutor(6) as pool:
        shared, own = libclient.connect(daemon.path), libclient.connect(daemon.path)
        held = [libclient.lease("holds", socket=daemon.path) for _ in range(4)]
        held.append(shared.lease("holds beside others"))
        tokens = [lease.token for lease in held]
        asking = [pool.submit(take_and_give_back, client) for client in [shared] * 4 + [own]]
        try:
            kill_often(daemon, keep)
        finally:
            over.set()
        assert all(one.result(30) > 0 for one in asking)
        daemon.wait_until_settled(set(tokens))
        assert [lease.token for lease in held] == tokens
        for lease in held:
            assert lease.live, lease.ended
            lease.release()
        for client in (shared, own):
            client.close()
        daemon.wait_until_settled(set())
        if keep:
            assert daemon.answered_before > 0, "nothing was answered twice: the test is too tame"


@ways
def test_tasks_hold_and_ask_through_kills_and_lose_nothing(
    tmp_path: Path, keep: bool | None
) -> None:
    over = threading.Event()

    async def take_and_give_back(client: aio.AsyncClient) -> int:
        count = 0
        while not over.is_set():
            lease = await client.lease("asks", wait_s=10)
            assert lease.live, lease.detail
            await client.call("health")
            assert lease.live, lease.ended
            await lease.release()
            count += 1
        return count

    async def give_up_often(client: aio.AsyncClient) -> int:
        count = 0
        while not over.is_set():
            task = asyncio.ensure_future(client.lease("gives up", wait_s=10))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.call("health")
            count += 1
        return count

    async def scenario(kill: Callable[[], None]) -> None:
        async with aio.connect(daemon.path) as client, aio.connect(daemon.path) as other:
            held = await client.lease("holds")
            asking = [
                asyncio.ensure_future(work)
                for work in (
                    take_and_give_back(client),
                    take_and_give_back(client),
                    take_and_give_back(other),
                    give_up_often(client),
                )
            ]
            try:
                await asyncio.to_thread(kill)
            finally:
                over.set()
            counts = await asyncio.wait_for(asyncio.gather(*asking), 30)
            assert all(counts)
            await asyncio.to_thread(daemon.wait_until_settled, {held.token})
            assert held.live
            await held.release()

    with RestartingDaemon(tmp_path, SEED) as daemon:
        asyncio.run(scenario(lambda: kill_often(daemon, keep)))
        daemon.wait_until_settled(set())
