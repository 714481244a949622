"""Everything that can happen to the core. Past tense; each is handled by `Machine.handle`.

Ids and tokens that must be unguessable come in with the event: the core has no randomness.
Requests carry the connection and the client's own id; their types and ranges are already checked,
and an admin op arrives only from an admin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gpuorchd.core.model import (
    Ask,
    ConnectionId,
    DeviceFacts,
    DeviceUuid,
    Peer,
    ProcessKey,
    Reading,
    RequestId,
    Token,
)
from gpuorchd.core.rows import ClientRow, DeviceRow, LeaseRow, OutcomeRow, WaiterRow
from gpuorchd.core.state import Limits


class Kept(NamedTuple):
    """The rows that were recorded, each kind in the order of their numbers. See `snapshot`."""

    devices: tuple[DeviceRow, ...] = ()
    clients: tuple[ClientRow, ...] = ()
    leases: tuple[LeaseRow, ...] = ()
    waiters: tuple[WaiterRow, ...] = ()
    outcomes: tuple[OutcomeRow, ...] = ()
    totals: tuple[int, int, int] = (0, 0, 0)


class Settled(NamedTuple):
    """The change that brought the settings about that are in force, and what it is answered.

    `epoch` is of the lease table that its connection belonged to. `answer` None: the policy.
    """

    epoch: str
    conn: ConnectionId
    request_id: int | str
    answer: Mapping[str, object] | None


class ClientArrived(NamedTuple):
    """A connection is about to make its first lease request."""

    conn: ConnectionId
    peer: Peer


class ClientLeft(NamedTuple):
    """A connection that had arrived has ended, in whatever way."""

    conn: ConnectionId


class ProcessEnded(NamedTuple):
    """The pidfd of a watched process fired."""

    process: ProcessKey


class LeaseAsked(NamedTuple):
    """`lease`. `token` is fresh and unguessable; it is the lease's if there is one."""

    conn: ConnectionId
    request_id: RequestId
    ask: Ask
    token: Token


class ReleaseAsked(NamedTuple):
    """`release`."""

    conn: ConnectionId
    request_id: RequestId
    token: Token


class RenewAsked(NamedTuple):
    """`renew`."""

    conn: ConnectionId
    request_id: RequestId
    token: Token


class CancelAsked(NamedTuple):
    """`cancel` of the waiting request `target`."""

    conn: ConnectionId
    request_id: RequestId
    target: int | str


class SealAsked(NamedTuple):
    """`seal`. `signal` is one of TERM INT HUP USR1 USR2."""

    conn: ConnectionId
    request_id: RequestId
    signal: str | None


class SealTold(NamedTuple):
    """The answer to `seal` has left: the connection only holds from now on."""

    conn: ConnectionId


class ReattachAsked(NamedTuple):
    """`reattach`. `digest` names the token where only digests of tokens were kept."""

    conn: ConnectionId
    request_id: RequestId
    token: Token
    digest: Token


class RequestRepeated(NamedTuple):
    """A request came again on a connection that outlived the daemon that took it first."""

    conn: ConnectionId
    request_id: RequestId


class Restored(NamedTuple):
    """What an earlier daemon recorded; the first event of all, on an empty state.

    `attached` are the connections that are still there. The owners of those in `lost` may come
    back within `grace_ns`, while their processes live. All others have ended.
    """

    kept: Kept
    attached: frozenset[ConnectionId]
    lost: frozenset[ConnectionId]
    grace_ns: int
    # Done, but perhaps not answered.
    settled: Settled | None = None


class ClientsGreeted(NamedTuple):
    """The connections of an earlier daemon can be spoken to again, now that `Restored` is done."""


class RevokeAsked(NamedTuple):
    """`revoke`, by an admin."""

    conn: ConnectionId
    request_id: RequestId
    lease_id: str
    grace_ns: int
    reason: str


class CordonAsked(NamedTuple):
    """`cordon` and, with `reason` None, `uncordon`, by an admin."""

    conn: ConnectionId
    request_id: RequestId
    gpu: str | int
    reason: str | None


class PolicyChangeAsked(NamedTuple):
    """`policy_set`, by an admin.

    `changes` is the client's map, unchecked. `uids` resolves every user name in it that is known.
    """

    conn: ConnectionId
    request_id: RequestId
    changes: Mapping[str, object]
    if_revision: int | None
    uids: Mapping[str, int]


class SettingsPersisted(NamedTuple):
    """The newest `PersistSettings` is on disk, or (with `failure`) is not."""

    failure: str | None = None


class ConfigurationRead(NamedTuple):
    """What the core is configured with was read anew. Holds for what is asked from now on."""

    limits: Limits
    ttl_ns: int
    reading_max_age_ns: int


class DevicesFound(NamedTuple):
    """The GPUs that are present now, all of them. Ends the first probe."""

    devices: tuple[DeviceFacts, ...]


class DevicesLost(NamedTuple):
    """No GPU can be used, and why. Ends the first probe."""

    reason: str


class ReadingsTaken(NamedTuple):
    """Fresh readings. `started_ns` is when the first value was asked for.

    `failures` names the GPUs that could not be read, with the reason.
    """

    started_ns: int
    readings: tuple[Reading, ...]
    failures: tuple[tuple[DeviceUuid, str], ...] = ()


class TimePassed(NamedTuple):
    """The deadline that the core asked for has come."""


class StopAsked(NamedTuple):
    """The daemon stops and hands nothing over."""


Event = (
    ClientArrived
    | ClientLeft
    | ProcessEnded
    | LeaseAsked
    | ReleaseAsked
    | RenewAsked
    | CancelAsked
    | SealAsked
    | SealTold
    | ReattachAsked
    | RequestRepeated
    | Restored
    | ClientsGreeted
    | RevokeAsked
    | CordonAsked
    | PolicyChangeAsked
    | SettingsPersisted
    | ConfigurationRead
    | DevicesFound
    | DevicesLost
    | ReadingsTaken
    | TimePassed
    | StopAsked
)
