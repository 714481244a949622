"""What must happen by when: one heap, keyed so that a deadline can be moved or dropped.

A moved or dropped deadline leaves a stale entry in the heap; the heap is rebuilt when more than
half of it is stale, so its size follows what is really pending.
"""

from __future__ import annotations

import heapq
from typing import Any

# Below this many entries a rebuild costs more than the memory it saves.
REBUILD_FROM = 64


# A kind of deadline, and what it belongs to.
Key = tuple[str, Any]


class Deadlines:
    """Pending deadlines in nanoseconds, each under a key of its own."""

    __slots__ = ("_due", "_heap", "_number")

    def __init__(self) -> None:
        self._due: dict[Key, int] = {}
        self._heap: list[tuple[int, int, Key]] = []
        # Breaks ties in order of setting, and keeps keys from being compared.
        self._number = 0

    def set(self, key: Key, due_ns: int) -> None:
        """Set or move the deadline of `key`."""
        self._due[key] = due_ns
        self._number += 1
        heapq.heappush(self._heap, (due_ns, self._number, key))
        if len(self._heap) > REBUILD_FROM and len(self._heap) > 2 * len(self._due):
            self._rebuild()

    def drop(self, key: Key) -> None:
        """Forget the deadline of `key`, if it has one."""
        self._due.pop(key, None)

    def due_ns(self, key: Key) -> int | None:
        """When `key` is due, None where it has no deadline."""
        return self._due.get(key)

    def next_ns(self) -> int | None:
        """The earliest deadline, None where nothing is pending."""
        heap = self._heap
        while heap:
            due_ns, _, key = heap[0]
            if self._due.get(key) == due_ns:
                return due_ns
            heapq.heappop(heap)
        return None

    def pop_due(self, now_ns: int) -> Key | None:
        """Take out one key whose deadline has come, None where there is none."""
        due_ns = self.next_ns()
        if due_ns is None or due_ns > now_ns:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._due[key]
        return key

    def __len__(self) -> int:
        return len(self._due)

    def _rebuild(self) -> None:
        seen: set[Key] = set()
        kept = []
        for entry in sorted(self._heap):
            if self._due.get(entry[2]) == entry[0] and entry[2] not in seen:
                seen.add(entry[2])
                kept.append(entry)
        self._heap = kept
