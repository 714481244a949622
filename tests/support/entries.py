"""What the observer's books are made of: leases, cards and readings, seen from outside.

Values only. Where the contract leaves a moment open a figure has two values: `least` is what must
be kept from others then, `most` what may be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from gpuorchd.core.model import (
    ConnectionId,
    DeviceFacts,
    DeviceUuid,
    LeaseId,
    ProcessKey,
    ProcessUse,
    Reading,
    RequestId,
    Token,
)


@dataclass(slots=True, eq=False)
class Share:
    """A lease's bytes on one card; while it drains, what it still keeps."""

    memory_mb: int
    charge_mb: int
    least_mb: int
    most_mb: int


@dataclass(slots=True, eq=False)
class Held:
    """A lease as seen from outside."""

    lease_id: LeaseId
    number: int
    token: Token
    conn: ConnectionId
    request_id: RequestId
    holder: ProcessKey
    unit: str | None
    agent: str
    whole: bool
    shares: dict[DeviceUuid, Share]
    granted_ns: int
    expires_ns: int | None
    uid: int = 0
    # Its connection was lost with the daemon: until when its owner may come back.
    detached_ns: int | None = None
    # Where it was revoked: when it may be over, and when it has to be.
    revoke_ns: tuple[int, int] | None = None
    ended_ns: int | None = None
    withheld: bool = False
    # Its processes that are not known to have ended.
    processes: set[ProcessKey] = field(default_factory=set)
    # Those that readings showed besides its peer, dead ones too.
    seen: set[ProcessKey] = field(default_factory=set)
    # When the last of them ended.
    gone_ns: int = 0
    # The drain timeout in force at its end and at any time since: the shortest and the longest.
    timeouts_ns: tuple[int, int] = (0, 0)

    @property
    def live(self) -> bool:
        """Whether its owner may use it."""
        return self.ended_ns is None


@dataclass(slots=True, eq=False)
class Seat:
    """A card as the core was told of it."""

    facts: DeviceFacts
    present: bool = True
    cordoned: bool = False
    reading: Reading | None = None
    started_ns: int = 0
    failed: bool = False
    # Until the next reading it is in doubt what the last one says: a process in it counted to a
    # lease that is freed, or the card was away.
    doubtful: bool = False

    @property
    def capacity_mb(self) -> int:
        """The most that leases can have on it."""
        return self.facts.total_mb - self.facts.reserved_mb


class Attribution(NamedTuple):
    """A reading, told apart by holder. A holder's use is None where a part of it is unknown."""

    used: dict[ProcessKey, int | None]
    # Which process was counted to which holder.
    owners: dict[ProcessKey, ProcessKey]
    loose: tuple[ProcessUse, ...]
    murky: bool
