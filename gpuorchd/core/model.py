"""The values of the core: who asks, what is asked, what is held, on what.

Owns the shapes only; behaviour lives beside it (`ledger` counts, `placement` decides, `drain`
ends). Immutable values are named tuples, because they are made on the lease path and a tuple is
the cheapest frozen value there is. Records that change (`Lease`, `Device`, `Holder`, `Client`,
`Waiter`) are slotted classes and are changed by the core alone: shells may read them during the
turn that handed them out and keep none of them.

Units: memory in MiB (`_mb`), time in nanoseconds of the monotonic clock (`_ns`), or since 1970
where that is what people are told (`_unix_ns`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from typing import TYPE_CHECKING, NamedTuple, NewType

if TYPE_CHECKING:
    from gpuorchd.core.effects import Effect

ConnectionId = NewType("ConnectionId", int)
LeaseId = NewType("LeaseId", str)
Token = NewType("Token", str)
DeviceUuid = NewType("DeviceUuid", str)
# What the client called its request. None: a text-mode line without an id.
RequestId = int | str | None

NS_PER_S = 1_000_000_000


class Priority(IntEnum):
    """The order in which waiting requests are served; lower is sooner."""

    CRITICAL = 0
    NORMAL = 1
    BACKGROUND = 2

    @property
    def word(self) -> str:
        """The name on the wire."""
        return PRIORITY_WORDS[self]


PRIORITY_WORDS = tuple(priority.name.lower() for priority in Priority)


class LeaseState(Enum):
    """Where a lease stands; the values are the wire's words."""

    ACTIVE = "active"
    REVOKING = "revoking"
    # Its connection was lost with an earlier daemon; its owner may come back for it.
    DETACHED = "detached"
    DRAINING = "draining"
    FREED = "freed"


class Note(Enum):
    """Why a lease was not granted; the order is that of precedence."""

    SAFE_MODE = "SAFE_MODE"
    NO_GPU = "NO_GPU"
    POLICY = "POLICY"
    QUOTA = "QUOTA"
    CORDONED = "CORDONED"
    UNHEALTHY = "UNHEALTHY"
    RESERVED = "RESERVED"
    INSUFFICIENT_MEMORY = "INSUFFICIENT_MEMORY"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"


class ProcessKey(NamedTuple):
    """One process, never to be mistaken for a later one with the same number.

    `start_ticks` is field 22 of /proc/PID/stat (clock ticks since boot); 0 where the process was
    gone before it could be read.
    """

    pid: int
    start_ticks: int


class Peer(NamedTuple):
    """Who is at the other end of a connection, as the kernel says it.

    `unit` is the system unit of its cgroup, read while its pidfd showed it alive. `alive` is False
    for a peer that was already dead when asked.
    """

    process: ProcessKey
    uid: int
    gid: int = 0
    unit: str | None = None
    alive: bool = True


class Ask(NamedTuple):
    """A lease request after validation of its types and ranges.

    `memory_mb` is per GPU, 0 where the policy's default is wanted. `devices` are uuids or indices
    to choose from, empty for any. `wait_ns` 0 answers at once.
    """

    agent: str
    memory_mb: int = 0
    gpus: int = 1
    exclusive: bool = False
    priority: Priority | None = None
    wait_ns: int = 0
    devices: tuple[str | int, ...] = ()
    preemptible: bool = False
    expected_ns: int | None = None
    share_pct: int | None = None
    purpose: str | None = None
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one GPU (or, with `index` None, the host) did not serve a request."""

    index: int | None
    note: Note
    detail: str


class Denial(NamedTuple):
    """A request that is not granted now.

    `final` is True where waiting cannot help. `eta_ns` is how long from now, where known. `wanted`
    are the devices that the request would take when they come free: nobody behind it gets those.
    """

    note: Note
    reasons: tuple[Reason, ...]
    final: bool
    eta_ns: int | None = None
    wanted: frozenset[DeviceUuid] = frozenset()


class Code(StrEnum):
    """The error codes that the core itself can answer with; the values are the wire's words."""

    BAD_REQUEST = "bad_request"
    UNKNOWN_TOKEN = "unknown_token"
    UNKNOWN_REQUEST = "unknown_request"
    NOT_OWNER = "not_owner"
    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    CONFLICT = "conflict"
    LIMIT = "limit"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal"


class Refusal(NamedTuple):
    """An error reply: a code of the wire, a message for a person, the field at fault."""

    code: Code
    message: str
    field: str | None = None


class ProcessUse(NamedTuple):
    """What one process uses on one GPU, as one reading showed it.

    `used_mb` is None where the driver does not say. `ancestors` are its living parents, nearest
    first, without pid 1. `unit` is the system service of its cgroup.
    """

    process: ProcessKey
    used_mb: int | None
    ancestors: tuple[ProcessKey, ...] = ()
    unit: str | None = None


class Reading(NamedTuple):
    """One GPU's memory and processes at one moment. Values are MiB.

    `free_mb` is the least that was seen around the listing of the processes.
    """

    uuid: DeviceUuid
    free_mb: int
    used_mb: int
    processes: tuple[ProcessUse, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A GPU as it was found. `reserved_mb` is what the driver keeps for itself.

    `drain_ns` is set for a simulated card alone: bytes come back that long after a lease's end,
    and no reading is ever taken of it.
    """

    uuid: DeviceUuid
    index: int
    name: str
    total_mb: int
    reserved_mb: int = 0
    drain_ns: int | None = None


@dataclass(slots=True)
class Part:
    """A lease's share of one GPU. `claim_mb` is what it still keeps from others."""

    device: Device
    memory_mb: int
    claim_mb: int
    # What counts against the agent's cap: the bytes asked for, or the card for `exclusive` where
    # shares could be had.
    charge_mb: int


@dataclass(slots=True, eq=False)
class Lease:
    """Memory held by one connection, from its grant until its bytes are back."""

    lease_id: LeaseId
    number: int
    token: Token
    conn: ConnectionId
    request_id: RequestId
    ask: Ask
    holder: Holder
    # Of its connection: a process may have connected under several.
    uid: int
    priority: Priority
    parts: tuple[Part, ...]
    granted_ns: int
    # The same moment as people read it, whatever their clock is set to afterwards.
    granted_unix_ns: int
    waited_ns: int
    expires_ns: int | None = None
    state: LeaseState = LeaseState.ACTIVE
    ended_ns: int = 0
    # Why it was asked back, while it is.
    revoke_reason: str = ""
    # Set once the drain took longer than the policy allows.
    withheld: bool = False
    # Processes seen on its GPUs besides the peer, still alive. None until one is seen.
    others: set[ProcessKey] | None = None
    # Time of the latest proof that none of its processes lives; 0 while one does.
    gone_ns: int = 0


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for its grant."""

    number: int
    token: Token
    conn: ConnectionId
    request_id: RequestId
    ask: Ask
    holder: Holder
    priority: Priority
    queued_ns: int
    deadline_ns: int
    # The position its owner knows, and when it was told.
    told_position: int = 0
    told_ns: int = 0
    # The GPUs that it chooses from, and the list of present ones that this was found in.
    chosen: frozenset[DeviceUuid] = frozenset()
    chosen_of: tuple[Device, ...] | None = None

    @property
    def queue_id(self) -> str:
        """Its public name, which says nothing of the request's id."""
        return f"q{self.number}"


@dataclass(slots=True, eq=False)
class Holder:
    """One process that holds or awaits memory, over all of its connections."""

    process: ProcessKey
    unit: str | None
    alive: bool
    clients: int = 0
    leases: dict[LeaseId, Lease] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Client:
    """A connection that has asked for a lease."""

    conn: ConnectionId
    peer: Peer
    holder: Holder
    # Requests that are unanswered or whose lease lives, by the client's own name for them.
    requests: dict[object, Lease | Waiter] = field(default_factory=dict)
    sealed: bool = False
    # Sent to the peer when one of the sealed connection's leases is to be revoked.
    signal: str | None = None
    # The answer to `seal` is with the kernel: the peer knows that nothing more is sent.
    seal_told: bool = False
    # Answers recorded so far, for a daemon that may have to give them again.
    outcomes: int = 0
    # After a restart: requests that may come again, with the answer that was given; None where the
    # request lives on as a lease or a wait.
    repeats: dict[object, Effect | None] | None = None


@dataclass(slots=True, eq=False)
class Holding:
    """What one holder has on one GPU: claims of live and of draining leases, and its use.

    `used_mb` is what the newest reading attributes to it, None where a process's use is unknown.
    """

    claim_mb: int = 0
    draining_mb: int = 0
    used_mb: int | None = 0

    @property
    def unmet_mb(self) -> int:
        """Bytes that are promised and not yet to be seen in use: still to be kept free."""
        return max(0, self.claim_mb + self.draining_mb - (self.used_mb or 0))


@dataclass(slots=True, eq=False)
class Device:
    """One GPU: what was found, what was read, and what is promised on it."""

    facts: DeviceFacts
    present: bool = True
    # It was told that this GPU is there, and not that it is gone.
    announced: bool = False
    # What was promised beyond its capacity when that turned out smaller than it had been.
    over_mb: int = 0
    cordon: str | None = None
    reading: Reading | None = None
    reading_ns: int = 0
    # Why the newest reading failed, None where it did not.
    failure: str | None = None
    # Sums over the holdings, kept as they change.
    claim_mb: int = 0
    draining_mb: int = 0
    unmet_mb: int = 0
    holdings: dict[ProcessKey, Holding] = field(default_factory=dict)
    parts: dict[LeaseId, Part] = field(default_factory=dict)
    # What counts against each agent's cap here: its live leases.
    charges: dict[str, int] = field(default_factory=dict)
    # The live lease that has taken the whole GPU.
    exclusive: LeaseId | None = None
    # Processes that ended since the newest reading, with the holder whose lease they were seen in:
    # what that reading says of them is not a stranger's.
    ended: dict[ProcessKey, ProcessKey] = field(default_factory=dict)

    @property
    def uuid(self) -> DeviceUuid:
        """Its stable name."""
        return self.facts.uuid

    @property
    def index(self) -> int:
        """Its number as the driver counts, for people."""
        return self.facts.index

    @property
    def capacity_mb(self) -> int:
        """The most that leases can ever have on it."""
        return self.facts.total_mb - self.facts.reserved_mb
