"""The descriptor store: connections that the service manager keeps while no daemon runs.

Owns what is known of the store: which connections are in it, which are on their way, how many fit.
The manager drops in silence what is too much, so the counting is done here. A connection is in the
store when a barrier sent behind it has come back; whoever waits for that is called then, with None,
or with the reason why it is not to be had. One barrier serves all that were sent in one turn.

    keep(number, fd, then) -> FDSTORE ... BARRIER -> the pipe hangs up -> then(None)
    drop(number)           -> FDSTOREREMOVE, at once or as soon as the manager takes it
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final, Protocol

DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
# All names travel in one environment string of at most 131,071 bytes, each with a separator.
NAMES_BYTES_MAX: Final = 120_000
# A manager that takes longer is not waited for: the request is refused, not left open.
BARRIER_S: Final = 2.0
NOT_TAKEN: Final = "the service manager does not take descriptors"
# Descriptors that are on their way at once: the manager's queue is everybody's, and a burst of
# clients must not fill it.
UNDER_WAY_MAX: Final = 256
# What the manager did not take at once is sent again so often.
RETRY_S: Final = 0.01

Then = Callable[[str | None], None]


class Teller(Protocol):
    """How the service manager is told; see `notify`."""

    def send(self, text: str, fds: tuple[int, ...] = ()) -> bool:
        """Send assignments with descriptors; False where they were not taken."""


class DescriptorStore:
    """The connections in the store, by number. Runs on the loop; `close` ends what is under way."""

    def __init__(
        self,
        teller: Teller,
        loop: asyncio.AbstractEventLoop,
        bound: int,
        stored: tuple[int, ...] = (),
    ) -> None:
        """`bound` is how many the manager keeps; `stored` are in it from an earlier daemon."""
        self._teller = teller
        self._loop = loop
        self._bound = bound
        self._stored = set(stored)
        self._names_bytes = sum(len(name_of(number)) + 1 for number in stored)
        # Asked for in this turn: sent with one barrier at its end.
        self._asked: list[tuple[int, int, Then]] = []
        self._batches: set[_Batch] = set()
        # Names to be removed that the manager did not take.
        self._removals: list[str] = []
        self._flush: asyncio.Handle | None = None
        # Since when the manager's queue has had no room, None while it has.
        self._stuck_at: float | None = None

    @property
    def count(self) -> int:
        """How many connections are in the store or on their way."""
        return len(self._stored)

    def full(self) -> str | None:
        """Say which bound is reached, None where one more fits."""
        if len(self._stored) >= self._bound:
            return f"at most {self._bound} connections in the descriptor store"
        if self._names_bytes >= NAMES_BYTES_MAX:
            return f"at most {NAMES_BYTES_MAX} bytes of names in the descriptor store"
        if self._removals:
            # An old one has to leave before a new one is sent, or the count would not hold.
            return "the service manager takes nothing into the descriptor store at the moment"
        return None

    def keep(self, number: int, fd: int, then: Then) -> None:
        """Put a connection into the store; `then` is called once, in a later turn.

        The caller has asked `full` before. `fd` stays the caller's and open until then.
        """
        self._stored.add(number)
        self._names_bytes += len(name_of(number)) + 1
        self._asked.append((number, fd, then))
        if self._flush is None:
            self._flush = self._loop.call_soon(self._send_asked)

    def drop(self, number: int) -> None:
        """Take a connection out of the store; does nothing for one that is not in it."""
        if number not in self._stored:
            return
        self._stored.discard(number)
        name = name_of(number)
        self._names_bytes -= len(name) + 1
        self._asked = [asked for asked in self._asked if asked[0] != number]
        for batch in self._batches:
            batch.waiting.pop(number, None)
        if self._removals or not self._remove(name):
            self._removals.append(name)
            self._retry_removals()

    def close(self) -> None:
        """End what is under way; what is in the store stays there."""
        if self._flush is not None:
            self._flush.cancel()
        for batch in tuple(self._batches):
            batch.end(None, call=False)
        self._batches.clear()

    def _remove(self, name: str) -> bool:
        return self._teller.send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _retry_removals(self) -> None:
        while self._removals and self._remove(self._removals[0]):
            self._removals.pop(0)
        if self._removals and self._flush is None:
            self._flush = self._loop.call_later(RETRY_S, self._send_asked)

    def _send_asked(self) -> None:
        self._flush = None
        self._retry_removals()
        room = UNDER_WAY_MAX - sum(len(batch.waiting) for batch in self._batches)
        asked, self._asked = self._asked[: max(0, room)], self._asked[max(0, room) :]
        if not asked:
            # The next barrier that comes back makes room, or tells that none will be.
            return
        try:
            batch = _Batch(self._loop, self._batches, self._go_on)
        except OSError as error:
            for number, _, then in asked:
                self._fail(number, then, f"no barrier can be made: {error.strerror}")
            return
        sent = 0
        for number, fd, then in asked:
            if not self._teller.send(f"FDSTORE=1\nFDNAME={name_of(number)}", (fd,)):
                break
            batch.waiting[number] = then
            sent += 1
        self._put_off(asked[sent:])
        if batch.waiting:
            self._send_barrier(batch, self._loop.time() + BARRIER_S)
        else:
            batch.end(None, call=False)

    def _put_off(self, rest: list[tuple[int, int, Then]]) -> None:
        """Send later what the manager's queue has no room for, unless it has had none for long."""
        now = self._loop.time()
        if not rest:
            self._stuck_at = None
            return
        self._asked = rest + self._asked
        if self._stuck_at is None:
            self._stuck_at = now
        if now - self._stuck_at < BARRIER_S:
            if self._flush is None:
                self._flush = self._loop.call_later(RETRY_S, self._send_asked)
            return
        self._stuck_at = None
        asked, self._asked = self._asked, []
        for number, _, then in asked:
            self._fail(number, then, NOT_TAKEN)

    def _send_barrier(self, batch: _Batch, until: float) -> None:
        left_s = until - self._loop.time()
        if batch.send(self._teller):
            batch.timer = self._loop.call_later(max(0.0, left_s), self._give_up, batch)
        elif left_s > 0:
            batch.timer = self._loop.call_later(RETRY_S, self._send_barrier, batch, until)
        else:
            self._give_up(batch)

    def _go_on(self) -> None:
        if self._asked and self._flush is None:
            self._flush = self._loop.call_soon(self._send_asked)

    def _give_up(self, batch: _Batch) -> None:
        waiting = list(batch.waiting.items())
        batch.end(None, call=False)
        # Those behind would wait for the same.
        waiting += [(number, then) for number, _, then in self._asked]
        self._asked = []
        for number, then in waiting:
            self._fail(number, then, NOT_TAKEN)

    def _fail(self, number: int, then: Then, reason: str) -> None:
        self.drop(number)
        then(reason)


class _Batch:
    """Connections behind one barrier: a pipe whose other end the manager closes."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        batches: set[_Batch],
        came_back: Callable[[], None],
    ) -> None:
        self._tell_back = came_back
        self.waiting: dict[int, Then] = {}
        self.timer: asyncio.TimerHandle | None = None
        self._loop = loop
        self._batches = batches
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        batches.add(self)

    def send(self, teller: Teller) -> bool:
        """Send the barrier, and listen for its end."""
        if not teller.send("BARRIER=1", (self._write_fd,)):
            return False
        os.close(self._write_fd)
        self._write_fd = -1
        self._loop.add_reader(self._read_fd, self._came_back)
        return True

    def end(self, reason: str | None, *, call: bool) -> None:
        """Give the pipe back, and tell those who wait."""
        if self._read_fd < 0:
            return
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)
        self._read_fd = -1
        if self._write_fd >= 0:
            os.close(self._write_fd)
        if self.timer is not None:
            self.timer.cancel()
        self._batches.discard(self)
        waiting, self.waiting = self.waiting, {}
        if call:
            for then in waiting.values():
                then(reason)

    def _came_back(self) -> None:
        self.end(None, call=True)
        self._tell_back()


def name_of(number: int) -> str:
    """Write a connection's number as it is named in the store: base 36."""
    digits = ""
    while number:
        number, rest = divmod(number, 36)
        digits = DIGITS[rest] + digits
    return digits or "0"


def number_of(name: str) -> int:
    """Read a connection's number from its name. Raises ValueError."""
    return int(name, 36)
