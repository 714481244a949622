"""How long there has been no connection, and when to look for the daemon again.

A restart takes tenths of a second, a stop and a start minutes. So the first tries follow each other
closely, the later ones at a pace that costs nothing, and there is no last one while leases wait to
be reattached: their grace begins with the first answer of the new daemon, not with the loss.
"""

from __future__ import annotations

from libclient.errors import Unavailable

# The first try is made at once: the socket may be the service manager's, and start the daemon.
FIRST_PAUSE_S = 0.01
# A try that fails is one system call.
PAUSE_MAX_S = 1.0
# A restart takes less. Until then a call waits for the daemon within its time limit; later it tries
# once, so that agents without a daemon decide for the CPU at once and not after 2 s each time.
RESTART_S = 5.0
# A connection that was closed sooner than this, without an answer, was refused rather than lost.
REFUSED_S = 1.0
# So many in a row, within about 0.2 s, are no daemon that is being restarted.
REFUSALS_MAX = 5


class Absence:
    """The time without a connection. `fault` is why; times are of the driver's monotonic clock."""

    def __init__(self, fault: Unavailable, since_s: float, refusals: int) -> None:
        self.fault = fault
        self.since_s = since_s
        self.tries = refusals
        self.due_s = since_s + self._pause_s()

    def missed(self, fault: Unavailable, now_s: float) -> None:
        """Take note that a try failed."""
        self.fault = fault
        self.tries += 1
        self.due_s = now_s + self._pause_s()

    def is_long(self, now_s: float) -> bool:
        """Whether it has lasted longer than a restart does."""
        return now_s - self.since_s > RESTART_S

    def _pause_s(self) -> float:
        if not self.tries:
            return 0.0
        # Bounded before the power: there may be a hundred thousand tries.
        return float(min(FIRST_PAUSE_S * 2 ** min(self.tries - 1, 20), PAUSE_MAX_S))
