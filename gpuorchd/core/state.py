"""The whole state of the core in one place, and the bounds it lives within.

`Machine` alone changes it. Shells read it to answer questions (`gpu_info`, `allocations`,
metrics) in the turn in which they look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from gpuorchd.core.deadlines import Deadlines
from gpuorchd.core.model import (
    Client,
    ConnectionId,
    Device,
    DeviceUuid,
    Holder,
    Lease,
    LeaseId,
    ProcessKey,
    RequestId,
    Token,
    Waiter,
)
from gpuorchd.core.policy import Policy
from gpuorchd.core.queue import WaitingQueue


class Limits(NamedTuple):
    """Bounds on what is held, per connection, per user and in all."""

    # Connections that hold or await a lease: about what a descriptor store is good for.
    holders: int = 1_024
    holders_per_uid: int = 900
    leases: int = 8_192
    leases_per_uid: int = 4_096
    leases_per_connection: int = 64
    waiting: int = 4_096
    waiting_per_uid: int = 2_048
    waiting_per_connection: int = 64


class Settings(NamedTuple):
    """What the core is configured with; all but the epoch can be configured anew."""

    epoch: str
    limits: Limits = Limits()
    # 0: leases have no time limit.
    ttl_ns: int = 0
    # A reading older than this is unknown and grants nothing.
    reading_max_age_ns: int = 3_000_000_000
    # Whether what changes is recorded (`Commit`), so that another daemon can go on from it.
    keeps: bool = False
    # Whether answers are recorded too: only a connection that outlives the daemon asks again.
    keeps_answers: bool = True


@dataclass(slots=True, eq=False)
class State:
    """Devices, leases, the waiting queue, policy: all that decisions are made from."""

    settings: Settings
    policy: Policy
    revision: int = 1
    safe_mode: bool = False
    stopping: bool = False
    # True until the first probe of the devices has ended, and again after SAFE_MODE ends.
    probing: bool = True
    # Why there is no device, where there is none.
    unavailable: str | None = None
    devices: dict[DeviceUuid, Device] = field(default_factory=dict)
    # The GPUs that are present, by index.
    order: tuple[Device, ...] = ()
    # Cordons by uuid with their reason, kept also for GPUs that are not there.
    cordons: dict[str, str] = field(default_factory=dict)
    # Every lease that still keeps bytes, draining ones too, in order of their grant.
    leases: dict[LeaseId, Lease] = field(default_factory=dict)
    # Live leases by their secret.
    tokens: dict[Token, Lease] = field(default_factory=dict)
    clients: dict[ConnectionId, Client] = field(default_factory=dict)
    holders: dict[ProcessKey, Holder] = field(default_factory=dict)
    # Processes besides the peers that leases depend on, with those leases.
    watched: dict[ProcessKey, dict[LeaseId, Lease]] = field(default_factory=dict)
    queue: WaitingQueue = field(default_factory=WaitingQueue)
    waiters: dict[int, Waiter] = field(default_factory=dict)
    # When the queue was last gone through to tell positions.
    told_ns: int = 0
    # By priority: the GPUs that those waiting at it or above it have first claim to.
    wanted: tuple[frozenset[DeviceUuid], ...] = (frozenset(), frozenset(), frozenset())
    # Of those who wait and keep GPUs from others: what those ahead of each have first claim to.
    taken_before: dict[int, frozenset[DeviceUuid]] = field(default_factory=dict)
    # Something changed by which a waiting request may be served, or its place may differ.
    unsettled: bool = False
    # What changed may also have made a waiting request hopeless: all have to be looked at.
    upheaval: bool = False
    # Unix time less the monotonic clock, as it is in this turn.
    unix_offset_ns: int = 0
    deadlines: Deadlines = field(default_factory=Deadlines)
    # Counted per uid: connections that hold or await, live leases, waiting requests.
    holders_by_uid: dict[int, int] = field(default_factory=dict)
    leases_by_uid: dict[int, int] = field(default_factory=dict)
    waiting_by_uid: dict[int, int] = field(default_factory=dict)
    holding_clients: int = 0
    # Draining leases do not count: these are live.
    live_leases: int = 0
    # Waiting requests of an earlier daemon that have not been asked again: their answer waits too,
    # because it would be given a second time when they are.
    unrepeated: set[tuple[ConnectionId, RequestId]] = field(default_factory=set)
    # What changed in this turn and has to be recorded, by number or name.
    changed_leases: dict[int, Lease] = field(default_factory=dict)
    changed_waiters: dict[int, Waiter] = field(default_factory=dict)
    changed_clients: dict[ConnectionId, Client] = field(default_factory=dict)
    changed_devices: set[DeviceUuid] = field(default_factory=set)
    granted_total: int = 0
    expired_total: int = 0
    queued_total: int = 0
