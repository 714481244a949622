"""Replies and events as the wire shows them, and the two ways in which they are written.

Owns the shape of what goes out. A message is a struct or a map; `encode_frame` and `encode_line`
make bytes of it. The grant and the plain answer have structs of their own, because they are made
for every lease and a struct is written faster than a map.

An event that goes to many subscribers is encoded once for each mode: `EventBody` holds its pairs,
to which only the subscription and the number are added.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from gpuorchd.core.model import NS_PER_S, Denial, Lease, Reason, RequestId
from gpuorchd.core.placement import Plan
from gpuorchd.views import GpuShare, Moment, reasons_shown, seconds
from libclient.wire import vocabulary as words
from libclient.wire.framing import HEADER

_pack_length = HEADER.pack

# The daemon sets no limit in the driver yet: a grant says so.
ENFORCEMENT: Final = "advisory"
# A field of an answer that ends so is a point of the monotonic clock; it is shown in unix seconds.
AT_NS: Final = "_at_ns"

# Bounds of msgpack's short map header.
FIXMAP_MAX: Final = 15
FIXMAP: Final = 0x80


class Grant(msgspec.Struct, gc=False):
    """The answer to a `lease` that was granted."""

    id: RequestId
    agent: str
    lease_id: str
    token: str
    gpu: int
    gpus: list[GpuShare]
    timestamp: float
    waited_s: float
    expires_at: float | None
    env: dict[str, str]
    ok: bool = True
    granted: bool = True
    enforcement: str = ENFORCEMENT


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no form on the wire")


_frame_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_plain)
_line_encoder: Final = msgspec.json.Encoder(enc_hook=_plain)
_encode_frame = _frame_encoder.encode
_encode_line = _line_encoder.encode


def encode_frame(message: Any) -> bytes:
    """Write a message as a frame."""
    payload = _encode_frame(message)
    return _pack_length(len(payload)) + payload


def encode_line(message: Any) -> bytes:
    """Write a message as one line of JSON."""
    return _encode_line(message) + b"\n"


def grant(lease: Lease) -> Grant:
    """Show a lease to its owner, with the clock that it was granted by: twice the same."""
    parts = lease.parts
    wall_offset_ns = lease.granted_unix_ns - lease.granted_ns
    expires_ns = lease.expires_ns
    first = parts[0].device.facts
    if len(parts) == 1:
        visible: str = first.uuid
        shares = [GpuShare(first.index, first.uuid, parts[0].memory_mb)]
    else:
        visible = ",".join([part.device.uuid for part in parts])
        shares = [GpuShare(x.device.index, x.device.uuid, x.memory_mb) for x in parts]
    return Grant(
        lease.request_id,
        lease.ask.agent,
        lease.lease_id,
        lease.token,
        first.index,
        shares,
        lease.granted_unix_ns / NS_PER_S,
        lease.waited_ns / NS_PER_S,
        None if expires_ns is None else (expires_ns + wall_offset_ns) / NS_PER_S,
        {"CUDA_VISIBLE_DEVICES": visible},
    )


def answer(
    request_id: RequestId, fields: Mapping[str, object], moment: Callable[[], Moment]
) -> dict[str, object]:
    """Show the core's answer; points of its clock become unix seconds."""
    message: dict[str, object] = {"id": request_id, "ok": True}
    message.update(fields)
    for name in fields:
        if name.endswith(AT_NS):
            at_ns = message.pop(name)
            at_s = moment().unix_s(at_ns) if isinstance(at_ns, int) else None
            message[name.removesuffix("_ns")] = at_s
    return message


def error(request_id: RequestId, code: str, message: str, field: str | None) -> dict[str, object]:
    """Show why a request was refused."""
    shown: dict[str, object] = {
        "code": code,
        "message": message,
        "retryable": code in words.RETRYABLE,
    }
    if field is not None:
        shown["field"] = field
    return {"id": request_id, "ok": False, "error": shown}


def denial(
    request_id: RequestId, agent: str, note: str, reasons: Iterable[Reason], eta_ns: int | None
) -> dict[str, object]:
    """Show that a `lease` was not granted."""
    return {
        "id": request_id,
        "ok": True,
        "granted": False,
        "agent": agent,
        "gpu": None,
        "note": note,
        "reasons": reasons_shown(reasons),
        "eta_s": seconds(eta_ns),
    }


def explanation(result: Plan | Denial) -> dict[str, object]:
    """Show what a request would be answered now."""
    if isinstance(result, Denial):
        return {
            "would_grant": False,
            "note": result.note.value,
            "reasons": reasons_shown(result.reasons),
            "eta_s": seconds(result.eta_ns),
            "gpus": [],
        }
    shares = zip(result.devices, result.memory_mb, strict=True)
    return {
        "would_grant": True,
        "note": None,
        "reasons": [],
        "eta_s": 0.0,
        "gpus": [GpuShare(device.index, device.uuid, memory_mb) for device, memory_mb in shares],
    }


class EventBody:
    """One event, encoded once for all who are told of it."""

    __slots__ = ("_line", "_pairs", "fields", "name", "size")

    def __init__(self, name: str, fields: Mapping[str, object], unix_s: float) -> None:
        self.name = name
        self.fields = {"event": name, "time": unix_s, **fields}
        # The msgpack map without its header. The header is one byte up to 15 pairs, else three.
        encoded = _encode_frame(self.fields)
        self._pairs = encoded[1 if len(self.fields) <= FIXMAP_MAX else 3 :]
        self._line: bytes | None = None
        self.size = len(encoded)

    def frame(self, subscription: int | None, seq: int) -> bytes:
        """Write it as a frame, with its number and the subscription that it is for."""
        if subscription is None:
            added = _SEQ + _encode_frame(seq)
            count = len(self.fields) + 1
        else:
            added = _SEQ + _encode_frame(seq) + _SUBSCRIPTION + _encode_frame(subscription)
            count = len(self.fields) + 2
        head = bytes((FIXMAP | count,)) if count <= FIXMAP_MAX else _MAP16.pack(0xDE, count)
        length = len(head) + len(self._pairs) + len(added)
        return b"".join((_pack_length(length), head, self._pairs, added))

    def line(self, subscription: int | None, seq: int) -> bytes:
        """Write it as a line of JSON, with its number and the subscription that it is for."""
        if self._line is None:
            self._line = _encode_line(self.fields)[:-1]
        if subscription is None:
            return b'%b,"seq":%d}\n' % (self._line, seq)
        return b'%b,"seq":%d,"subscription":%d}\n' % (self._line, seq, subscription)


_SEQ: Final = _encode_frame("seq")
_SUBSCRIPTION: Final = _encode_frame("subscription")
_MAP16: Final = struct.Struct(">BH")
