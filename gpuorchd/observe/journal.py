"""The journal: the last announcements of the core, kept in memory to tell the story of one lease.

For debugging and for tests. Bounded: an old entry goes when a new one comes. Nothing secret is
announced, so nothing secret is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from gpuorchd.core.effects import Announce
from gpuorchd.observe.sources import ObservedEngine

# About a minute of a busy host, in well under a megabyte.
ENTRIES = 1_000


class Entry(NamedTuple):
    """One announcement. `cause_id` is the turn of the engine that made it."""

    time_ns: int
    cause_id: int
    name: str
    fields: Mapping[str, object]

    def __str__(self) -> str:
        shown = " ".join(f"{name}={value!r}" for name, value in self.fields.items())
        return f"[{self.cause_id}] {self.name} {shown}"


class Journal:
    """Keep the last announcements of an engine."""

    def __init__(self, engine: ObservedEngine, entries: int = ENTRIES) -> None:
        self._engine = engine
        self._entries: deque[Entry] = deque(maxlen=entries)
        engine.on(Announce, self._keep)

    def story(self, lease_id: str) -> list[Entry]:
        """Return what happened to one lease, oldest first, as far back as the journal goes."""
        return [entry for entry in self._entries if entry.fields.get("lease_id") == lease_id]

    def turn(self, cause_id: int) -> list[Entry]:
        """Return what was announced in one turn of the engine."""
        return [entry for entry in self._entries if entry.cause_id == cause_id]

    def __len__(self) -> int:
        return len(self._entries)

    def _keep(self, effect: Announce) -> None:
        engine = self._engine
        self._entries.append(Entry(engine.now_ns(), engine.turns, effect.name, effect.fields))
