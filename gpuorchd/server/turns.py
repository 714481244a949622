"""Whose turn it is: the loop's time is shared out among connections that have more to be taken.

A connection takes what it reads at once while a turn of the loop has time left. When it has not, or
the connection has had its share, the rest of its requests waits in line and is taken in the turns
to come, one connection after the other. So what one peer pipelines, or two hundred, holds up
nobody else for longer than a turn.

There are two lines. Views of the state cost what the state is large, and nobody waits for memory
in them: they are taken after everything else in the other line. One of each line is visited in
every turn, however long what came before has taken.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from typing import Final, Protocol

# What requests may take of one turn of the loop, and of that one connection at a time.
TURN_NS: Final = 4_000_000
SHARE_NS: Final = 1_000_000


class Taker(Protocol):
    """A connection, as the line sees it."""

    @property
    def wants_view(self) -> bool:
        """Whether the next of its requests is for a view."""

    def take_turn(self, until_ns: int) -> None:
        """Take requests until then, one at least; line up again for the rest."""


class Turns:
    """The lines, and what is left of this turn. Call it on the loop only."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Callable[[], int] = monotonic_ns
    ) -> None:
        self._loop = loop
        self.clock = clock
        self._spent_ns = 0
        self._line: deque[Taker] = deque()
        self._views: deque[Taker] = deque()
        self._next: asyncio.Handle | None = None

    def share(self, now_ns: int) -> int:
        """Say until when who has just read may take requests: 0 where others have to come first."""
        if self._spent_ns >= TURN_NS or self._line or self._views:
            return 0
        return now_ns + SHARE_NS

    def spend(self, since_ns: int) -> None:
        """Count the time since then as spent in this turn."""
        self._spent_ns += self.clock() - since_ns
        self._go_on_soon()

    def line_up(self, taker: Taker) -> None:
        """Put a connection at the end of its line, in which it is not yet."""
        (self._views if taker.wants_view else self._line).append(taker)
        self._go_on_soon()

    def close(self) -> None:
        """Visit nobody any more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self._line.clear()
        self._views.clear()

    def _go_on_soon(self) -> None:
        if self._next is None:
            self._next = self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Use what is left of this turn; the next one begins after it."""
        self._next = None
        for line in (self._line, self._views):
            # Who lines up again is behind these.
            for _ in range(len(line)):
                now_ns = self.clock()
                line.popleft().take_turn(now_ns + SHARE_NS)
                self._spent_ns += self.clock() - now_ns
                if self._spent_ns >= TURN_NS:
                    break
        self._spent_ns = 0
        if self._line or self._views:
            self._go_on_soon()
