"""The waiting queue: who waits, in what order, behind whom.

Order is by priority, then by arrival. Waiters are found, added and taken out in constant time;
the order is that of insertion within each priority, and only who changes its priority is put
between others. Who is served when is `serving`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpuorchd.core.model import Priority, Waiter


class WaitingQueue:
    """Waiting requests by priority and arrival."""

    __slots__ = ("_lanes",)

    def __init__(self) -> None:
        self._lanes: tuple[dict[int, Waiter], ...] = tuple({} for _ in Priority)

    def add(self, waiter: Waiter) -> int:
        """Put a waiter at the end of its priority; return its position, from 1."""
        lanes = self._lanes
        lanes[waiter.priority][waiter.number] = waiter
        return sum(len(lane) for lane in lanes[: waiter.priority + 1])

    def remove(self, waiter: Waiter) -> None:
        """Take a waiter out, wherever it stands."""
        del self._lanes[waiter.priority][waiter.number]

    def rank_anew(self, changed: Iterable[tuple[Waiter, Priority]]) -> None:
        """Give waiters other priorities, and in each the place of their arrival."""
        grown = set()
        for waiter, priority in changed:
            self.remove(waiter)
            waiter.priority = priority
            self._lanes[priority][waiter.number] = waiter
            grown.add(priority)
        for priority in grown:
            lane = self._lanes[priority]
            by_arrival = sorted(lane.items())
            lane.clear()
            lane.update(by_arrival)

    def depth(self, priority: Priority) -> int:
        """How many wait with this priority."""
        return len(self._lanes[priority])

    def lane(self, priority: Priority) -> Iterable[Waiter]:
        """Those who wait with one priority, first come first."""
        return self._lanes[priority].values()

    def __len__(self) -> int:
        critical, normal, background = self._lanes
        return len(critical) + len(normal) + len(background)

    def __iter__(self) -> Iterator[Waiter]:
        """All waiters in the order in which they are served."""
        for lane in self._lanes:
            yield from lane.values()
