"""The client's conversation with a daemon, back to back with the daemon's end, without sockets."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libclient import operations
from libclient.decision import Decision
from libclient.errors import NotGranted, RequestError, RequestRefused, Unavailable
from libclient.wire.framing import HEADER, MAX_REPLY_BYTES, frame
from tests.support.proxy import denial_fields, grant_fields
from tests.support.session_pair import Asked, SessionPair, held_lease, ok, refused, result_of


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


# -- requests and replies


def test_a_request_carries_what_was_asked_and_an_id_of_its_own(pair: SessionPair) -> None:
    pair.session.ask("gpu_info", {})
    pair.session.ask("explain", {"agent": "x"})
    first, second = pair.asked()
    assert first["op"] == "gpu_info"
    assert second == {"id": second["id"], "op": "explain", "agent": "x"}
    assert first["id"] != second["id"]


def test_answers_find_their_requests_in_any_order(pair: SessionPair) -> None:
    tickets = [pair.session.ask(op, {}) for op in ("health", "ready", "whoami")]
    requests = pair.asked()
    for request in reversed(requests):
        pair.send(ok(request, op=request["op"]))
    assert [ticket.result()["op"] for ticket in tickets] == ["health", "ready", "whoami"]


@given(sizes=st.lists(st.integers(1, 40), max_size=60))
def test_how_the_stream_is_cut_makes_no_difference(sizes: list[int]) -> None:
    pair = SessionPair()
    asked = [Asked(pair), Asked(pair)]
    messages = [
        ok(asked[0].request, **grant_fields(1)),
        pair.event("lease.revoking", lease_id="L1", reason="x", deadline_s=3.0),
        ok(asked[1].request, **denial_fields()),
    ]
    pair.send_in_pieces(messages, sizes)
    assert asked[0].decision.revoking
    assert asked[0].decision.deadline == 1_003.0
    assert asked[1].decision.reason == "INSUFFICIENT_MEMORY"


def test_a_refusal_is_raised_with_its_code(pair: SessionPair) -> None:
    operation = operations.call(pair.session, "cordon", {"gpu": 9})
    operation.send(None)
    (request,) = pair.asked()
    error = {"code": "not_found", "message": "no GPU 9", "field": "gpu", "retryable": False}
    pair.send({"id": request["id"], "ok": False, "error": error})
    with pytest.raises(RequestError, match=r"not_found: no GPU 9 \(field gpu\)") as caught:
        operation.send(None)
    assert (caught.value.code, caught.value.field, caught.value.retryable) == (
        "not_found",
        "gpu",
        False,
    )


def test_a_call_returns_the_fields_alone(pair: SessionPair) -> None:
    operation = operations.call(pair.session, "health", {})
    operation.send(None)
    (request,) = pair.asked()
    pair.send(ok(request, status="ok", new_in_a_later_version=[1]))
    assert result_of(operation) == {"status": "ok", "new_in_a_later_version": [1]}


def test_a_request_that_is_too_large_is_the_callers_error_and_ends_nothing(
    pair: SessionPair,
) -> None:
    with pytest.raises(ValueError, match="at most 65536"):
        pair.session.ask("policy_set", {"changes": {"x": "y" * 70_000}})
    assert pair.session.ended is None
    pair.session.ask("health", {})
    assert [request["op"] for request in pair.asked()] == ["health"]


# -- what breaks the contract


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (frame(b"\xc1"), "not msgpack"),
        (frame(msgpack.packb([1, 2])), "a list, not a map"),
        (frame(msgpack.packb("hello")), "a str, not a map"),
        (frame(msgpack.packb({1: 2})), "not msgpack"),
        (frame(msgpack.packb({"id": 1})), "neither a reply nor an event"),
        (frame(msgpack.packb({"ok": True, "id": 99})), "nothing that was asked"),
        (frame(msgpack.packb({"ok": True, "id": [1]})), "nothing that was asked"),
        (frame(msgpack.packb({"ok": True})), "nothing that was asked"),
        (frame(msgpack.packb({"ok": 1, "id": 1})), "without its code"),
        (frame(msgpack.packb({"ok": False, "id": 1, "error": "no"})), "without its code"),
        (frame(msgpack.packb({"event": 5, "seq": 1})), "neither a reply nor an event"),
        (frame(msgpack.packb({"event": "lease.queued"})), "seq is None"),
        (HEADER.pack(0), "no bytes"),
        (HEADER.pack(MAX_REPLY_BYTES + 1), "at most"),
        (b"HTTP/1.1 400 Bad Request\r\n", "at most"),
    ],
)
def test_garbage_ends_the_session_and_fails_what_was_asked(
    pair: SessionPair, data: bytes, says: str
) -> None:
    ticket = pair.session.ask("health", {})
    pair.feed(data)
    with pytest.raises(Unavailable, match=says) as caught:
        ticket.result()
    assert caught.value.reason == "GARBAGE"
    with pytest.raises(Unavailable, match="garbage"):
        pair.session.ask("health", {})


def test_what_the_daemon_could_not_read_is_said(pair: SessionPair) -> None:
    ticket = pair.session.ask("health", {})
    error = {"code": "bad_frame", "message": "trailing bytes", "retryable": False}
    pair.send({"id": None, "ok": False, "error": error})
    with pytest.raises(Unavailable, match="bad_frame: trailing bytes"):
        ticket.result()


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=8))
def test_no_bytes_whatever_make_the_session_raise(pieces: list[bytes]) -> None:
    pair = SessionPair()
    ticket = pair.session.ask("lease", {"agent": "a"}, Decision())
    for piece in pieces:
        pair.feed(piece)
    pair.feed(b"")
    # It may be asked again on another connection, until its caller's time is over.
    pair.session.end("no daemon came")
    assert ticket.done
    with pytest.raises(Unavailable):
        ticket.result()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(
    changes=st.dictionaries(st.sampled_from([*grant_fields(), "ok", "error", "note"]), _VALUES),
    event=st.dictionaries(st.sampled_from(["seq", "lease_id", "time", "deadline_s"]), _VALUES),
)
def test_a_reply_of_any_content_gives_a_whole_grant_or_none(
    changes: dict[str, Any], event: dict[str, Any]
) -> None:
    pair = SessionPair()
    asked = Asked(pair)
    pair.send({"id": asked.request["id"], "ok": True, **grant_fields(1), **changes})
    pair.send({"event": "lease.revoking", "seq": 1, "lease_id": "L1", **event})
    pair.feed(b"")
    decision = result_of(asked.operation)
    if decision.granted:
        assert all(type(value) is str for value in decision.env.values())
        assert type(decision.memory_mb) is int
        assert type(decision.token) is str
        assert decision.device == "cuda:0"
    else:
        assert decision.device == "cpu"
        assert decision.reason
        assert decision.env == {"CUDA_VISIBLE_DEVICES": ""}
    repr(decision)


# -- leases


def test_a_grant_holds_what_it_says_and_hides_its_token(pair: SessionPair) -> None:
    asked = held_lease(pair)
    decision = result_of(asked.operation)
    assert decision is asked.decision
    assert decision.granted
    assert decision.live
    assert decision.device == "cuda:0"
    assert decision.reason == ""
    assert decision.env == {"CUDA_VISIBLE_DEVICES": "GPU-0"}
    assert decision.gpus == [{"index": 0, "uuid": "GPU-0", "memory_mb": 2_048}]
    assert decision.memory_mb == 2_048
    assert decision.token == "secret-1"
    assert "secret" not in repr(decision)


def test_a_denial_is_for_the_cpu_and_says_why(pair: SessionPair) -> None:
    asked = Asked(pair)
    pair.send(ok(asked.request, **denial_fields()))
    decision = result_of(asked.operation)
    assert not decision.granted
    assert decision.device == "cpu"
    assert decision.reason == "INSUFFICIENT_MEMORY"
    assert decision.detail == "gpu 0: needs 2048 MiB, 512 MiB free"
    assert decision.eta_s == 1.5
    assert decision.memory_mb == 0
    assert pair.at_rest()


def test_a_denial_is_raised_where_the_caller_asked_for_it(pair: SessionPair) -> None:
    asked = Asked(pair, required=True)
    pair.send(ok(asked.request, **denial_fields("SAFE_MODE")))
    with pytest.raises(NotGranted, match="SAFE_MODE") as caught:
        asked.operation.send(None)
    assert caught.value.reason == "SAFE_MODE"


@pytest.mark.parametrize("code", ["bad_request", "forbidden"])
def test_the_callers_own_mistake_is_for_the_cpu_and_warned_of(pair: SessionPair, code: str) -> None:
    asked = Asked(pair)
    pair.send(refused(asked.request, code))
    with pytest.warns(RequestRefused, match=code):
        decision = result_of(asked.operation)
    assert decision.reason == code.upper()


@pytest.mark.parametrize("code", ["limit", "shutting_down", "internal"])
def test_the_daemons_refusal_is_for_the_cpu_without_a_word(pair: SessionPair, code: str) -> None:
    asked = Asked(pair)
    pair.send(refused(asked.request, code))
    assert result_of(asked.operation).reason == code.upper()


def test_a_grant_that_is_not_whole_is_no_grant(pair: SessionPair) -> None:
    asked = Asked(pair)
    pair.send(ok(asked.request, **grant_fields(1, env={"CUDA_VISIBLE_DEVICES": 0})))
    decision = result_of(asked.operation)
    assert not decision.granted
    assert decision.reason == "GARBAGE"
    assert pair.session.ended is not None


def test_a_release_asks_once(pair: SessionPair) -> None:
    asked = held_lease(pair)
    release = operations.release(pair.session, asked.decision)
    release.send(None)
    (request,) = pair.asked()
    assert request == {"id": request["id"], "op": "release", "token": "secret-1"}
    pair.send(ok(request, released=True))
    result_of(release)
    assert asked.decision.ended == "released"
    assert pair.at_rest()
    result_of(operations.release(pair.session, asked.decision))
    assert pair.asked() == []


def test_a_release_of_what_the_daemon_ended_already_is_no_error(pair: SessionPair) -> None:
    asked = held_lease(pair)
    release = operations.release(pair.session, asked.decision)
    release.send(None)
    (request,) = pair.asked()
    pair.send(refused(request, "unknown_token"))
    result_of(release)


# -- callers who gave up


def test_a_grant_that_comes_too_late_is_released_at_once(pair: SessionPair) -> None:
    asked = Asked(pair, wait_s=5)
    with pytest.raises(StopIteration) as end:
        asked.operation.throw(Unavailable("no answer", "TIMEOUT"))
    assert end.value.value.reason == "TIMEOUT"
    (cancel,) = pair.asked()
    assert cancel["op"] == "cancel"
    assert cancel["request_id"] == asked.request["id"]
    assert not pair.at_rest()
    pair.send(ok(asked.request, **grant_fields(7)), refused(cancel, "unknown_request"))
    (release,) = pair.asked()
    assert (release["op"], release["token"]) == ("release", "secret-7")
    pair.send(ok(release, released=True))
    assert pair.at_rest()
    assert pair.session.ended is None
    assert not asked.decision.granted


def test_a_wait_that_its_caller_left_is_cancelled(pair: SessionPair) -> None:
    asked = Asked(pair, wait_s=600)
    with pytest.raises(KeyboardInterrupt):
        asked.operation.throw(KeyboardInterrupt())
    (cancel,) = pair.asked()
    pair.send(ok(cancel, cancelled=True), ok(asked.request, **denial_fields("CANCELLED")))
    assert pair.at_rest()
    assert pair.session.ended is None


def test_a_grant_that_crosses_the_callers_end_is_released(pair: SessionPair) -> None:
    asked = held_lease(pair)
    with pytest.raises(KeyboardInterrupt):
        asked.operation.throw(KeyboardInterrupt())
    (release,) = pair.asked()
    assert (release["op"], release["token"]) == ("release", "secret-1")
    assert not asked.decision.live


def test_an_answer_that_an_interrupt_swallowed_ends_the_connection(pair: SessionPair) -> None:
    asked = Asked(pair)
    with pytest.raises(KeyboardInterrupt):
        asked.operation.throw(KeyboardInterrupt())
    (cancel,) = pair.asked()
    # The lease does not wait, and its answer, which came first, is nowhere.
    pair.send(refused(cancel, "unknown_request"))
    assert pair.session.ended is not None
    assert pair.session.ended.reason == "CLOSED"


def test_input_that_was_interrupted_half_way_ends_the_connection(pair: SessionPair) -> None:
    asked = Asked(pair)

    def interrupt() -> None:
        raise KeyboardInterrupt

    asked.ticket.wake = interrupt
    with pytest.raises(KeyboardInterrupt):
        pair.send(ok(asked.request, **grant_fields(1)))
    with pytest.raises(KeyboardInterrupt):
        asked.operation.throw(KeyboardInterrupt())
    assert pair.session.ended is not None
    assert not asked.decision.live


def test_a_subscription_that_comes_too_late_is_ended(pair: SessionPair) -> None:
    operation = operations.subscribe(pair.session, ["lease.*"])
    operation.send(None)
    (request,) = pair.asked()
    assert request["topics"] == ["lease.*"]
    with pytest.raises(Unavailable):
        operation.throw(Unavailable("no answer", "TIMEOUT"))
    pair.send(ok(request, subscription=4, seq=0))
    (undo,) = pair.asked()
    assert (undo["op"], undo["subscription"]) == ("unsubscribe", 4)
    pair.send(ok(undo))
    assert pair.at_rest()
