"""The shape of what is recorded: one row for each thing that has to outlive the daemon.

Values of plain types and named tuples of such, so that any packing serves. A row's key is its kind
and a number or name: `d` devices by uuid, `c` clients by connection, `l` leases and `w` waits by
number, `o` outcomes by connection and place. `snapshot` makes rows, `recovery` reads them.
"""

from __future__ import annotations

from typing import NamedTuple

from gpuorchd.core.model import (
    Ask,
    ConnectionId,
    DeviceUuid,
    ProcessKey,
    RequestId,
    Token,
)

DEVICE = "d"
CLIENT = "c"
LEASE = "l"
WAITER = "w"
OUTCOME = "o"

# Answers of one connection that may have to be given again: to as many requests as are taken before
# their answers are with the kernel, and to as many that waited and were answered meanwhile.
OUTCOMES_KEPT = 128


class DeviceRow(NamedTuple):
    """A GPU as it was found; the fields of `DeviceFacts` in their order."""

    uuid: DeviceUuid
    place: int
    name: str
    total_mb: int
    reserved_mb: int
    drain_ns: int | None


class PartRow(NamedTuple):
    """A lease's share of one GPU. `claim_mb` is 0 once it is back; the GPU may be gone then."""

    uuid: DeviceUuid
    place: int
    memory_mb: int
    claim_mb: int
    charge_mb: int


class ClientRow(NamedTuple):
    """A connection that has asked for a lease, and the process behind it."""

    conn: ConnectionId
    process: ProcessKey
    uid: int
    gid: int
    unit: str | None
    sealed: bool
    signal: str | None
    seal_told: bool


class LeaseRow(NamedTuple):
    """A lease, from its grant until its bytes are back. Times in ns of the monotonic clock."""

    number: int
    lease_id: str
    token: Token
    conn: ConnectionId
    request_id: RequestId
    ask: Ask
    process: ProcessKey
    uid: int
    unit: str | None
    priority: int
    parts: tuple[PartRow, ...]
    # It has taken these GPUs whole.
    whole: bool
    granted_ns: int
    granted_unix_ns: int
    waited_ns: int
    expires_ns: int | None
    state: str
    ended_ns: int
    revoke_reason: str
    revoke_ns: int | None
    withheld: bool
    others: tuple[ProcessKey, ...]


class WaiterRow(NamedTuple):
    """A request that waits."""

    number: int
    token: Token
    conn: ConnectionId
    request_id: RequestId
    ask: Ask
    priority: int
    queued_ns: int
    deadline_ns: int


class OutcomeRow(NamedTuple):
    """An answer that may not have reached its client.

    `kind` is `answer` (the fields), `policy` (the note) or `denial` (agent, note, reasons as index,
    note and detail, eta in ns, waited ns).
    """

    number: int
    conn: ConnectionId
    request_id: int | str
    kind: str
    said: object
