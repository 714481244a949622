"""How long things take on the stage, and what goes wrong: here nothing does.

The simulator draws its own from a seed: `RandomPace`.
"""

from __future__ import annotations

import random

from tests.support.world import MS, SECOND


class Pace:
    """How long things take, and what goes wrong: here nothing does."""

    # Between two readings that nobody asked for; 0: only those that are asked for.
    reading_every_ns = SECOND
    # The list of processes is read with the last of the memory values, not with the first.
    listed_last = True

    def reading_wait_ns(self) -> int:
        """From the wish for a reading to its start."""
        return MS

    def reading_takes_ns(self) -> int:
        """From its first value to its last, and again to its arrival."""
        return MS

    def reading_fails(self) -> bool:
        """Whether a card that is well cannot be read this time."""
        return False

    def memory_back_ns(self) -> int:
        """From a process's death to the return of its memory."""
        return 150 * MS

    def pidfd_after_ns(self) -> int:
        """From the return of its memory to the pidfd."""
        return MS

    def hangup_ns(self) -> int:
        """From a process's death to the end of its connections."""
        return MS // 3

    def persist_ns(self) -> int:
        """How long the disk takes."""
        return 5 * MS

    def persist_fails(self) -> bool:
        """Whether the disk refuses."""
        return False

    def probe_ns(self) -> int:
        """How long it takes to find the cards."""
        return 20 * MS

    def timer_late_ns(self) -> int:
        """How late the loop wakes up."""
        return 0

    def back_ns(self) -> int:
        """From a restart that lost a connection to its process's coming back."""
        return SECOND


class RandomPace(Pace):
    """Everything takes as long as it likes; with `faults` things fail as well."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.faults = True
        self.listed_last = rng.random() < 0.5

    def _upto(self, usual_ns: int, rare_ns: int) -> int:
        rare = self.faults and self.rng.random() < 0.03
        return self.rng.randrange(rare_ns if rare else usual_ns)

    def reading_wait_ns(self) -> int:
        return self._upto(5 * MS, 400 * MS)

    def reading_takes_ns(self) -> int:
        return self._upto(5 * MS, 4 * SECOND)

    def reading_fails(self) -> bool:
        return self.faults and self.rng.random() < 0.02

    def memory_back_ns(self) -> int:
        return self.rng.randrange(60 * MS, 180 * MS)

    def pidfd_after_ns(self) -> int:
        return self._upto(2 * MS, 500 * MS)

    def hangup_ns(self) -> int:
        return self._upto(2 * MS, 400 * MS)

    def persist_ns(self) -> int:
        return self._upto(10 * MS, 2 * SECOND)

    def persist_fails(self) -> bool:
        return self.faults and self.rng.random() < 0.05

    def timer_late_ns(self) -> int:
        return self._upto(2 * MS, 700 * MS) if self.faults else 0

    def back_ns(self) -> int:
        return self.rng.randrange(4 * SECOND)
