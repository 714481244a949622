"""How late the event loop is: a timer that measures by how much it was late itself."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from gpuorchd.observe.tally import NS_PER_S, Histogram

# Often enough to catch a pause of half a second twice in a scrape's interval; costs nothing.
PERIOD_S = 0.5
# Probes that `worst_recent_ns` looks back over: ten seconds.
RECENT_PROBES = 20


class LoopLag:
    """Probe one loop. Not thread-safe."""

    def __init__(self, histogram: Histogram, period_s: float = PERIOD_S) -> None:
        self._histogram = histogram
        self._period_s = period_s
        self._recent_ns: deque[int] = deque(maxlen=RECENT_PROBES)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due_ns = 0

    @property
    def probes(self) -> int:
        """How many probes there have been, of those still remembered."""
        return len(self._recent_ns)

    @property
    def worst_recent_ns(self) -> int:
        """The worst lateness of the last probes, or of the one that is overdue now."""
        overdue_ns = 0
        if self._timer is not None:
            overdue_ns = max(0, time.monotonic_ns() - self._due_ns)
        return max(overdue_ns, max(self._recent_ns, default=0))

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to probe."""
        self._loop = loop
        self._arm()

    def stop(self) -> None:
        """End probing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        assert self._loop is not None, "armed before start"
        self._due_ns = time.monotonic_ns() + round(self._period_s * NS_PER_S)
        self._timer = self._loop.call_later(self._period_s, self._probe)

    def _probe(self) -> None:
        late_ns = max(0, time.monotonic_ns() - self._due_ns)
        self._histogram.add(late_ns)
        self._recent_ns.append(late_ns)
        self._arm()
