"""What a client's session makes of a lost connection, and of the next one."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest

from libclient import operations, resume
from libclient.absence import PAUSE_MAX_S, RESTART_S, Absence
from libclient.errors import RequestError, Unavailable
from libclient.session import Session
from libclient.tickets import Subscription
from tests.support.interrupts import interrupt_at
from tests.support.proxy import grant_fields
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


# -- leases


def test_a_lease_outlives_its_connection_and_is_reattached_by_its_token(pair: SessionPair) -> None:
    asked = held_lease(pair, timestamp=1_000.0, expires_at=1_030.0)
    pair.feed(b"")
    assert (asked.decision.live, asked.decision.detached) == (True, True)
    assert "detached" in repr(asked.decision)
    assert pair.session.away is not None
    pair.session.renew_due(pair.now_s + 1_000)
    assert pair.session.outgoing == b""
    (reattach,) = pair.rejoin()
    assert reattach == {"id": reattach["id"], "op": "reattach", "token": "secret-1"}
    changes = {"lease_id": "L9", "timestamp": 1_050.0, "expires_at": 1_080.0}
    pair.send(ok(reattach, **grant_fields(1, **changes)))
    tell(pair)
    assert asked.events == [{"event": "connection.resumed", "lease_id": "L9"}]
    assert (asked.decision.lease_id, asked.decision.expires_at) == ("L9", 1_080.0)
    assert (asked.decision.live, asked.decision.detached) == (True, False)
    assert pair.session.renew_at == pytest.approx(pair.now_s + 10)
    pair.send(pair.event("lease.revoked", lease_id="L9", reason="admin"))
    assert asked.decision.ended == "revoked: admin"


@pytest.mark.parametrize("code", ["unknown_token", "not_owner", "unknown_op", "forbidden"])
def test_a_lease_that_the_daemon_does_not_give_back_is_over_and_its_owner_is_told(
    pair: SessionPair, code: str
) -> None:
    asked, other = held_lease(pair, 1), held_lease(pair, 2)
    pair.feed(b"")
    first, second = pair.rejoin()
    pair.send(refused(first, code), ok(second, **grant_fields(2)))
    tell(pair)
    assert str(asked.decision.ended).startswith("lost: ")
    assert asked.events == [{"event": "connection.lost", "lease_id": "L1", "reason": code.upper()}]
    assert other.decision.live
    assert pair.session.ended is None


@pytest.mark.parametrize("code", ["limit", "shutting_down", "internal"])
def test_a_lease_that_cannot_be_reattached_for_the_moment_is_tried_again(
    pair: SessionPair, code: str
) -> None:
    asked = held_lease(pair)
    pair.feed(b"")
    (reattach,) = pair.rejoin()
    pair.send(refused(reattach, code))
    assert asked.decision.live
    assert pair.session.renew_at is not None
    pair.session.renew_due(pair.session.renew_at)
    (again,) = pair.asked()
    assert again["op"] == "reattach"
    pair.send(ok(again, **grant_fields(1)))
    assert not asked.decision.detached
    assert pair.session.renew_at is None


def test_a_connection_that_is_lost_again_reattaches_again(pair: SessionPair) -> None:
    asked = held_lease(pair)
    for _ in range(3):
        pair.feed(b"")
        (reattach,) = pair.rejoin()
    pair.send(ok(reattach, **grant_fields(1)))
    assert asked.decision.live
    assert pair.session.ended is None


def test_a_grant_that_is_not_whole_reattaches_nothing(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.feed(b"")
    (reattach,) = pair.rejoin()
    pair.send(ok(reattach, granted=False, note="NO_GPU"))
    assert pair.session.ended is not None
    assert pair.session.ended.reason == "GARBAGE"
    assert not asked.decision.live


# -- releases


def test_a_lease_that_is_released_while_the_daemon_is_away_never_comes_back(
    pair: SessionPair,
) -> None:
    asked, other = held_lease(pair, 1), held_lease(pair, 2)
    pair.feed(b"")
    result_of(operations.release(pair.session, asked.decision))
    assert asked.decision.ended == "released"
    reattach, release = pair.rejoin()
    assert (reattach["op"], reattach["token"]) == ("reattach", "secret-2")
    assert (release["op"], release["token"]) == ("release", "secret-1")
    pair.send(ok(reattach, **grant_fields(2)), refused(release, "not_owner"))
    assert other.decision.live
    assert asked.decision.ended == "released"


def test_a_release_that_was_asked_for_when_the_connection_broke_is_done_by_that(
    pair: SessionPair,
) -> None:
    asked, kept = held_lease(pair, 1), held_lease(pair, 2)
    release = operations.release(pair.session, asked.decision)
    release.send(None)
    by_token = operations.call(pair.session, "release", {"token": "another"})
    by_token.send(None)
    pair.asked()
    pair.feed(b"")
    result_of(release)
    assert result_of(by_token) == {"released": True, "token": "another"}
    requests = pair.rejoin()
    assert [request["op"] for request in requests] == ["reattach", "release", "release"]
    assert requests[0]["token"] == "secret-2"
    assert {request["token"] for request in requests[1:]} == {"secret-1", "another"}
    assert kept.decision.live


def test_a_release_crosses_the_answer_that_would_bring_the_lease_back(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.feed(b"")
    (reattach,) = pair.rejoin()
    release = operations.release(pair.session, asked.decision)
    release.send(None)
    (request,) = pair.asked()
    pair.send(ok(reattach, **grant_fields(1)), ok(request, released=True))
    result_of(release)
    assert asked.decision.ended == "released"
    assert pair.at_rest()


def test_a_caller_who_gave_up_has_nothing_brought_back(pair: SessionPair) -> None:
    kept = held_lease(pair, 2)
    asked = Asked(pair)
    pair.send(ok(asked.request, **grant_fields(1)))
    pair.feed(b"")
    with pytest.raises(KeyboardInterrupt):
        asked.operation.throw(KeyboardInterrupt())
    requests = pair.rejoin()
    assert [(request["op"], request["token"]) for request in requests] == [
        ("reattach", "secret-2"),
        ("release", "secret-1"),
    ]
    assert kept.decision.live


# -- interrupts


def at_work(pair: SessionPair) -> tuple[Asked, Asked, Asked]:
    """Hold two leases, release one, wait for a third, subscribe, and ask for a change."""
    held, given_back = held_lease(pair, 1), held_lease(pair, 2)
    waiting = Asked(pair, wait_s=60)
    pair.session.ask("subscribe", {}, Subscription(None))
    (subscribe,) = pair.asked()
    pair.send(ok(subscribe, subscription=1, seq=0))
    pair.session.ask("release", {"token": given_back.decision.token})
    pair.session.drop(given_back.decision)
    pair.session.ask("cordon", {"gpu": 0})
    pair.asked()
    return held, given_back, waiting


@pytest.mark.parametrize("what", ["part", "rejoin"])
def test_an_interrupt_at_any_step_of_losing_or_making_a_connection_loses_nothing(
    what: str,
) -> None:
    codes = {
        "part": (resume.part.__code__, resume._settle.__code__, Session.fail.__code__),
        "rejoin": (resume.rejoin.__code__, Session.ask.__code__, Session.ask_quietly.__code__),
    }[what]
    steps = 0
    while True:
        pair = SessionPair()
        held, _, waiting = at_work(pair)
        with suppress(KeyboardInterrupt), interrupt_at(steps, *codes) as struck:
            pair.feed(b"")
            pair.rejoin()
        pair.session.mend()
        if pair.session.away is None:
            # It struck before the loss was seen, which a read shows again, or after all was done.
            pair.feed(b"")
        requests = pair.rejoin()
        assert [request["op"] for request in requests] == [
            "reattach",
            "release",
            "lease",
            "subscribe",
        ]
        assert (held.decision.live, waiting.ticket.done) == (True, False)
        if not struck():
            break
        steps += 1
    assert steps > 100


# -- subscriptions


def test_a_subscription_beside_a_lease_goes_on(pair: SessionPair) -> None:
    kept = held_lease(pair)
    operation = operations.subscribe(pair.session, None)
    operation.send(None)
    (request,) = pair.asked()
    pair.send(ok(request, subscription=3, seq=0))
    subscription = result_of(operation)
    waiting = operations.next_event(pair.session, subscription)
    waiting.send(None)
    pair.feed(b"")
    reattach, again = pair.rejoin()
    assert again["op"] == "subscribe"
    assert result_of(waiting) == {"event": "connection.resumed"}
    pair.send(
        ok(reattach, **grant_fields(1)),
        ok(again, subscription=1, seq=0),
        {"event": "gpu.cordoned", "subscription": 1, "seq": 1, "time": 0.0},
    )
    assert result_of(operations.next_event(pair.session, subscription))["event"] == "gpu.cordoned"
    assert kept.decision.live


def test_a_subscription_alone_ends_with_its_connection(pair: SessionPair) -> None:
    operation = operations.subscribe(pair.session, None)
    operation.send(None)
    (request,) = pair.asked()
    pair.send(ok(request, subscription=3, seq=0))
    waiting = operations.next_event(pair.session, result_of(operation))
    waiting.send(None)
    pair.feed(b"")
    with pytest.raises(Unavailable, match="closed the connection"):
        waiting.send(None)


# -- the end


def test_nothing_to_go_on_with_is_the_end_of_the_conversation(pair: SessionPair) -> None:
    pair.feed(b"")
    assert pair.session.away is None
    with pytest.raises(Unavailable, match="closed the connection"):
        pair.session.ask("health", {})
    pair.session.begin_anew(pair.now_s)
    operation = operations.call(pair.session, "health", {})
    operation.send(None)
    (request,) = pair.rejoin()
    pair.send(refused(request, "internal"))
    with pytest.raises(RequestError):
        operation.send(None)


def test_the_callers_own_close_is_for_good(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.feed(b"")
    pair.session.close()
    assert asked.decision.ended == "closed"
    pair.session.begin_anew(pair.now_s)
    with pytest.raises(Unavailable, match="this client was closed"):
        pair.session.ask("health", {})
    assert pair.session.away is None


def test_a_sealed_connection_that_is_lost_is_lost(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.session.ask("seal", {})
    (seal,) = pair.asked()
    pair.send(ok(seal))
    pair.feed(b"")
    assert not asked.decision.live
    pair.session.begin_anew(pair.now_s)
    assert pair.session.away is None


# -- when to look


def test_the_first_look_is_at_once_and_later_ones_keep_a_gentle_pace() -> None:
    absence = Absence(Unavailable("gone"), 100.0, 0)
    assert absence.due_s == 100.0
    pauses = []
    now_s = 100.0
    for _ in range(2_000):
        absence.missed(Unavailable("nobody there"), now_s)
        pauses.append(absence.due_s - now_s)
        now_s = absence.due_s
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(pauses))
    assert pauses[0] < 0.05
    assert pauses[-1] == pytest.approx(PAUSE_MAX_S)
    assert not absence.is_long(100.0 + RESTART_S)
    assert absence.is_long(now_s)
    assert absence.fault.detail == "nobody there"
