"""What goes out has the fields of the contract, the same in both modes."""

from __future__ import annotations

import json
from types import MappingProxyType

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuorchd.core.model import (
    Ask,
    ConnectionId,
    Denial,
    Device,
    DeviceFacts,
    DeviceUuid,
    Holder,
    Lease,
    LeaseId,
    Note,
    Part,
    Priority,
    ProcessKey,
    Reason,
    Token,
)
from gpuorchd.core.placement import Plan
from gpuorchd.server import replies
from gpuorchd.server.replies import EventBody, encode_frame, encode_line
from gpuorchd.views import Moment

S = 1_000_000_000


def lease_on(*indices: int, expires_ns: int | None = None) -> Lease:
    devices = [
        Device(DeviceFacts(DeviceUuid(f"GPU-{index}"), index, "card", 1_000)) for index in indices
    ]
    return Lease(
        lease_id=LeaseId("e-1"),
        number=1,
        token=Token("t" * 32),
        conn=ConnectionId(1),
        request_id="r",
        ask=Ask("analyst"),
        holder=Holder(ProcessKey(1, 1), None, True),
        uid=0,
        priority=Priority.NORMAL,
        parts=tuple(Part(device, 500, 500, 500) for device in devices),
        granted_ns=10 * S,
        granted_unix_ns=1_010 * S,
        waited_ns=3 * S // 2,
        expires_ns=expires_ns,
    )


def test_a_grant_has_every_field_of_the_contract() -> None:
    frame = encode_frame(replies.grant(lease_on(3, 1, expires_ns=70 * S)))
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    shown = msgpack.unpackb(frame[4:])
    assert shown == {
        "id": "r",
        "ok": True,
        "granted": True,
        "agent": "analyst",
        "lease_id": "e-1",
        "token": "t" * 32,
        "gpu": 3,
        "gpus": [
            {"index": 3, "uuid": "GPU-3", "memory_mb": 500},
            {"index": 1, "uuid": "GPU-1", "memory_mb": 500},
        ],
        "timestamp": 1_010.0,
        "waited_s": 1.5,
        "expires_at": 1_070.0,
        "enforcement": "advisory",
        "env": {"CUDA_VISIBLE_DEVICES": "GPU-3,GPU-1"},
    }
    assert json.loads(encode_line(replies.grant(lease_on(3, 1, expires_ns=70 * S)))) == (shown)


def test_a_grant_without_a_time_limit_expires_never() -> None:
    grant = replies.grant(lease_on(0))
    assert grant.expires_at is None
    assert grant.env == {"CUDA_VISIBLE_DEVICES": "GPU-0"}


def test_a_denial_says_why_for_each_gpu() -> None:
    reasons = (Reason(0, Note.QUOTA, "over"), Reason(None, Note.NO_GPU, "none"))
    shown = replies.denial(7, "a", "QUOTA", reasons, 5 * S)
    assert shown == {
        "id": 7,
        "ok": True,
        "granted": False,
        "agent": "a",
        "gpu": None,
        "note": "QUOTA",
        "reasons": [
            {"gpu": 0, "reason": "QUOTA", "detail": "over"},
            {"gpu": None, "reason": "NO_GPU", "detail": "none"},
        ],
        "eta_s": 5.0,
    }


def test_an_explanation_has_the_same_fields_both_ways() -> None:
    device = Device(DeviceFacts(DeviceUuid("GPU-0"), 0, "card", 1_000))
    granted = replies.explanation(Plan((device,), (500,), (500,), False))
    refused = replies.explanation(Denial(Note.QUOTA, (), final=False))
    assert granted.keys() == refused.keys()
    assert (granted["would_grant"], granted["note"]) == (True, None)
    assert json.loads(encode_line(granted))["gpus"] == [
        {"index": 0, "uuid": "GPU-0", "memory_mb": 500}
    ]
    assert (refused["would_grant"], refused["note"], refused["gpus"]) == (False, "QUOTA", [])


def test_points_of_the_cores_clock_become_unix_time() -> None:
    fields = {"expires_at_ns": 5 * S, "ended_at_ns": None, "token": "x"}
    shown = replies.answer(1, fields, lambda: Moment(now_ns=2 * S, unix_ns=100 * S))
    assert shown == {"id": 1, "ok": True, "expires_at": 103.0, "ended_at": None, "token": "x"}


@pytest.mark.parametrize(
    ("code", "retryable"),
    [("limit", True), ("conflict", True), ("shutting_down", True), ("bad_request", False)],
)
def test_an_error_says_if_asking_again_may_help(code: str, retryable: bool) -> None:
    shown = replies.error(None, code, "why", "token")
    assert shown == {
        "id": None,
        "ok": False,
        "error": {"code": code, "message": "why", "field": "token", "retryable": retryable},
    }
    error = replies.error(1, code, "why", None)["error"]
    assert isinstance(error, dict)
    assert "field" not in error


@given(
    fields=st.dictionaries(
        st.text(max_size=6).filter(
            lambda name: name not in {"event", "time", "seq", "subscription"}
        ),
        st.none()
        | st.integers(-(2**63), 2**63)
        | st.text(max_size=9)
        | st.lists(st.integers(0, 9)),
        max_size=20,
    ),
    subscription=st.none() | st.integers(0, 2**40),
    seq=st.integers(0, 2**40),
)
def test_an_event_encoded_once_reads_as_one_encoded_whole(
    fields: dict[str, object], subscription: int | None, seq: int
) -> None:
    body = EventBody("lease.granted", MappingProxyType(fields), 5.5)
    whole = {"event": "lease.granted", "time": 5.5, **fields, "seq": seq}
    if subscription is not None:
        whole["subscription"] = subscription
    frame = body.frame(subscription, seq)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert msgpack.unpackb(frame[4:]) == whole
    line = body.line(subscription, seq)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == whole
