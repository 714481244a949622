"""What a client's session makes of events, subscriptions and time limits."""

from __future__ import annotations

from typing import Any

import pytest

from libclient import operations
from libclient.errors import Unavailable
from libclient.tickets import BACKLOG_EVENTS, Ticket
from libclient.wire.vocabulary import EVENTS_LOST
from tests.support.session_pair import (
    Asked,
    SessionPair,
    held_lease,
    ok,
    refused,
    result_of,
    tell,
)


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


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


def test_what_was_lost_is_told_although_nothing_follows(pair: SessionPair) -> None:
    subscription = subscribed(pair)
    for seq in range(2, BACKLOG_EVENTS + 12):
        pair.send({"event": "lease.granted", "subscription": 3, "seq": seq, "time": 0.0})
    for _ in range(BACKLOG_EVENTS):
        result_of(operations.next_event(pair.session, subscription))
    lost = result_of(operations.next_event(pair.session, subscription))
    assert lost == {"event": EVENTS_LOST, "count": 11}
    # Once.
    assert isinstance(operations.next_event(pair.session, subscription).send(None), Ticket)
    # Also where the end has come.
    subscription.dropped = 7
    subscription.end(Unavailable("over"))
    assert result_of(operations.next_event(pair.session, subscription))["count"] == 7
    with pytest.raises(Unavailable, match="over"):
        operations.next_event(pair.session, subscription).send(None)


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
    # When it is asked again, should no answer come.
    assert pair.session.renew_at == pytest.approx(pair.now_s + 10)
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


def test_a_lease_that_was_not_renewed_for_the_moment_is_tried_again(pair: SessionPair) -> None:
    asked = held_lease(pair, timestamp=1_000.0, expires_at=1_030.0)
    pair.now_s += 10
    pair.session.renew_due(pair.now_s)
    (renew,) = pair.asked()
    pair.send(refused(renew, "internal"))
    assert asked.decision.live
    pair.session.renew_due(pair.now_s + 3)
    assert [request["op"] for request in pair.asked()] == ["renew"]


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
