"""Sources of NVML devices on fake cards, opened for one test and stopped after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from gpuorchd.core.events import ReadingsTaken
from gpuorchd.devices.nvml import NvmlDevices, ProbeOptions
from gpuorchd.devices.proc_facts import read_stat
from tests.support.fake_cards import FakeCards
from tests.support.recording_engine import DEADLINE_S, RecordingEngine

Open = Callable[..., tuple[NvmlDevices, RecordingEngine]]

LOOK_AGAIN_S = 0.005


async def opened_sources() -> AsyncIterator[Open]:
    """Open a source on fake cards, with `ProbeOptions` by name; for use as a fixture."""
    sources: list[NvmlDevices] = []

    def start(cards: FakeCards, **options: Any) -> tuple[NvmlDevices, RecordingEngine]:
        engine = RecordingEngine()
        chosen = ProbeOptions(environment=cards.environment, **options)
        source = NvmlDevices(engine, asyncio.get_running_loop(), chosen)
        sources.append(source)
        source.open()
        return source, engine

    yield start
    for source in sources:
        await source.stop()


def good(taken: ReadingsTaken) -> bool:
    """Whether something could be read."""
    return bool(taken.readings)


def failed(taken: ReadingsTaken) -> bool:
    """Whether nothing could be read."""
    return bool(taken.failures) and not taken.readings


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what no descriptor announces."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # conditions are the kernel's: no event tells them
            await asyncio.sleep(LOOK_AGAIN_S)


async def gone(pid: int) -> None:
    """Wait until a process has ended and is reaped."""
    await until(lambda: read_stat(pid) is None)


def has_ended(pid: int) -> bool:
    """Whether a process has ended, reaped or not: it may not be ours to reap."""
    facts = read_stat(pid)
    return facts is None or facts.state in ("Z", "X")
