"""Everything that the core asks for. Imperative; carried out in the order given.

The order within one batch is the contract: what must be kept comes before the answer that
promises it (`PersistSettings` before its answer), an answer before what is told besides
(`Announce`). An effect that takes time answers with an event (`SettingsPersisted`,
`ReadingsTaken`). Records inside effects belong to the core: read them in this turn, keep none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gpuorchd.core.model import (
    ConnectionId,
    Denial,
    Lease,
    ProcessKey,
    Refusal,
    RequestId,
)


class AnswerGrant(NamedTuple):
    """Answer a lease request with its grant."""

    lease: Lease


class AnswerDenial(NamedTuple):
    """Answer a lease request that is not granted."""

    conn: ConnectionId
    request_id: RequestId
    agent: str
    denial: Denial
    waited_ns: int


class Answer(NamedTuple):
    """Answer any other request with these fields beside `ok`.

    A field that ends in `_at_ns` is a point of the monotonic clock: the shell writes it as the
    field `_at` in unix seconds (None stays null).
    """

    conn: ConnectionId
    request_id: RequestId
    fields: Mapping[str, object]


class AnswerPolicy(NamedTuple):
    """Answer with the policy as it stands, in the shape of `policy_get`."""

    conn: ConnectionId
    request_id: RequestId
    note: str | None = None


class AnswerError(NamedTuple):
    """Answer a request with an error."""

    conn: ConnectionId
    request_id: RequestId
    refusal: Refusal


class Announce(NamedTuple):
    """Publish an event of the catalogue, and send it to `owner` unasked where there is one.

    `fields` hold durations and names only, never a token. `owner_fields` are added for the owner
    alone (its own request id). A `private` event goes to its owner and to no subscriber.
    """

    name: str
    fields: Mapping[str, object]
    owner: ConnectionId | None = None
    owner_fields: Mapping[str, object] | None = None
    private: bool = False


class Commit(NamedTuple):
    """Record these rows before anything else of this turn is carried out.

    `rows` by key, a kind and a number or name; None takes a row away. `totals` replaces what was
    recorded before. See `snapshot` for what rows hold.
    """

    rows: Mapping[tuple[str, int | str], tuple[object, ...] | None]
    totals: tuple[int, int, int]


class WatchProcess(NamedTuple):
    """Watch a process that is not (only) a peer, and say `ProcessEnded` when it is gone."""

    process: ProcessKey


class ForgetProcess(NamedTuple):
    """Nothing depends on this process any more."""

    process: ProcessKey


class TakeReading(NamedTuple):
    """Read all GPUs anew; the reading must start after now."""


class SignalPeer(NamedTuple):
    """Send a signal to a sealed connection's peer, through its pidfd, while it has its uid."""

    conn: ConnectionId
    signal: str


class PersistSettings(NamedTuple):
    """Write the settings document so that it survives; answer with `SettingsPersisted`."""

    document: Mapping[str, object]


class OpenDevices(NamedTuple):
    """Start looking for GPUs: SAFE_MODE is off."""


class CloseDevices(NamedTuple):
    """Let go of the driver: SAFE_MODE is on."""


Effect = (
    AnswerGrant
    | AnswerDenial
    | Answer
    | AnswerPolicy
    | AnswerError
    | Announce
    | Commit
    | WatchProcess
    | ForgetProcess
    | TakeReading
    | SignalPeer
    | PersistSettings
    | OpenDevices
    | CloseDevices
)
