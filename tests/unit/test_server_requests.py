"""Requests: what is right is decoded whole, what is wrong is named, and nothing raises."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuorchd.core.model import Ask, Priority
from gpuorchd.core.policy import DEFAULT, PolicyError
from gpuorchd.server.dispatch import HANDLERS
from gpuorchd.server.faults import ALLOWED, Fault, read_frame, read_line
from gpuorchd.server.replies import encode_frame, encode_line, error
from gpuorchd.server.requests import BY_OP, NESTING_MAX, Health, Lease, PolicySet, ask_of, nesting
from libclient.wire import vocabulary as words

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)
FIELDS = sorted({field for kind in BY_OP.values() for field in kind.__struct_fields__})


def check(outcome: object) -> None:
    """What a decoder returned is a request, or a fault that can be told."""
    if isinstance(outcome, Fault):
        assert outcome.code in {words.BAD_FRAME, words.BAD_REQUEST, words.UNKNOWN_OP}
        assert outcome.message.isprintable()
        assert len(outcome.message) < 600
        assert (outcome.code == words.BAD_FRAME) <= (outcome.request_id is None)
        told = error(outcome.request_id, outcome.code, outcome.message, outcome.field)
        # Whatever is found wrong can be said in both modes.
        assert encode_frame(told)
        assert encode_line(told)
    else:
        assert type(outcome) in HANDLERS


@given(st.binary(max_size=200))
def test_no_bytes_in_a_frame_raise(payload: bytes) -> None:
    check(read_frame(payload))


@given(st.binary(max_size=200))
def test_no_bytes_on_a_line_raise(line: bytes) -> None:
    outcome = read_line(line)
    if outcome is None:
        assert not line.strip()
    else:
        check(outcome)


@given(
    op=st.sampled_from([*BY_OP, "nonsense"]),
    request_id=st.integers(0, 5) | ANYTHING,
    fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), ANYTHING, max_size=6),
)
def test_no_fields_raise_and_both_modes_agree(
    op: str, request_id: object, fields: dict[str, Any]
) -> None:
    message = {**fields, "id": request_id, "op": op}
    framed = read_frame(msgpack.packb(message))
    check(framed)
    try:
        line = json.dumps(message, allow_nan=False).encode()
    except (TypeError, ValueError):
        return
    lined = read_line(line)
    check(lined)
    if request_id is not None:
        assert lined == framed


# What JSON can say, and no type or no reply can hold: halves of surrogate pairs, numbers without
# end.
ODD_JSON = st.sampled_from(
    ['"\\ud800"', '"\\udfffx"', '"\\ud83d\\ude00"', "1e999", "9" * 30, "9" * 5_000, '"a"', "1"]
)


@given(
    op=st.sampled_from([json.dumps(op) for op in BY_OP]) | ODD_JSON,
    request_id=ODD_JSON,
    fields=st.dictionaries(
        st.sampled_from([json.dumps(field) for field in FIELDS]) | ODD_JSON, ODD_JSON, max_size=3
    ),
    raw=st.sampled_from([b"", b"\xed\xa0\x80", b"\xff"]),
)
def test_odd_texts_and_numbers_on_a_line_are_answered(
    op: str, request_id: str, fields: dict[str, str], raw: bytes
) -> None:
    told = {**fields, '"id"': request_id, '"op"': op}
    line = "{" + ",".join(f"{name}:{value}" for name, value in told.items()) + "}"
    outcome = read_line(line.encode().replace(b'"a"', b'"a' + raw + b'"'))
    assert outcome is not None
    check(outcome)


@pytest.mark.parametrize("half", [rb"\ud800", b"\xed\xa0\x80"])
@pytest.mark.parametrize("where", ['"x":1e999,"op":"health","id":"a"', '"x":1e999,"op":"a","id":1'])
def test_half_a_surrogate_pair_is_no_text(where: str, half: bytes) -> None:
    line = b"{" + where.encode().replace(b'"a"', b'"' + half + b'"') + b"}"
    fault = read_line(line)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.request_id) == ("bad_frame", None)


def test_every_op_of_the_contract_has_a_request_and_a_handler() -> None:
    assert set(BY_OP) == {*words.OPEN_OPS, *words.ADMIN_OPS}
    assert {op for op, _, _ in HANDLERS.values()} == set(BY_OP)
    assert set(HANDLERS) == set(BY_OP.values())


def test_every_field_says_what_is_allowed() -> None:
    assert {*ALLOWED, "id"} == set(FIELDS)


@pytest.mark.parametrize("op", sorted(BY_OP))
def test_an_unknown_field_is_named_for_every_op(op: str) -> None:
    fault = read_frame(msgpack.packb({"id": 1, "op": op, "zzz": 1}))
    assert isinstance(fault, Fault)
    assert (fault.code, fault.field, fault.request_id) == ("bad_request", "zzz", 1)
    assert "'zzz'" in fault.message


@pytest.mark.parametrize("op", sorted(BY_OP))
def test_a_missing_field_is_named_for_every_op(op: str) -> None:
    for field in msgspec.structs.fields(BY_OP[op]):
        if field.required:
            fault = read_frame(msgpack.packb({"id": 1, "op": op}))
            assert isinstance(fault, Fault)
            assert fault.field == field.name
            assert "missing" in fault.message
            break


def test_a_whole_lease_becomes_the_cores_value() -> None:
    message = {
        "id": 1,
        "op": "lease",
        "agent": "analyst",
        "min_memory_mb": 2048,
        "gpus": 2,
        "exclusive": True,
        "share_pct": 50,
        "priority": "critical",
        "wait_s": 1.5,
        "devices": [0, "GPU-x"],
        "preemptible": True,
        "expected_s": 60,
        "purpose": "sentiment",
        "labels": {"run": "7"},
    }
    request = read_frame(msgpack.packb(message))
    assert isinstance(request, Lease)
    assert ask_of(request) == Ask(
        agent="analyst",
        memory_mb=2048,
        gpus=2,
        exclusive=True,
        priority=Priority.CRITICAL,
        wait_ns=1_500_000_000,
        devices=(0, "GPU-x"),
        preemptible=True,
        expected_ns=60_000_000_000,
        share_pct=50,
        purpose="sentiment",
        labels=(("run", "7"),),
    )


def test_a_bare_lease_is_the_cores_default() -> None:
    request = read_line(b'{"op":"lease","agent":"a"}')
    assert isinstance(request, Lease)
    assert ask_of(request) == Ask(agent="a")


@pytest.mark.parametrize(
    ("line", "code", "field"),
    [
        (b'{"op":"lease","agent":"a","expected_s":1e400}', "bad_request", "expected_s"),
        (b'{"op":"lease","agent":"a","wait_s":' + b"1" * 5_000 + b"}", "bad_request", "wait_s"),
        (b'{"op":"cancel","request_id":' + b"9" * 30 + b"}", "bad_request", "request_id"),
        (b'{"op":"lease","agent":"a","wait_s":NaN}', "bad_frame", None),
        (b'{"op":"lease","agent":"a","wait_s":Infinity}', "bad_frame", None),
        (b'{"op":"health","id":' + b"9" * 30 + b"}", "bad_request", "id"),
        (b'{"op":"policy_set","changes":{"x":1e999}}', "bad_request", "changes"),
        (b'{"op":"policy_set","changes":{"x":[{"y":-1e999}]}}', "bad_request", "changes"),
    ],
)
def test_numbers_that_no_type_holds_are_out_of_range(
    line: bytes, code: str, field: str | None
) -> None:
    fault = read_line(line)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.field) == (code, field)


@pytest.mark.parametrize("levels", [NESTING_MAX + 1, 500, 5_000, 30_000])
def test_a_message_that_nests_too_deep_is_a_bad_frame(levels: int) -> None:
    array = b"\x91" * levels + b"\x01"
    for op in (b"\xaapolicy_set", b"\xa6health", b"\xa4none"):
        fault = read_frame(b"\x83\xa2id\x01\xa2op" + op + b"\xa7changes\x81\xa1a" + array)
        assert isinstance(fault, Fault)
        assert (fault.code, fault.request_id) == ("bad_frame", None)
    line = b'{"op":"policy_set","changes":{"a":' + b"[" * levels + b"]" * levels + b"}}"
    lined = read_line(line)
    assert isinstance(lined, Fault)
    assert lined.code == "bad_frame"


def test_nesting_is_counted_by_containers() -> None:
    values: tuple[object, ...] = (1, [], {}, [[]], {"a": [1, {"b": 2}]})
    assert [nesting(value) for value in values] == [0, 1, 1, 2, 3]
    deep: object = 1
    for _ in range(10_000):
        deep = [deep]
    assert nesting(deep) == NESTING_MAX + 1


def frame_of(*pairs: tuple[str, object]) -> bytes:
    """Write a map in which keys may come twice."""
    packed = [msgpack.packb(key) + msgpack.packb(value) for key, value in pairs]
    return bytes([0x80 | len(pairs)]) + b"".join(packed)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("id", {}), ("id", 1), ("op", "health")], Health(id=1)),
        ([("id", 1), ("op", "gpu_info"), ("op", "health")], Health(id=1)),
        ([("id", 1), ("op", 7), ("op", "health")], Health(id=1)),
        ([("id", 1), ("op", "lease"), ("agent", 5), ("agent", "a")], Lease(id=1, agent="a")),
        ([("id", 1), ("op", "lease"), ("agent", "a"), ("agent", 5)], "agent"),
        ([("op", "health"), ("id", 1), ("id", {})], "id"),
        ([("id", 1), ("op", "lease"), ("op", "health"), ("agent", "a")], "agent"),
    ],
)
def test_a_key_that_comes_twice_counts_as_it_came_last(
    text: bool, pairs: list[tuple[str, object]], expected: object
) -> None:
    if text:
        inner = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs)
        outcome: object = read_line(f"{{{inner}}}".encode())
    else:
        outcome = read_frame(frame_of(*pairs))
    if isinstance(outcome, Fault):
        assert outcome.field == expected
    else:
        assert outcome == expected


@pytest.mark.parametrize(
    "pairs",
    [
        [("id", msgpack.ExtType(5, b"abc")), ("op", "health")],
        [("id", 1), ("op", msgpack.ExtType(5, b"abc"))],
        [("id", 1), ("op", "lease"), ("agent", [msgpack.ExtType(5, b"abc")])],
        [("id", 1), ("op", "health"), ("x", msgpack.ExtType(5, b"abc"))],
    ],
)
def test_what_msgpack_alone_can_say_is_shown_by_what_was_sent(
    pairs: list[tuple[str, object]],
) -> None:
    fault = read_frame(frame_of(*pairs))
    assert isinstance(fault, Fault)
    assert " object at 0x" not in fault.message
    assert fault.field == "x" or "extension type 5 of 3 bytes" in fault.message
    bare = read_frame(msgpack.packb(msgpack.ExtType(5, b"abc")))
    assert isinstance(bare, Fault)
    assert " object at 0x" not in bare.message


def test_an_extension_in_a_policy_is_shown_by_what_was_sent() -> None:
    changes = {"kill_on_oom": msgpack.ExtType(5, b"abc")}
    request = read_frame(frame_of(("id", 1), ("op", "policy_set"), ("changes", changes)))
    assert isinstance(request, PolicySet)
    with pytest.raises(PolicyError, match="is extension type 5 of 3 bytes; allowed"):
        DEFAULT.changed(request.changes, {})
