"""What the service manager hears of a daemon: on a real datagram socket, of a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gpuorchd import supervised
from gpuorchd.core.events import DevicesLost
from gpuorchd.host.notify import Notifier
from gpuorchd.supervised import Supervised, status_line
from tests.support.observed import ObservedEngine
from tests.support.passing_manager import Ear

SOON_S = 0.02


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[Ear]:
    with Ear(tmp_path / "n") as made:
        yield made


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "STATUS_PERIOD_S", SOON_S)
    monkeypatch.setattr(supervised, "AGAIN_S", SOON_S)


@pytest.fixture
def engine() -> ObservedEngine:
    return ObservedEngine()


@pytest.fixture
async def told(ear: Ear, engine: ObservedEngine, soon: None) -> AsyncIterator[Supervised]:
    notifier = Notifier({"NOTIFY_SOCKET": str(ear.path)})
    made = Supervised(notifier, engine, asyncio.get_running_loop())
    yield made
    made.stop()
    notifier.close()


async def hear(ear: Ear) -> str:
    return await asyncio.to_thread(ear.hear)


async def test_ready_comes_first_and_then_how_it_goes(told: Supervised, ear: Ear) -> None:
    told.start()
    assert await hear(ear) == "READY=1"
    assert await hear(ear) == "STATUS=2 GPUs (0 of 163840 MiB leased), 0 leases, 0 waiting"


async def test_the_first_line_waits_for_the_gpus_and_then_for_nothing(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ObservedEngine(cards=0)
    notifier = Notifier({"NOTIFY_SOCKET": str(ear.path)})
    told = Supervised(notifier, engine, asyncio.get_running_loop())
    told.start()
    assert await hear(ear) == "READY=1"
    engine.submit(DevicesLost("no driver"))
    assert await hear(ear) == "STATUS=no GPU (no driver), 0 leases, 0 waiting"
    told.stop()
    notifier.close()


async def test_where_the_gpus_are_long_in_coming_that_is_told(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "STATUS_PERIOD_S", SOON_S)
    notifier = Notifier({"NOTIFY_SOCKET": str(ear.path)})
    told = Supervised(notifier, ObservedEngine(cards=0), asyncio.get_running_loop())
    told.start()
    assert await hear(ear) == "READY=1"
    assert await hear(ear) == "STATUS=looking for GPUs, 0 leases, 0 waiting"
    told.stop()
    notifier.close()


async def test_a_change_is_told_once_and_what_is_the_same_is_not(
    told: Supervised, ear: Ear, engine: ObservedEngine
) -> None:
    told.start()
    await hear(ear)
    await hear(ear)
    # A turn that changes nothing people see, looked at and not told.
    engine.pass_s(0.1)
    await asyncio.sleep(3 * SOON_S)
    engine.ask("analyst", 1_000)
    engine.ask("scout", 500)
    assert await hear(ear) == "STATUS=2 GPUs (1500 of 163840 MiB leased), 2 leases, 0 waiting"


async def test_changes_of_one_period_are_told_together(
    told: Supervised, ear: Ear, engine: ObservedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told.start()
    await hear(ear)
    await hear(ear)
    monkeypatch.setattr(supervised, "STATUS_PERIOD_S", 0.2)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for _ in range(5):
        engine.ask("analyst", 100)
        await asyncio.sleep(0.01)
    assert "5 leases" in await hear(ear)
    assert loop.time() - began_s >= 0.2


async def test_a_remark_stands_behind_the_line_while_it_lasts(told: Supervised, ear: Ear) -> None:
    remarks = ["GPUORCH_LOG_LEVEL is 'x': runs on the last good configuration"]
    told.add_remark(lambda: remarks[0] if remarks else None)
    told.start()
    await hear(ear)
    assert (await hear(ear)).endswith("0 waiting; " + remarks[0])
    remarks.clear()
    told.refresh()
    assert (await hear(ear)).endswith("0 waiting")


async def test_a_reload_begins_and_ends_for_the_service_manager(told: Supervised, ear: Ear) -> None:
    told.start()
    await hear(ear)
    await hear(ear)
    told.tell_reloading()
    told.tell_reloaded()
    assert (await hear(ear)).startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert await hear(ear) == "READY=1"


async def test_ready_is_said_again_until_it_is_taken(
    tmp_path: Path, engine: ObservedEngine, soon: None
) -> None:
    path = tmp_path / "late"
    notifier = Notifier({"NOTIFY_SOCKET": str(path)})
    told = Supervised(notifier, engine, asyncio.get_running_loop())
    told.start()
    await asyncio.sleep(2 * SOON_S)
    with Ear(path) as ear:
        heard = {await hear(ear), await hear(ear)}
    told.stop()
    notifier.close()
    assert "READY=1" in heard
    assert any(line.startswith("STATUS=2 GPUs") for line in heard)


async def test_the_watchdog_is_fed_three_times_a_period_by_turns_of_the_engine(
    ear: Ear, engine: ObservedEngine
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(ear.path), "WATCHDOG_USEC": "60000"})
    told = Supervised(notifier, engine, asyncio.get_running_loop())
    loop = asyncio.get_running_loop()
    began_s, turns = loop.time(), engine.turns
    told.start()
    fed = 0
    while fed < 6:
        fed += await hear(ear) == "WATCHDOG=1"
    told.stop()
    notifier.close()
    assert engine.turns >= turns + fed
    # The first at once, then one each third of the period.
    assert loop.time() - began_s >= (fed - 1) * 0.02


async def test_an_engine_that_completes_no_turn_feeds_no_watchdog(
    ear: Ear, engine: ObservedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(ear.path), "WATCHDOG_USEC": "30000"})
    told = Supervised(notifier, engine, asyncio.get_running_loop())
    asked = asyncio.Event()
    # What a handler that never returns to the turn's end comes to.
    monkeypatch.setattr(engine, "submit", lambda event: asked.set())
    told.start()
    await asyncio.sleep(0.1)
    await asked.wait()
    told.tell_stopping()
    heard = await asyncio.to_thread(ear.hear_until, "STOPPING=1")
    told.stop()
    notifier.close()
    assert "WATCHDOG=1" not in heard


async def test_without_a_service_manager_nothing_is_registered_or_timed(
    engine: ObservedEngine,
) -> None:
    told = Supervised(Notifier({}), engine, asyncio.get_running_loop())
    told.start()
    told.refresh()
    told.tell_stopping()
    assert told._status_timer is None
    told.stop()


def test_the_line_says_what_holds_leases_up() -> None:
    assert status_line(ObservedEngine(cards=0).state).startswith("looking for GPUs, 0 leases")
    lost = ObservedEngine(cards=0)
    lost.submit(DevicesLost("no driver"))
    assert status_line(lost.state) == "no GPU (no driver), 0 leases, 0 waiting"
    safe = ObservedEngine()
    safe.state.safe_mode = True
    assert status_line(safe.state) == "SAFE_MODE: no GPU is granted, 0 leases, 0 waiting"


def test_the_line_counts_who_waits_and_what_drains() -> None:
    engine = ObservedEngine(cards=1, total_mb=1_000)
    first = engine.ask("analyst", 1_000)
    engine.ask("scout", 1_000, wait_s=60)
    assert status_line(engine.state) == "1 GPU (1000 of 1000 MiB leased), 1 lease, 1 waiting"
    engine.release(first)
    assert (
        status_line(engine.state) == "1 GPU (0 of 1000 MiB leased), 0 leases, 1 draining, 1 waiting"
    )
