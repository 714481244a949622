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

    A name gets a place when it first comes while one is free, and keeps it while it is live. A
    place whose name is no longer live goes to a new name only when there is no free one, the
    longest unused first. So a roster keeps its series through restarts of its agents, and a flood
    of made-up names ends up in `other`.
    """

    OTHER = "other"

    def __init__(self, places: int) -> None:
        self._places = places
        # In order of last use: an idle name moves to the front by standing still.
        self._names: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._names)

    def assign(self, live: Iterable[str]) -> Mapping[str, str]:
        """Map every live name to the one that it is shown under."""
        wanted = dict.fromkeys(live)
        for name in wanted:
            if name in self._names:
                # Moved to the end: what stays at the front is idle.
                del self._names[name]
                self._names[name] = None
        idle = [name for name in self._names if name not in wanted]
        shown: dict[str, str] = {}
        for name in wanted:
            if name not in self._names:
                if len(self._names) >= self._places:
                    if not idle:
                        shown[name] = self.OTHER
                        continue
                    del self._names[idle.pop(0)]
                self._names[name] = None
            shown[name] = name
        return shown

    def names(self) -> list[str]:
        """The names that have a place, live or not."""
        return list(self._names)
