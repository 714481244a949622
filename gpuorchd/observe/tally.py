"""Counting without objects: a histogram that costs one bisection, and names that stay few."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

NS_PER_S = 1_000_000_000


class Histogram:
    """Durations by bucket. Counts only rise. `bounds_s` are upper bounds, in rising order."""

    __slots__ = ("_bounds_ns", "bounds_s", "counts", "sum_ns")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.bounds_s = tuple(bounds_s)
        self._bounds_ns = [round(bound_s * NS_PER_S) for bound_s in bounds_s]
        # One per bucket, not cumulative; the last is for everything above the last bound.
        self.counts = [0] * (len(bounds_s) + 1)
        self.sum_ns = 0

    def add(self, duration_ns: int) -> None:
        """Count one duration. One that is negative (a clock of another room) counts as 0."""
        # Most grants waited for nothing: those need no search.
        if duration_ns > 0:
            self.counts[bisect_left(self._bounds_ns, duration_ns)] += 1
            self.sum_ns += duration_ns
        else:
            self.counts[0] += 1


class BoundedNames:
    """Give a bounded number of names a place of their own; all others share `other`.

    A name gets a place when it first comes while one is free, and keeps it. It loses it only when
    it has not been live for `idle_ns`: then it is shown no more, and its place is free. So a roster
    keeps its series through restarts of its agents, a flood of made-up names ends up in `other`,
    and the names that are shown over a day stay few as well.
    """

    OTHER = "other"

    def __init__(self, places: int, idle_ns: int) -> None:
        self._places = places
        self._idle_ns = idle_ns
        # When each name was live last.
        self._live_ns: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._live_ns)

    def assign(self, live: Iterable[str], now_ns: int) -> Mapping[str, str]:
        """Map every live name to the one that it is shown under."""
        wanted = dict.fromkeys(live)
        for name in self._live_ns.keys() & wanted.keys():
            self._live_ns[name] = now_ns
        for name in [n for n, at in self._live_ns.items() if now_ns - at > self._idle_ns]:
            del self._live_ns[name]
        shown: dict[str, str] = {}
        for name in wanted:
            if name not in self._live_ns:
                if len(self._live_ns) >= self._places:
                    shown[name] = self.OTHER
                    continue
                self._live_ns[name] = now_ns
            shown[name] = name
        return shown

    def names(self) -> list[str]:
        """The names that have a place, live or not."""
        return list(self._live_ns)
