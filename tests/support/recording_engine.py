"""An engine that decides nothing: it keeps the events that it is given, for tests of sources."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from gpuorchd.core.events import Event
from gpuorchd.core.machine import Machine
from gpuorchd.core.state import Settings, State

E = TypeVar("E")

# Generous: the machine may be busy with other tests.
DEADLINE_S = 20.0


class RecordingEngine:
    """Keeps every event in `events`. `react` is called with each, as effects would be."""

    def __init__(self, react: Callable[[Event], None] | None = None) -> None:
        self.events: list[Event] = []
        self.actors: dict[type, Callable[[Any], None]] = {}
        # A machine's empty state: nobody waits.
        self.state: State = Machine(Settings(epoch="recorded")).state
        self._react = react
        self._news = asyncio.Event()

    def submit(self, event: Event) -> None:
        """Keep an event."""
        self.events.append(event)
        self._news.set()
        if self._react is not None:
            self._react(event)

    def now_ns(self) -> int:
        """The monotonic clock."""
        return time.monotonic_ns()

    def on(self, kind: type[Any], actor: Callable[[Any], None]) -> None:
        """Keep who carries out an effect."""
        self.actors[kind] = actor

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    async def first(
        self, kind: type[E], fits: Callable[[E], bool] = lambda _event: True, after: int = 0
    ) -> E:
        """Wait for the first event of a kind that fits, leaving out the first `after` events."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for event in self.events[after:]:
                    if isinstance(event, kind) and fits(event):
                        return event
                self._news.clear()
                await self._news.wait()
