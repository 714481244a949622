"""Renewals of a lease with a time limit that are answered late, or never."""

from __future__ import annotations

import math

import pytest

from libclient.decision import RENEW_LEAST_S
from tests.support.proxy import grant_fields
from tests.support.session_pair import Asked, SessionPair, held_lease, ok


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


def holds_for(pair: SessionPair, ttl_s: float) -> Asked:
    return held_lease(pair, timestamp=1_000.0, expires_at=1_000.0 + ttl_s)


def turn(pair: SessionPair, after_s: float) -> list[str]:
    """Let time pass; return what is asked then."""
    pair.now_s += after_s
    pair.session.renew_due(pair.now_s)
    return [request["op"] for request in pair.asked()]


def test_a_renewal_without_an_answer_is_asked_again_and_then_the_lease_is_over(
    pair: SessionPair,
) -> None:
    caller = holds_for(pair, 30.0)
    assert turn(pair, 10) == ["renew"]
    assert turn(pair, 9) == []
    assert turn(pair, 1) == ["renew"]
    assert caller.decision.ended is None
    # The whole TTL is over: the daemon may have given the memory to another.
    assert turn(pair, 10) == ["release"]
    assert str(caller.decision.ended).startswith("expired")
    assert [event["event"] for _, event in pair.session.notices] == ["lease.expired"]
    assert turn(pair, 1_000) == []


def test_an_answer_to_the_second_of_two_renewals_is_as_good(pair: SessionPair) -> None:
    caller = holds_for(pair, 30.0)
    pair.now_s += 10
    pair.session.renew_due(pair.now_s)
    (first,) = pair.asked()
    pair.now_s += 10
    pair.session.renew_due(pair.now_s)
    (second,) = pair.asked()
    pair.send(ok(second, expires_at=1_050.0), ok(first, expires_at=1_050.0))
    assert caller.decision.live
    for _ in range(2):
        assert turn(pair, 10) == ["renew"]
    assert caller.decision.live


def test_an_answer_that_comes_after_the_end_brings_nothing_back(pair: SessionPair) -> None:
    caller = holds_for(pair, 30.0)
    pair.now_s += 10
    pair.session.renew_due(pair.now_s)
    (first,) = pair.asked()
    turn(pair, 10)
    turn(pair, 10)
    pair.send(ok(first, expires_at=1_060.0))
    assert not caller.decision.live
    assert turn(pair, 1_000) == []


def test_a_restart_of_the_daemon_gives_renewals_their_time_anew(pair: SessionPair) -> None:
    caller = holds_for(pair, 30.0)
    turn(pair, 10)
    turn(pair, 10)
    pair.resume()
    pair.asked_again()
    assert turn(pair, 10) == ["renew"]
    assert caller.decision.live


@pytest.mark.parametrize("limit", [math.inf, math.nan])
def test_a_time_limit_that_is_no_time_is_garbage(pair: SessionPair, limit: float) -> None:
    caller = Asked(pair)
    pair.send(ok(caller.request, **grant_fields(timestamp=1_000.0, expires_at=limit)))
    assert not caller.decision.live
    assert pair.session.ended is not None


def test_a_time_limit_of_nothing_is_not_renewed_all_the_time(pair: SessionPair) -> None:
    caller = holds_for(pair, 0.0)
    assert turn(pair, RENEW_LEAST_S / 2) == []
    assert turn(pair, RENEW_LEAST_S) == ["renew"]
    assert caller.decision.live
