"""The engine: sole owner of the machine. Events in, effects out, and the next deadline kept.

`submit` hands one event to the machine and carries out its effects before it returns, so an
answer leaves in the turn in which its request came. An event that arises while effects are being
carried out waits its turn in a queue: decisions never nest. Each room registers for the effects
that it carries out with `on`; a room that must do something once all effects of a turn are
carried out (send what has gathered) registers with `at_turn_end`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from gpuorchd.core.effects import Effect
from gpuorchd.core.events import Event, TimePassed
from gpuorchd.core.machine import Machine
from gpuorchd.core.state import State

E = TypeVar("E", bound=Effect)

NS_PER_MS = 1_000_000


class TurnFailedError(Exception):
    """A bug: a turn could not be carried out whole."""


class Engine:
    """Run a `Machine` on an event loop. Not thread-safe: call it on the loop only."""

    def __init__(
        self,
        machine: Machine,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], int] = time.monotonic_ns,
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._machine = machine
        self._loop = loop
        self._clock = clock
        self._wall_clock = wall_clock
        self._waiting: deque[Event] = deque()
        self._running = False
        self._actors: dict[type, tuple[Callable[[Any], None], ...]] = {}
        self._turn_end: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        # Turns completed. A watchdog feeds on its progress; log lines carry it as their cause.
        self.turns = 0

    @property
    def state(self) -> State:
        """The state, to be read and never changed."""
        return self._machine.state

    @property
    def machine(self) -> Machine:
        """The machine, for its questions (`explain`), which change nothing."""
        return self._machine

    def now_ns(self) -> int:
        """The clock that every time in the state is measured by."""
        return self._clock()

    def on(self, kind: type[E], actor: Callable[[E], None]) -> None:
        """Let `actor` carry out every effect of `kind`, after those registered before it."""
        self._actors[kind] = (*self._actors.get(kind, ()), actor)

    def at_turn_end(self, actor: Callable[[], None]) -> None:
        """Call `actor` when all effects of a turn have been carried out."""
        self._turn_end.append(actor)

    def submit(self, event: Event) -> None:
        """Handle an event now, or after the one that is being handled."""
        if self._running:
            self._waiting.append(event)
            return
        self._running = True
        try:
            self._handle(event)
            while self._waiting:
                self._handle(self._waiting.popleft())
        except OSError as error:
            # What the outside can do is the actor's to expect. Raised through a timer, this would
            # pass for a socket's failure, which ends nothing, with the turn's effects half done.
            name = type(event).__name__
            raise TurnFailedError(f"an effect of {name} was not carried out") from error
        finally:
            self._running = False
        for actor in self._turn_end:
            actor()
        self.turns += 1
        self._set_timer()

    def close(self) -> None:
        """Drop the timer. Nothing is handled afterwards by itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _handle(self, event: Event) -> None:
        actors = self._actors
        for effect in self._machine.handle(event, self._clock(), self._wall_clock()):
            for actor in actors[type(effect)]:
                actor(effect)

    def _set_timer(self) -> None:
        due_ns = self._machine.next_deadline_ns()
        if due_ns is None:
            # An armed timer that is no longer wanted fires once and finds nothing due.
            return
        if self._timer is not None:
            if self._timer_ns <= due_ns:
                return
            self._timer.cancel()
        self._timer_ns = due_ns
        # The loop counts in milliseconds. Rounded up, deadlines that lie close share a turn; to
        # the nearest, a timer would fire early and be set again until its deadline has come.
        delay_ms = -((self._clock() - due_ns) // NS_PER_MS)
        self._timer = self._loop.call_later(max(0, delay_ms) / 1_000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.submit(TimePassed())
