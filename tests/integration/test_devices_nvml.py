"""What is read of the cards through the probe, and what the core is told of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from gpuorchd.core.events import DevicesFound, DevicesLost, ReadingsTaken
from gpuorchd.core.model import Device, DeviceFacts, DeviceUuid, ProcessKey
from gpuorchd.devices import nvml
from gpuorchd.devices.nvml import NvmlDevices, ProbeOptions
from gpuorchd.devices.proc_facts import Family, read_stat
from gpuorchd.devices.telemetry import Telemetry
from tests.support.fake_cards import MIB, FakeCards, card, uuid_of
from tests.support.opened_sources import Open, failed, good, opened_sources
from tests.support.recording_engine import RecordingEngine
from tests.support.sources import ROOT

opened = pytest.fixture(opened_sources)


async def test_cards_are_found_and_read(tmp_path: Path, opened: Open) -> None:
    me = os.getpid()
    cards = FakeCards(
        tmp_path,
        card(
            0,
            reserved=100 * MIB,
            used=3_000 * MIB + 1,
            processes=[{"pid": me, "used": 1_000 * MIB + 1}, {"pid": 4_194_300, "used": None}],
            graphics=[{"pid": me, "used": 900 * MIB}],
            mps=[{"pid": os.getppid(), "used": 5 * MIB}],
        ),
        card(1, 81_920),
    )
    source, engine = opened(cards)
    before_ns = engine.now_ns()
    taken = await engine.first(ReadingsTaken)
    (found,) = engine.of(DevicesFound)
    assert [(d.uuid, d.index, d.name, d.total_mb, d.reserved_mb) for d in found.devices] == [
        (uuid_of(0), 0, "Fake 0", 24_576, 100),
        (uuid_of(1), 1, "Fake 1", 81_920, 0),
    ]
    assert 0 < before_ns - taken.started_ns < 10**9
    assert taken.started_ns <= engine.now_ns()
    assert taken.failures == ()
    first, second = taken.readings
    assert (first.free_mb, first.used_mb) == (24_576 - 3_000 - 100 - 1, 3_001)
    assert (second.free_mb, second.used_mb, second.processes) == (81_920, 0, ())
    mine, absent, parent = first.processes
    own = read_stat(me)
    assert own is not None
    assert mine.process == ProcessKey(me, own.start_ticks)
    assert mine.used_mb == 1_001
    assert list(mine.ancestors) == Family().ancestors(me)
    assert (absent.process, absent.used_mb) == (ProcessKey(4_194_300, 0), None)
    assert (parent.process.pid, parent.used_mb) == (os.getppid(), 5)
    status = source.status()
    assert (status.nvml_supported, status.nvml_enriched, status.message) == (True, True, None)
    assert status.sampled_ns == taken.started_ns
    assert source.telemetry()[first.uuid] == Telemetry(37, 12, 41, 71.5)
    assert source.checks()[:2] == (False, True)


async def test_the_smaller_free_memory_around_the_list_counts(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(
        tmp_path, card(0, 1_000, later_free=300 * MIB), card(1, 1_000, free=0, later_free=300 * MIB)
    )
    _, engine = opened(cards)
    taken = await engine.first(ReadingsTaken)
    assert [reading.free_mb for reading in taken.readings] == [300, 0]


async def test_a_value_for_people_that_cannot_be_read_is_missing_and_fails_nothing(
    tmp_path: Path, opened: Open
) -> None:
    cards = FakeCards(
        tmp_path,
        card(0, errors={"nvmlDeviceGetPowerUsage": 3, "nvmlDeviceGetUtilizationRates": 999}),
    )
    source, engine = opened(cards)
    taken = await engine.first(ReadingsTaken)
    assert good(taken)
    assert source.telemetry()[taken.readings[0].uuid] == Telemetry(None, None, 41, None)
    calls = source.call_stats()
    assert (calls["power"].failures, calls["temperature"].failures) == (1, 0)
    assert sum(calls["memory"].counts) == 2
    assert sum(calls["sample"].counts) == 1
    assert calls["sample"].sum_ns > 0


async def test_without_enrichment_only_memory_and_processes_are_read(
    tmp_path: Path, opened: Open
) -> None:
    source, engine = opened(FakeCards(tmp_path, card()), telemetry=False)
    await engine.first(ReadingsTaken)
    assert source.telemetry() == {}
    assert (source.status().nvml_supported, source.status().nvml_enriched) == (True, False)
    assert set(source.call_stats()) == {
        "init", "count", "handle", "uuid", "name", "memory", "compute_processes",
        "graphics_processes", "mps_processes", "sample",
    }  # fmt: skip


async def test_an_older_driver_is_read_by_its_older_calls(tmp_path: Path, opened: Open) -> None:
    missing = dict.fromkeys(
        (
            "nvmlDeviceGetMemoryInfo_v2",
            "nvmlDeviceGetComputeRunningProcesses_v3",
            "nvmlDeviceGetGraphicsRunningProcesses_v3",
            "nvmlDeviceGetMPSComputeRunningProcesses_v3",
            "nvmlDeviceGetMPSComputeRunningProcesses_v2",
        ),
        13,
    )
    processes = [{"pid": os.getpid(), "used": 7 * MIB}]
    cards = FakeCards(tmp_path, card(0, 1_000, used=10 * MIB, processes=processes), errors=missing)
    _, engine = opened(cards)
    taken = await engine.first(ReadingsTaken)
    assert [use.used_mb for use in taken.readings[0].processes] == [7]
    assert engine.of(DevicesFound)[0].devices[0].reserved_mb == 0
    assert (taken.readings[0].free_mb, taken.readings[0].used_mb) == (990, 10)


async def test_a_card_whose_processes_cannot_be_listed_is_unknown(
    tmp_path: Path, opened: Open
) -> None:
    cards = FakeCards(tmp_path, card(0), card(1))
    source, engine = opened(cards, period_s=0.02)
    await engine.first(ReadingsTaken, good)
    cards.show(card(0, errors={"nvmlDeviceGetComputeRunningProcesses_v3": 15}), card(1))
    taken = await engine.first(ReadingsTaken, lambda taken: bool(taken.failures))
    assert taken.failures == ((uuid_of(0), "GPU is lost"),)
    assert [reading.uuid for reading in taken.readings] == [uuid_of(1)]
    assert uuid_of(0) not in source.telemetry()
    cards.show(card(0), card(1))
    await engine.first(ReadingsTaken, lambda taken: not taken.failures, len(engine.events))
    assert len(engine.of(DevicesFound)) == 1


async def test_absurd_values_are_a_failed_reading(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(tmp_path, card(0))
    _, engine = opened(cards, period_s=0.02)
    await engine.first(ReadingsTaken, good)
    cards.show(card(0, 1_000, free=2_000 * MIB))
    taken = await engine.first(ReadingsTaken, failed)
    assert "free" in taken.failures[0][1]


async def test_a_changed_set_of_cards_is_told(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(tmp_path, card(0), card(1))
    _, engine = opened(cards, period_s=0.02)
    await engine.first(ReadingsTaken, good)
    cards.show(card(0))
    found = await engine.first(DevicesFound, lambda found: len(found.devices) == 1)
    assert found.devices[0].uuid == uuid_of(0)
    cards.show(card(0), card(1))
    await engine.first(DevicesFound, lambda found: len(found.devices) == 2, len(engine.events))


async def test_a_reading_that_is_wished_for_starts_after_the_wish(
    tmp_path: Path, opened: Open
) -> None:
    source, engine = opened(FakeCards(tmp_path, card()), period_s=3_600)
    await engine.first(ReadingsTaken)
    for _ in range(3):
        wished_ns = engine.now_ns()
        source.take_reading()
        taken = await engine.first(ReadingsTaken, after=len(engine.events))
        assert taken.started_ns >= wished_ns


async def test_wishes_that_come_together_make_few_readings(tmp_path: Path, opened: Open) -> None:
    source, engine = opened(FakeCards(tmp_path, card()), period_s=3_600)
    await engine.first(ReadingsTaken)
    for _ in range(1_000):
        source.take_reading()
    wished_ns = engine.now_ns()
    await engine.first(ReadingsTaken, lambda taken: taken.started_ns >= wished_ns)
    assert len(engine.of(ReadingsTaken)) <= 3


async def test_a_driver_that_is_not_there_is_looked_for_again(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(tmp_path, errors={"nvmlInit": 12})
    source, engine = opened(cards, retry_s=0.05)
    lost = await engine.first(DevicesLost)
    assert lost.reason == "NVML Shared Library Not Found"
    status = source.status()
    assert (status.nvml_supported, status.nvml_init_error) == (False, lost.reason)
    assert status.message == lost.reason
    checks = source.checks()
    assert (checks.first_probe_running, checks.answering) == (False, True)
    cards.show(card())
    await engine.first(ReadingsTaken, good)
    assert len(engine.of(DevicesLost)) == 1, "the same absence is told once"
    assert source.status().nvml_init_error is None


async def test_a_driver_without_a_gpu_is_no_error(tmp_path: Path, opened: Open) -> None:
    source, engine = opened(FakeCards(tmp_path), retry_s=3_600)
    lost = await engine.first(DevicesLost)
    assert lost.reason == nvml.NO_GPU_SHOWN
    status = source.status()
    assert (status.nvml_supported, status.nvml_init_error) == (True, None)
    assert source.checks().answering


async def test_a_binding_that_is_not_installed_is_an_answer(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(tmp_path, card())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pynvml.py").write_text("raise ImportError('no such binding')\n")
    environment = {**cards.environment, "PYTHONPATH": f"{broken}:{ROOT}"}
    engine = RecordingEngine()
    options = ProbeOptions(environment=environment)
    source = NvmlDevices(engine, asyncio.get_running_loop(), options)
    source.open()
    assert (await engine.first(DevicesLost)).reason == "no such binding"
    await source.stop()


async def test_readings_come_faster_while_somebody_waits(tmp_path: Path, opened: Open) -> None:
    _, engine = opened(FakeCards(tmp_path, card()), period_s=3_600, hurried_period_s=0.02)
    await engine.first(ReadingsTaken)
    assert len(engine.of(ReadingsTaken)) == 1
    source, hurried = opened(FakeCards(tmp_path, card()), period_s=3_600, hurried_period_s=0.02)
    hurried.state.order = (Device(DeviceFacts(DeviceUuid("GPU-x"), 0, "x", 1_000), draining_mb=1),)
    await hurried.first(ReadingsTaken, lambda _taken: len(hurried.of(ReadingsTaken)) >= 5)
    assert sum(source.call_stats()["power"].counts) == 1, "people are not in such a hurry"
