from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libclient import operations
from libclient.decision import Decision, Event
from libclient.errors import NotGranted, RequestError, RequestRefused, Unavailable
from libclient.session import CONNECTION_LOST
from libclient.tickets import BACKLOG_EVENTS, Ticket
from libclient.wire.framing import HEADER, MAX_REPLY_BYTES, frame
from libclient.wire.vocabulary import EVENTS_LOST
from tests.support.proxy import denial_fields, grant_fields
from tests.support.session_pair import SessionPair


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


def ok(request: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {"id": request["id"], "ok": True, **fields}


def refused(request: dict[str, Any], code: str) -> dict[str, Any]:
    error = {"code": code, "message": "no", "retryable": False}
    return {"id": request["id"], "ok": False, "error": error}


def result_of(operation: Generator[Ticket, None, Any]) -> Any:
    """Resume an operation whose answer is here; return what it returns."""
    with pytest.raises(StopIteration) as end:
        operation.send(None)
    return end.value.value


class Asked:
    """A lease that was asked for and not answered."""

    def __init__(self, pair: SessionPair, *, required: bool = False, **fields: object) -> None:
        self.events: list[Event] = []
        self.decision = Decision(self.events.append)
        self.operation = operations.lease(
            pair.session, self.decision, {"agent": "analyst", **fields}, required
        )
        self.ticket = self.operation.send(None)
        (self.request,) = pair.asked()


def held_lease(pair: SessionPair, number: int = 1, **changes: object) -> Asked:
    asked = Asked(pair)
    pair.send(ok(asked.request, **grant_fields(number, **changes)))
    assert asked.ticket.done
    return asked


def tell(pair: SessionPair) -> None:
    for handler, event in pair.session.notices:
        handler(event)
    pair.session.notices.clear()


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


# -- events


def test_the_owner_hears_of_its_own_leases_alone(pair: SessionPair) -> None:
    first, second = held_lease(pair, 1), held_lease(pair, 2)
    pair.send(
        pair.event("lease.revoking", lease_id="L1", reason="admin", deadline_s=10),
        pair.event("lease.over_limit", lease_id="L2", used_mb=3_000, leased_mb=2_048),
        pair.event("gpu.unhealthy", gpu=0, xid=79, lease_ids=["L2"]),
        pair.event("daemon.stopping"),
        pair.event("something.new", lease_id="L1", unheard_of=True),
    )
    tell(pair)
    assert [event["event"] for event in first.events] == [
        "lease.revoking",
        "daemon.stopping",
        "something.new",
    ]
    assert [event["event"] for event in second.events] == [
        "lease.over_limit",
        "gpu.unhealthy",
        "daemon.stopping",
    ]
    assert first.decision.revoking
    assert first.decision.deadline == 1_010.0
    assert not second.decision.revoking


@pytest.mark.parametrize(
    ("event", "fields", "ended"),
    [
        ("lease.revoked", {"reason": "admin"}, "revoked: admin"),
        ("lease.expired", {}, "expired"),
    ],
)
def test_a_lease_that_the_daemon_ends_is_over(
    pair: SessionPair, event: str, fields: dict[str, Any], ended: str
) -> None:
    asked = held_lease(pair)
    pair.send(pair.event(event, lease_id="L1", **fields))
    assert asked.decision.ended == ended
    assert not asked.decision.live
    assert pair.at_rest()
    result_of(operations.release(pair.session, asked.decision))
    assert pair.asked() == []


def test_one_who_waits_hears_of_its_place(pair: SessionPair) -> None:
    asked = Asked(pair, wait_s=5)
    request_id = asked.request["id"]
    pair.send(pair.event("lease.queued", request_id=request_id, position=2, ahead=1))
    tell(pair)
    assert [event["position"] for event in asked.events] == [2]


def test_events_of_others_and_unknown_ones_are_ignored(pair: SessionPair) -> None:
    pair.send(
        pair.event("lease.revoked", lease_id="L99", reason="x"),
        pair.event("lease.queued", request_id="not mine", position=1, ahead=0),
        {"event": "lease.granted", "subscription": 5, "seq": 1, "time": 0.0},
        pair.event("never.heard_of"),
    )
    assert pair.session.ended is None
    assert pair.session.notices == []


def test_events_that_are_missing_are_told_and_a_seq_that_falls_is_garbage(
    pair: SessionPair,
) -> None:
    asked = held_lease(pair)
    pair.send(
        {"event": "daemon.safe_mode", "seq": 1, "time": 0.0},
        {"event": "daemon.safe_mode", "seq": 4, "time": 0.0},
    )
    tell(pair)
    assert asked.events[1] == {"event": EVENTS_LOST, "count": 2}
    pair.send({"event": "daemon.safe_mode", "seq": 4, "time": 0.0})
    assert pair.session.ended is not None
    assert pair.session.ended.reason == "GARBAGE"


def test_a_lost_connection_ends_every_lease_and_tells_its_owner(pair: SessionPair) -> None:
    asked = held_lease(pair)
    waiting = Asked(pair)
    pair.feed(b"")
    tell(pair)
    assert [event["event"] for event in asked.events] == [CONNECTION_LOST]
    assert asked.decision.ended is not None
    assert "connection lost" in asked.decision.ended
    assert result_of(waiting.operation).reason == "NO_DAEMON"


def test_a_daemon_that_comes_back_on_the_connection_ends_it(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.send(pair.event("daemon.resumed", epoch="e", nonce=b"0" * 16))
    assert not asked.decision.live
    assert pair.session.ended is not None
    assert pair.session.ended.reason == "NO_DAEMON"


# -- subscriptions


def subscribed(pair: SessionPair, number: int = 3) -> Any:
    operation = operations.subscribe(pair.session, None)
    operation.send(None)
    (request,) = pair.asked()
    pair.send(
        ok(request, subscription=number, seq=0),
        {"event": "gpu.cordoned", "subscription": number, "seq": 1, "time": 0.0},
    )
    return result_of(operation)


def test_events_that_follow_a_subscription_in_one_breath_are_kept(pair: SessionPair) -> None:
    subscription = subscribed(pair)
    event = result_of(operations.next_event(pair.session, subscription))
    assert event["event"] == "gpu.cordoned"


def test_a_subscriber_that_does_not_take_its_events_is_told_how_many_it_lost(
    pair: SessionPair,
) -> None:
    subscription = subscribed(pair)
    for seq in range(2, BACKLOG_EVENTS + 12):
        pair.send({"event": "lease.granted", "subscription": 3, "seq": seq, "time": 0.0})
    assert len(subscription.events) == BACKLOG_EVENTS
    taken = [
        result_of(operations.next_event(pair.session, subscription)) for _ in range(BACKLOG_EVENTS)
    ]
    assert taken[-1]["seq"] == BACKLOG_EVENTS
    seq = BACKLOG_EVENTS + 12
    pair.send({"event": "lease.granted", "subscription": 3, "seq": seq, "time": 0.0})
    lost = result_of(operations.next_event(pair.session, subscription))
    assert lost == {"event": EVENTS_LOST, "count": 11}
    assert result_of(operations.next_event(pair.session, subscription))["seq"] == seq


def test_two_who_wait_for_one_subscription_are_told_apart(pair: SessionPair) -> None:
    subscription = subscribed(pair)
    result_of(operations.next_event(pair.session, subscription))
    first = operations.next_event(pair.session, subscription)
    first.send(None)
    with pytest.raises(ValueError, match="another thread or task"):
        operations.next_event(pair.session, subscription).send(None)
    first.close()


def test_an_ended_subscription_ends_its_waiter(pair: SessionPair) -> None:
    subscription = subscribed(pair)
    result_of(operations.next_event(pair.session, subscription))
    waiting = operations.next_event(pair.session, subscription)
    ticket = waiting.send(None)
    operations.unsubscribe(pair.session, subscription).send(None)
    assert ticket.done
    with pytest.raises(Unavailable, match="was ended"):
        waiting.send(None)


# -- renewals


def test_a_lease_with_a_ttl_is_renewed_at_a_third_of_it(pair: SessionPair) -> None:
    asked = held_lease(pair, timestamp=1_000.0, expires_at=1_030.0)
    assert pair.session.renew_at == pytest.approx(pair.now_s + 10)
    pair.session.renew_due(pair.now_s + 9)
    assert pair.asked() == []
    pair.now_s += 10
    pair.session.renew_due(pair.now_s)
    (renew,) = pair.asked()
    assert (renew["op"], renew["token"]) == ("renew", "secret-1")
    assert pair.session.renew_at is None
    pair.send(ok(renew, expires_at=1_040.0))
    assert asked.decision.expires_at == 1_040.0
    assert pair.session.renew_at == pytest.approx(pair.now_s + 10)


def test_a_lease_that_cannot_be_renewed_is_over(pair: SessionPair) -> None:
    asked = held_lease(pair, timestamp=1_000.0, expires_at=1_030.0)
    pair.session.renew_due(pair.now_s + 10)
    (renew,) = pair.asked()
    pair.send(refused(renew, "unknown_token"))
    assert not asked.decision.live
    assert pair.session.renew_at is None


def test_a_released_lease_is_not_renewed(pair: SessionPair) -> None:
    asked = held_lease(pair, timestamp=1_000.0, expires_at=1_030.0)
    operations.release(pair.session, asked.decision).send(None)
    pair.asked()
    pair.session.renew_due(pair.now_s + 100)
    assert pair.asked() == []


def test_a_sealed_connection_only_holds(pair: SessionPair) -> None:
    asked = held_lease(pair, timestamp=1_000.0, expires_at=1_030.0)
    operation = operations.call(pair.session, "seal", {"signal": "TERM"})
    operation.send(None)
    (request,) = pair.asked()
    pair.send(ok(request))
    result_of(operation)
    assert pair.session.sealed
    assert asked.decision.live
    assert asked.decision.expires_at is None
    pair.session.renew_due(pair.now_s + 1_000)
    assert pair.asked() == []
    with pytest.raises(Unavailable, match="sealed"):
        pair.session.ask("health", {})
    pair.feed(b"")
    assert not asked.decision.live
