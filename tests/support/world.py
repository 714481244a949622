"""The physical world that the core decides about: cards, processes, the memory they really use.

Owns the truth: who uses how much of which card, who is whose child, when a dead process's memory is
back. Knows nothing of leases except what processes believe that they may use (`allowed`), and
nothing of the core. Time is `now_ns`; only `tests.support.stage` moves it.

A process that keeps to its leases grows only within them, counted over its whole tree. An
allocation within them that the card cannot serve is written down in `ooms`: that is what admission
has to prevent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from gpuorchd.core.model import (
    DeviceFacts,
    DeviceUuid,
    ProcessKey,
    ProcessUse,
    Reading,
)

MS = 1_000_000
SECOND = 1_000 * MS


@dataclass(slots=True, eq=False)
class Process:
    """One process. `running` ends with its death, `gone` comes when its memory is back."""

    key: ProcessKey
    uid: int
    parent: Process | None = None
    unit: str | None = None
    running: bool = True
    gone: bool = False
    # The driver does not say how much it uses.
    opaque: bool = False
    # It has asked for leases itself: its descendants live on what it leased.
    peer: bool = False
    uses: dict[DeviceUuid, int] = field(default_factory=dict)

    def lineage(self) -> Iterator[Process]:
        """Yield its living parents, nearest first. A dead one breaks the line for good."""
        parent = self.parent
        while parent is not None and not parent.gone:
            yield parent
            parent = parent.parent

    def root(self) -> Process:
        """Return the nearest process, itself or by birth, that leases for it."""
        process = self
        while not process.peer and process.parent is not None:
            process = process.parent
        return process


@dataclass(slots=True, eq=False)
class Card:
    """One GPU. `broken` is why it cannot be read, None where it can."""

    facts: DeviceFacts
    present: bool = True
    broken: str | None = None

    @property
    def uuid(self) -> DeviceUuid:
        """Its stable name."""
        return self.facts.uuid

    @property
    def capacity_mb(self) -> int:
        """What processes can use of it together."""
        return self.facts.total_mb - self.facts.reserved_mb


class Oom(NamedTuple):
    """An allocation within a lease that failed."""

    at_ns: int
    process: ProcessKey
    uuid: DeviceUuid
    wanted_mb: int
    free_mb: int


def card(
    index: int, total_mb: int, *, reserved_mb: int = 0, drain_ms: int | None = None
) -> DeviceFacts:
    """Describe a card; `drain_ms` makes it a simulated one."""
    return DeviceFacts(
        uuid=DeviceUuid(f"GPU-{index}"),
        index=index,
        name="simulated" if drain_ms is not None else "card",
        total_mb=total_mb,
        reserved_mb=reserved_mb,
        drain_ns=None if drain_ms is None else drain_ms * MS,
    )


class World:
    """Cards and processes, and what happens to them."""

    def __init__(self, facts: tuple[DeviceFacts, ...]) -> None:
        self.now_ns = SECOND
        self.cards = {entry.uuid: Card(entry) for entry in facts}
        self.processes: dict[ProcessKey, Process] = {}
        self.ooms: list[Oom] = []
        # Memory that was taken beyond every lease since the start: readings lag behind it.
        self.wild_mb = 0
        # What the live leases of each process allow it on each card.
        self.allowed: dict[tuple[ProcessKey, DeviceUuid], int] = {}
        self._next_pid = 100

    def spawn(
        self, parent: Process | None = None, *, uid: int = 1000, unit: str | None = None
    ) -> Process:
        """Start a process; a child has the user and the service of its parent."""
        self._next_pid += 1
        if parent is not None:
            uid, unit = parent.uid, parent.unit
        key = ProcessKey(self._next_pid, self._next_pid * 10)
        process = Process(key, uid, parent, unit)
        self.processes[key] = process
        return process

    def spawn_detached(self, ancestor: Process) -> Process:
        """Start a process by a double fork: its birth parent is gone already."""
        between = self.spawn(ancestor)
        child = self.spawn(between)
        between.running = False
        self.finish(between)
        return child

    def kill(self, process: Process) -> None:
        """End a process. Its memory stays until `finish`."""
        process.running = False

    def finish(self, process: Process) -> None:
        """Give back what a dead process used; from now on nothing of it is to be seen."""
        assert not process.running, "a running process keeps its memory"
        process.gone = True
        process.uses.clear()
        del self.processes[process.key]

    def spare_mb(self, process: Process, uuid: DeviceUuid) -> int:
        """Say what may still be allocated within the leases of the process's tree."""
        root = process.root()
        used = sum(
            other.uses.get(uuid, 0) for other in self.processes.values() if other.root() is root
        )
        return max(0, self.allowed.get((root.key, uuid), 0) - used)

    def grow(self, process: Process, uuid: DeviceUuid, memory_mb: int) -> int:
        """Allocate up to `memory_mb` within the leases; return what was allocated."""
        if not process.running or self.cards[uuid].facts.drain_ns is not None:
            # A simulated card has no memory that could be used.
            return 0
        wanted_mb = min(memory_mb, self.spare_mb(process, uuid))
        if wanted_mb <= 0:
            return 0
        free_mb = self.free_mb(uuid)
        if wanted_mb > free_mb:
            self.ooms.append(Oom(self.now_ns, process.key, uuid, wanted_mb, free_mb))
            return 0
        process.uses[uuid] = process.uses.get(uuid, 0) + wanted_mb
        return wanted_mb

    def grow_wild(self, process: Process, uuid: DeviceUuid, memory_mb: int) -> int:
        """Allocate outside every lease, as far as the card allows; return what was allocated."""
        if not process.running or self.cards[uuid].facts.drain_ns is not None:
            return 0
        taken_mb = min(memory_mb, self.free_mb(uuid))
        if taken_mb:
            process.uses[uuid] = process.uses.get(uuid, 0) + taken_mb
            self.wild_mb += taken_mb
        return taken_mb

    def shrink(self, process: Process, uuid: DeviceUuid, memory_mb: int) -> None:
        """Give back up to `memory_mb`."""
        left_mb = process.uses.get(uuid, 0) - memory_mb
        if left_mb > 0:
            process.uses[uuid] = left_mb
        else:
            process.uses.pop(uuid, None)

    def used_mb(self, uuid: DeviceUuid) -> int:
        """Sum what all processes really use of a card, dying ones too."""
        return sum(process.uses.get(uuid, 0) for process in self.processes.values())

    def free_mb(self, uuid: DeviceUuid) -> int:
        """Say what could be allocated on a card this instant."""
        return self.cards[uuid].capacity_mb - self.used_mb(uuid)

    def found(self) -> tuple[DeviceFacts, ...]:
        """List the cards that are present, as a probe finds them."""
        return tuple(card.facts for card in self.cards.values() if card.present)

    def look(self, uuid: DeviceUuid) -> Reading:
        """Read one card perfectly, this instant."""
        uses = tuple(
            ProcessUse(
                process.key,
                None if process.opaque else process.uses[uuid],
                tuple(ancestor.key for ancestor in process.lineage()),
                process.unit,
            )
            for process in self.processes.values()
            if uuid in process.uses
        )
        capacity_mb = self.cards[uuid].capacity_mb
        used_mb = self.used_mb(uuid)
        return Reading(uuid, capacity_mb - used_mb, used_mb, uses)
