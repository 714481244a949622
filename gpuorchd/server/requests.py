"""Requests as typed messages: one struct per op, compiled once into one decoder per mode.

Owns the shape of every request: fields, types, ranges. What a decoder returns has been checked
whole; what it refuses goes to `faults`, which finds out what exactly was wrong. Structs have the
names of the wire's ops and never reach the core: `ask_of` and `dispatch` turn them into its values.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from gpuorchd.core.model import NS_PER_S, Ask, Priority
from libclient.wire import vocabulary as words

# The wire has no larger integer; the decoder needs a bound that fits 64 bits.
INT_MAX: Final = 2**63 - 1
# A token, lease id or queue id of ours is far shorter; longer ones are nobody's.
NAME_CHARS: Final = 256
TOPICS_MAX: Final = 64
TOPIC_CHARS: Final = 64
# Containers inside each other in one request. A policy needs five.
NESTING_MAX: Final = 32
# Longer expectations say no more than this one; keeps sums of nanoseconds small.
EXPECTED_S_MAX: Final = 10 * 365 * 86_400
FLOAT_MAX: Final = 1.7976931348623157e308

Id = (
    Annotated[int, Meta(ge=0, le=words.REQUEST_ID_MAX)]
    | Annotated[str, Meta(min_length=1, max_length=words.REQUEST_ID_CHARS)]
)
Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS)]
Gpu = Annotated[int, Meta(ge=0, le=INT_MAX)] | Name
Text = Annotated[str, Meta(max_length=words.PURPOSE_CHARS)]
Page = Annotated[int, Meta(ge=1, le=words.PAGE_MAX)]
Uint = Annotated[int, Meta(ge=0, le=INT_MAX)]
Labels = Annotated[
    dict[
        Annotated[str, Meta(max_length=words.LABEL_NAME_CHARS)],
        Annotated[str, Meta(max_length=words.LABEL_VALUE_CHARS)],
    ],
    Meta(max_length=words.LABELS_MAX),
]

PRIORITY_OF: Final = {priority.word: priority for priority in Priority}


class Extension(NamedTuple):
    """A msgpack extension type, which no field takes; it shows as what was sent."""

    code: int
    data: memoryview

    def __repr__(self) -> str:
        return f"extension type {self.code} of {len(self.data)} bytes"


class UnprintableError(ValueError):
    """A text has a character that is not printable; `field` names it."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


class Request(msgspec.Struct, tag_field="op", forbid_unknown_fields=True, kw_only=True, gc=False):
    """What every request has. `id` None: a frame lacks it, or a line of text needs none."""

    id: Id | None = None


class Hello(Request, tag="hello"):
    """`hello`."""

    protocol: Uint | None = None
    client: Text | None = None

    def __post_init__(self) -> None:
        check_printable("client", self.client)


class Health(Request, tag="health"):
    """`health`."""


class Ready(Request, tag="ready"):
    """`ready`."""


class GpuInfo(Request, tag="gpu_info"):
    """`gpu_info`."""


class PolicyGet(Request, tag="policy_get"):
    """`policy_get`."""


class PolicySet(Request, tag="policy_set"):
    """`policy_set`. What is in `changes` is the policy's to check."""

    changes: dict[str, object]
    if_revision: Uint | None = None

    def __post_init__(self) -> None:
        # The policy walks what it is given: it must not be led deeper than it can go.
        if nesting(self.changes) >= NESTING_MAX:
            raise ValueError("changes")


class AskFields(Request):
    """The fields that `lease` and `explain` share."""

    agent: Annotated[str, Meta(min_length=1, max_length=words.AGENT_CHARS)]
    min_memory_mb: Annotated[int, Meta(ge=0, le=words.MEMORY_MB_MAX)] = 0
    gpus: Annotated[int, Meta(ge=1, le=words.GPUS_MAX)] = 1
    exclusive: bool = False
    share_pct: Annotated[int, Meta(ge=1, le=words.SHARE_PCT_MAX)] | None = None
    priority: Literal["critical", "normal", "background"] | None = None
    wait_s: Annotated[float, Meta(ge=0, le=words.WAIT_S_MAX)] = 0.0
    devices: Annotated[tuple[Gpu, ...], Meta(min_length=1, max_length=words.DEVICES_MAX)] | None = (
        None
    )
    preemptible: bool = False
    expected_s: Annotated[float, Meta(gt=0, le=FLOAT_MAX)] | None = None
    purpose: Text | None = None
    labels: Labels | None = None

    def __post_init__(self) -> None:
        # Written out because it runs for every lease.
        if not self.agent.isprintable():
            raise UnprintableError("agent")
        if self.purpose is not None:
            check_printable("purpose", self.purpose)
        if self.labels is not None:
            check_printable("labels", self.labels)


class Lease(AskFields, tag="lease"):
    """`lease`."""


class Explain(AskFields, tag="explain"):
    """`explain`."""


class Release(Request, tag="release"):
    """`release`."""

    token: Name


class Renew(Request, tag="renew"):
    """`renew`."""

    token: Name


class Reattach(Request, tag="reattach"):
    """`reattach`."""

    token: Name


class Cancel(Request, tag="cancel"):
    """`cancel`."""

    request_id: Id


class Seal(Request, tag="seal"):
    """`seal`."""

    signal: Literal["TERM", "INT", "HUP", "USR1", "USR2"] | None = None


class Allocations(Request, tag="allocations"):
    """`allocations`."""

    after: Name | None = None
    limit: Page | None = None


class Queue(Request, tag="queue"):
    """`queue`."""

    after: Name | None = None
    limit: Page | None = None


class Subscribe(Request, tag="subscribe"):
    """`subscribe`."""

    topics: (
        Annotated[
            tuple[Annotated[str, Meta(min_length=1, max_length=TOPIC_CHARS)], ...],
            Meta(min_length=1, max_length=TOPICS_MAX),
        ]
        | None
    ) = None


class Unsubscribe(Request, tag="unsubscribe"):
    """`unsubscribe`."""

    subscription: Uint


class Metrics(Request, tag="metrics"):
    """`metrics`."""


class Whoami(Request, tag="whoami"):
    """`whoami`."""


class Cordon(Request, tag="cordon"):
    """`cordon`."""

    gpu: Gpu
    reason: Text | None = None

    def __post_init__(self) -> None:
        check_printable("reason", self.reason)


class Uncordon(Request, tag="uncordon"):
    """`uncordon`."""

    gpu: Gpu


class Revoke(Request, tag="revoke"):
    """`revoke`."""

    lease_id: Name
    grace_s: Annotated[float, Meta(ge=0, le=words.GRACE_S_MAX)] = 10.0
    reason: Text | None = None

    def __post_init__(self) -> None:
        check_printable("reason", self.reason)


AnyRequest = (
    Hello
    | Health
    | Ready
    | GpuInfo
    | PolicyGet
    | PolicySet
    | Lease
    | Explain
    | Release
    | Renew
    | Reattach
    | Cancel
    | Seal
    | Allocations
    | Queue
    | Subscribe
    | Unsubscribe
    | Metrics
    | Whoami
    | Cordon
    | Uncordon
    | Revoke
)

# Every op of the contract with its request.
BY_OP: Final[dict[str, type[Request]]] = {
    str(kind.__struct_config__.tag): kind for kind in AnyRequest.__args__
}

frame_decoder: Final[msgspec.msgpack.Decoder[AnyRequest]] = msgspec.msgpack.Decoder(
    AnyRequest, ext_hook=Extension
)
text_decoder: Final[msgspec.json.Decoder[AnyRequest]] = msgspec.json.Decoder(AnyRequest)


def ask_of(request: AskFields) -> Ask:
    """Turn the fields of `lease` or `explain` into the core's value."""
    priority = request.priority
    expected_s = request.expected_s
    labels = request.labels
    return Ask(
        request.agent,
        request.min_memory_mb,
        request.gpus,
        request.exclusive,
        None if priority is None else PRIORITY_OF[priority],
        int(request.wait_s * NS_PER_S),
        request.devices or (),
        request.preemptible,
        None if expected_s is None else max(1, int(min(expected_s, EXPECTED_S_MAX) * NS_PER_S)),
        request.share_pct,
        request.purpose,
        () if labels is None else tuple(labels.items()),
    )


def check_printable(field: str, value: str | dict[str, str] | None) -> None:
    """Raise `UnprintableError` where a text, or a name or text among labels, is not printable."""
    if value is None:
        return
    texts = (value,) if isinstance(value, str) else (*value.keys(), *value.values())
    if not all(text.isprintable() for text in texts):
        raise UnprintableError(field)


def nesting(value: object) -> int:
    """Count how many containers lie inside each other, at most `NESTING_MAX` + 1."""
    depth = 0
    level: list[object] = [value]
    while depth <= NESTING_MAX:
        inside: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inside += item.values()
            elif isinstance(item, list | tuple):
                inside += item
        if not any(isinstance(item, dict | list | tuple) for item in level):
            return depth
        depth += 1
        level = inside
    return depth
