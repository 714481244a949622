"""What was wrong with a request that the typed decoders refused, said exactly.

This is the slow path: it decodes without types and then looks field by field, so that the reply can
name the field, its value and what is allowed. Where a key came twice, the message may be right by
what came last: then it is the request after all. Order of looking: is it a message at all
(`bad_frame`), its id, its op, fields that do not exist, fields that are missing or wrong.

Nothing here raises for anything that a peer can send.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from gpuorchd.core.model import RequestId
from gpuorchd.server.requests import (
    BY_OP,
    EXPECTED_S_MAX,
    NAME_CHARS,
    NESTING_MAX,
    TOPIC_CHARS,
    TOPICS_MAX,
    AnyRequest,
    Extension,
    Id,
    Request,
    UnprintableError,
    check_printable,
    frame_decoder,
    nesting,
    text_decoder,
)
from libclient.wire import vocabulary as words

# Enough to recognise a value by; the rest of it is the sender's.
SHOWN_CHARS: Final = 80
# Longer numbers are out of every range, and turning them into an int takes quadratic time.
DIGITS_MAX: Final = 40

ID_ALLOWED: Final = (
    f"a whole number from 0 to {words.REQUEST_ID_MAX} or a text of 1 to "
    f"{words.REQUEST_ID_CHARS} characters"
)
_NAME: Final = f"a text of 1 to {NAME_CHARS} characters"
_TEXT: Final = f"a text of at most {words.PURPOSE_CHARS} printable characters"
_UINT: Final = "a whole number from 0"
_GPU: Final = "the uuid of a GPU or its index"

ALLOWED: Final[Mapping[str, str]] = {
    "protocol": _UINT,
    "client": _TEXT,
    "changes": "a map of policy fields",
    "if_revision": _UINT,
    "agent": f"a text of 1 to {words.AGENT_CHARS} printable characters",
    "min_memory_mb": f"a whole number from 0 to {words.MEMORY_MB_MAX}",
    "gpus": f"a whole number from 1 to {words.GPUS_MAX}",
    "exclusive": "true or false",
    "share_pct": f"a whole number from 1 to {words.SHARE_PCT_MAX}",
    "priority": ", ".join(words.PRIORITIES),
    "wait_s": f"seconds from 0 to {words.WAIT_S_MAX}",
    "devices": f"a list of 1 to {words.DEVICES_MAX} uuids or indices",
    "preemptible": "true or false",
    "expected_s": f"seconds above 0; more than {EXPECTED_S_MAX} counts as that",
    "purpose": _TEXT,
    "labels": (
        f"a map of at most {words.LABELS_MAX} texts by name, printable, names of at most "
        f"{words.LABEL_NAME_CHARS} and texts of at most {words.LABEL_VALUE_CHARS} characters"
    ),
    "token": _NAME,
    "request_id": ID_ALLOWED,
    "signal": ", ".join(words.SEAL_SIGNALS),
    "after": f"the `next` of an earlier page, {_NAME}",
    "limit": f"a whole number from 1 to {words.PAGE_MAX}",
    "topics": f"a list of 1 to {TOPICS_MAX} texts of 1 to {TOPIC_CHARS} characters",
    "subscription": _UINT,
    "gpu": _GPU,
    "reason": _TEXT,
    "lease_id": _NAME,
    "grace_s": f"seconds from 0 to {words.GRACE_S_MAX}",
}
PRINTABLE: Final = frozenset({"agent", "purpose", "labels", "client", "reason"})
# JSON that is not a map although it looks like the bare name of an op.
JSON_WORDS: Final = frozenset({"null", "true", "false"})


class Fault(NamedTuple):
    """Why a request is refused. `request_id` is None where it had none that can be used."""

    code: str
    message: str
    field: str | None = None
    request_id: RequestId = None
    # The op, where it is one of the contract: for counting.
    op: str | None = None


def read_frame(payload: bytes | memoryview) -> AnyRequest | Fault:
    """Decode the payload of one frame."""
    try:
        return frame_decoder.decode(payload)
    except (ValueError, RecursionError):
        # msgspec's errors and UnicodeDecodeError are ValueErrors.
        return _frame_fault(payload)


def read_line(line: bytes) -> AnyRequest | Fault | None:
    """Decode one line of text without its end; None for a blank one."""
    line = line.strip()
    if line.startswith(b"{"):
        try:
            return text_decoder.decode(line)
        except (ValueError, RecursionError):
            return _line_fault(line)
    if not line:
        return None
    word = line.decode("utf-8", "replace")
    if word in JSON_WORDS or not word.isascii() or not word.replace("_", "a").isalnum():
        return _bad_frame(f"the line {show(word)} is neither a JSON object nor the name of an op")
    if word.isdecimal():
        return _bad_frame(f"the line {show(word)} is a number, not a JSON object")
    kind = BY_OP.get(word)
    if kind is not None:
        try:
            request: AnyRequest = msgspec.convert({"op": word}, AnyRequest)
        except msgspec.ValidationError:
            pass
        else:
            return request
    return _request_fault({"op": word}, text=True)


def missing_id(op: str) -> Fault:
    """Refuse a frame without an id."""
    return Fault(words.BAD_REQUEST, f"id is missing; allowed: {ID_ALLOWED}", "id", None, op)


def repeated_id(request_id: RequestId, op: str | None) -> Fault:
    """Refuse a request whose id is still in use on its connection."""
    return Fault(
        words.BAD_REQUEST,
        f"id {show(request_id)} is in use: its request is unanswered or its lease lives",
        "id",
        None,
        op,
    )


def show(value: object) -> str:
    """Write a value for a message: escaped, and no longer than a line."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


def _bad_frame(message: str) -> Fault:
    return Fault(words.BAD_FRAME, message)


def _frame_fault(payload: bytes | memoryview) -> AnyRequest | Fault:
    try:
        raw = msgspec.msgpack.decode(payload, ext_hook=Extension)
    except RecursionError:
        return _too_deep()
    except ValueError as error:
        return _bad_frame(f"the frame of {len(payload)} bytes is not one msgpack value: {error}")
    return _message_fault(raw, text=False)


def _line_fault(line: bytes) -> AnyRequest | Fault:
    try:
        try:
            raw = msgspec.json.decode(line)
        except msgspec.ValidationError:
            # Good JSON with a number that no type holds: out of range, not malformed.
            raw = _lenient(line)
    except RecursionError:
        return _too_deep()
    except ValueError as error:
        return _bad_frame(f"the line of {len(line)} bytes is not JSON: {error}")
    return _message_fault(raw, text=True)


def _lenient(line: bytes) -> object:
    """Decode JSON whatever its numbers. Raises ValueError for all else that is not JSON."""
    raw: object = json.loads(line.decode(), parse_int=_whole_number, parse_constant=_not_json)
    # Python's decoder lets half a surrogate pair through, which no reply could repeat.
    json.dumps(raw, ensure_ascii=False).encode()
    return raw


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= DIGITS_MAX else float("inf")


def _not_json(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _too_deep() -> Fault:
    return _bad_frame(f"the message nests deeper than {NESTING_MAX} levels")


def _message_fault(raw: object, *, text: bool) -> AnyRequest | Fault:
    if not isinstance(raw, dict):
        return _bad_frame(f"the message is not a map but {show(raw)}")
    for key in raw:
        if not isinstance(key, str):
            return _bad_frame(f"the map has the key {show(key)}; allowed: text keys")
    if nesting(raw) > NESTING_MAX:
        return _too_deep()
    return _request_fault(raw, text=text)


def _request_fault(raw: Mapping[str, Any], *, text: bool) -> AnyRequest | Fault:
    """Say what is wrong with a message whose keys are there once, each as it came last.

    It may be right so: the typed decoders look at a key each time that it comes.
    """
    request_id = raw.get("id")
    op = raw.get("op")
    kind = BY_OP.get(op) if isinstance(op, str) else None
    known = op if kind is not None else None
    if request_id is None:
        if not text:
            return missing_id(known or "")._replace(op=known)
    elif not _fits(request_id, Id):
        message = f"id is {show(request_id)}; allowed: {ID_ALLOWED}"
        return Fault(words.BAD_REQUEST, message, "id", None, known)
    if "op" not in raw:
        message = "op is missing; allowed: the name of an op"
        return Fault(words.BAD_REQUEST, message, "op", request_id)
    if not isinstance(op, str):
        message = f"op is {show(op)}; allowed: the name of an op"
        return Fault(words.BAD_REQUEST, message, "op", request_id)
    if kind is None:
        message = f"there is no op {show(op)}; allowed: {', '.join(BY_OP)}"
        return Fault(words.UNKNOWN_OP, message, "op", request_id)
    found = _field_fault(raw, kind, op)
    if found is not None:
        return Fault(words.BAD_REQUEST, *found, request_id, op)
    try:
        request: AnyRequest = msgspec.convert(raw, AnyRequest)
    except (ValueError, RecursionError):
        # Not known to happen, but a peer must not be able to find out.
        message = f"the request cannot be read as {op}"
        return Fault(words.BAD_REQUEST, message, None, request_id, op)
    return request


def _field_fault(raw: Mapping[str, Any], kind: type[Request], op: str) -> tuple[str, str] | None:
    """Find what is wrong with a field; None where every one is right by itself."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name in raw:
        if name != "op" and name not in fields:
            allowed = ", ".join(field for field in fields if field != "id") or "none"
            return f"{op} has no field {show(name)}; allowed: {allowed}", name[:SHOWN_CHARS]
    for name, field in fields.items():
        if name == "id":
            continue
        if name not in raw:
            if field.required:
                return f"{name} is missing; allowed: {ALLOWED[name]}", name
        elif not _fits(raw[name], field.type) or not _printable(name, raw[name]):
            return f"{name} is {show(raw[name])}; allowed: {ALLOWED[name]}", name
    for name in fields:
        if name in raw and _holds_infinity(raw[name]):
            return f"{name} holds a number that is out of every range", name
    return None


def _holds_infinity(value: object) -> bool:
    """Whether there is a number in a value that JSON can say and no type can hold."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, float) and math.isinf(item):
            return True
        if isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list):
            left += item
    return False


def _fits(value: object, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError):
        return False
    return True


def _printable(name: str, value: Any) -> bool:
    if name not in PRINTABLE:
        return True
    try:
        check_printable(name, value)
    except UnprintableError:
        return False
    return True
