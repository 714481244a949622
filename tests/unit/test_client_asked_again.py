"""What becomes of requests without an answer when a client's connection is lost."""

from __future__ import annotations

import pytest

from libclient import operations
from libclient.absence import REFUSALS_MAX
from libclient.errors import Unavailable
from tests.support.proxy import grant_fields
from tests.support.session_pair import (
    Asked,
    SessionPair,
    held_lease,
    ok,
    result_of,
)


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


def test_a_waiting_lease_is_asked_for_again_with_what_is_left_of_its_wait(
    pair: SessionPair,
) -> None:
    asked = Asked(pair, wait_s=60)
    asked.ticket.deadline_s = pair.now_s + 62
    pair.now_s += 10
    pair.feed(b"")
    pair.now_s += 5
    (again,) = pair.rejoin()
    assert again == {**asked.request, "wait_s": pytest.approx(45)}
    pair.send(ok(again, **grant_fields(1)))
    assert result_of(asked.operation).live


def test_a_lease_that_does_not_wait_is_asked_for_again(pair: SessionPair) -> None:
    asked = Asked(pair)
    pair.feed(b"")
    assert pair.rejoin() == [asked.request]


@pytest.mark.parametrize(
    "op", ["health", "ready", "gpu_info", "policy_get", "allocations", "queue", "explain", "whoami"]
)
def test_a_question_is_asked_again(pair: SessionPair, op: str) -> None:
    operation = operations.call(pair.session, op, {})
    operation.send(None)
    (request,) = pair.asked()
    pair.feed(b"")
    assert pair.rejoin() == [request]
    pair.send(ok(request, value=1))
    assert result_of(operation) == {"value": 1}


@pytest.mark.parametrize("op", ["policy_set", "cordon", "uncordon", "revoke", "seal", "new_one"])
def test_a_change_that_may_have_been_made_is_not_sent_twice(pair: SessionPair, op: str) -> None:
    kept = held_lease(pair)
    operation = operations.call(pair.session, op, {})
    operation.send(None)
    pair.asked()
    pair.feed(b"")
    with pytest.raises(Unavailable) as caught:
        operation.send(None)
    assert caught.value.reason == "NO_DAEMON"
    assert [request["op"] for request in pair.rejoin()] == ["reattach"]
    assert kept.decision.live


@pytest.mark.parametrize("sent_bytes", [0, 5])
def test_a_change_that_was_not_sent_whole_is_sent(pair: SessionPair, sent_bytes: int) -> None:
    operation = operations.call(pair.session, "cordon", {"gpu": 0})
    operation.send(None)
    pair.session.outgoing = pair.session.outgoing[sent_bytes:]
    pair.feed(b"")
    (request,) = pair.rejoin()
    assert (request["op"], request["gpu"]) == ("cordon", 0)


def test_a_change_that_another_process_may_have_made_is_not_sent_to_a_third(
    pair: SessionPair,
) -> None:
    operation = operations.call(pair.session, "cordon", {"gpu": 0})
    operation.send(None)
    pair.asked()
    # The marker and the request are not out yet, but the process before had the request.
    pair.resume()
    pair.feed(b"")
    with pytest.raises(Unavailable):
        operation.send(None)
    assert pair.session.ended is not None


def test_what_is_asked_while_the_daemon_is_away_goes_out_with_the_rest(pair: SessionPair) -> None:
    kept = held_lease(pair)
    pair.feed(b"")
    ask = operations.call(pair.session, "cordon", {"gpu": 0})
    ask.send(None)
    given_up = operations.call(pair.session, "health", {})
    given_up.send(None)
    with pytest.raises(KeyboardInterrupt):
        given_up.throw(KeyboardInterrupt())
    assert [request["op"] for request in pair.rejoin()] == ["reattach", "cordon"]
    assert pair.session.late == 1
    assert kept.decision.live


def test_ids_stay_their_requests_own_when_the_next_process_takes_over(pair: SessionPair) -> None:
    asked = held_lease(pair)
    waiting = Asked(pair, wait_s=60)
    pair.feed(b"")
    requests = pair.rejoin()
    assert [request["op"] for request in requests] == ["reattach", "lease"]
    pair.resume()
    assert pair.asked_again() == requests
    pair.send(ok(requests[0], **grant_fields(1)), ok(requests[1], **grant_fields(2)))
    assert asked.decision.live
    assert result_of(waiting.operation).lease_id == "L2"
    assert pair.session.ended is None


def test_a_daemon_that_closes_every_connection_fails_requests_and_keeps_leases(
    pair: SessionPair,
) -> None:
    asked = held_lease(pair)
    operation = operations.call(pair.session, "health", {})
    ticket = operation.send(None)
    pair.feed(b"")
    for _ in range(REFUSALS_MAX):
        assert not ticket.done
        pair.now_s += 0.01
        pair.rejoin()
        pair.feed(b"")
    with pytest.raises(Unavailable, match="closed the connection"):
        operation.send(None)
    assert asked.decision.live
    assert pair.session.away is not None


def test_connections_that_were_answered_are_not_counted_as_refused(pair: SessionPair) -> None:
    asked = held_lease(pair)
    waiting = Asked(pair, wait_s=600)
    for _ in range(REFUSALS_MAX + 2):
        pair.feed(b"")
        reattach, _ = pair.rejoin()
        pair.send(ok(reattach, **grant_fields(1)))
    assert asked.decision.live
    assert not waiting.ticket.done
