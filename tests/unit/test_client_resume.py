"""What a client's session does when the daemon's next process has the connection still."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libclient import operations
from libclient.decision import Decision
from libclient.errors import Unavailable
from libclient.tickets import Ticket
from tests.support.proxy import denial_fields, grant_fields
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


def ops(requests: list[dict[str, Any]]) -> list[str]:
    return [request["op"] for request in requests]


def subscribed(pair: SessionPair, number: int = 3) -> Any:
    operation = operations.subscribe(pair.session, ["gpu.*"])
    operation.send(None)
    (request,) = pair.asked()
    pair.send(ok(request, subscription=number, seq=0))
    return result_of(operation)


# -- the marker, and everything again


def test_what_has_no_answer_is_sent_again_after_the_marker_in_the_same_order(
    pair: SessionPair,
) -> None:
    waiting = Asked(pair, wait_s=60)
    for op in ("health", "policy_get", "whoami"):
        pair.session.ask(op, {})
    before = pair.asked()
    pair.send(ok(before[1], revision=1))
    pair.resume()
    assert pair.asked_again() == [waiting.request, before[0], before[2]]
    assert pair.session.ended is None


def test_a_connection_with_nothing_to_ask_sends_the_marker_alone(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.resume()
    assert pair.asked_again() == []
    assert asked.decision.live
    assert asked.decision.token == "secret-1"


def test_what_was_half_sent_is_dropped_and_sent_whole_after_the_marker(pair: SessionPair) -> None:
    pair.session.ask("health", {})
    pair.session.ask("explain", {"agent": "x"})
    pair.session.outgoing = pair.session.outgoing[7:]
    pair.resume()
    assert ops(pair.asked_again()) == ["health", "explain"]


@pytest.mark.parametrize("sent_bytes", [0, 1, 19, 20, 25])
def test_a_second_restart_begins_again_however_much_of_the_first_answer_had_left(
    pair: SessionPair, sent_bytes: int
) -> None:
    pair.session.ask("health", {})
    pair.asked()
    pair.resume(1)
    pair.session.outgoing = pair.session.outgoing[sent_bytes:]
    pair.resume(2)
    (request,) = pair.asked_again(2)
    pair.send(ok(request))
    assert pair.at_rest()


def test_a_second_restart_after_the_first_was_answered_asks_what_is_still_open(
    pair: SessionPair,
) -> None:
    first, second = pair.session.ask("health", {}), pair.session.ask("ready", {})
    pair.asked()
    pair.resume(1)
    requests = pair.asked_again(1)
    pair.send(ok(requests[0]))
    pair.resume(2)
    assert pair.asked_again(2) == requests[1:]
    assert (first.done, second.done) == (True, False)


def test_answers_that_came_before_it_count(pair: SessionPair) -> None:
    asked = Asked(pair)
    other = pair.session.ask("health", {})
    pair.asked()
    nonce = b"\x01" * 16
    pair.send(
        ok(asked.request, **grant_fields(1)),
        {"event": "daemon.resumed", "seq": 1, "time": 0.0, "epoch": "e", "nonce": nonce},
    )
    assert asked.decision.live
    assert ops(pair.asked_again()) == ["health"]
    assert not other.done


def test_what_is_asked_after_it_follows(pair: SessionPair) -> None:
    pair.session.ask("health", {})
    pair.resume()
    pair.session.ask("ready", {})
    assert ops(pair.asked_again()) == ["health", "ready"]


@pytest.mark.parametrize(
    "changes", [{"nonce": None}, {"nonce": b"short"}, {"nonce": "x" * 16}, {"nonce": b"1" * 17}]
)
def test_one_without_a_proper_nonce_is_garbage(
    pair: SessionPair, changes: dict[str, object]
) -> None:
    held_lease(pair)
    pair.resume(changes=changes)
    assert pair.session.ended is not None
    assert pair.session.ended.reason == "GARBAGE"
    assert "nonce" in pair.session.ended.detail


def test_a_sealed_connection_says_nothing(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.session.ask("seal", {})
    (seal,) = pair.asked()
    pair.send(ok(seal))
    pair.resume()
    assert pair.session.outgoing == b""
    assert asked.decision.live


# -- callers who gave up


def test_a_cancel_that_nobody_waits_for_is_sent_again(pair: SessionPair) -> None:
    asked = Asked(pair, wait_s=60)
    with pytest.raises(KeyboardInterrupt):
        asked.operation.throw(KeyboardInterrupt())
    (cancel,) = pair.asked()
    pair.resume()
    assert pair.asked_again() == [asked.request, cancel]
    pair.send(ok(asked.request, **grant_fields(4)), refused(cancel, "unknown_request"))
    (release,) = pair.asked()
    assert (release["op"], release["token"]) == ("release", "secret-4")
    pair.resume(2)
    assert pair.asked_again(2) == [release]
    pair.send(ok(release, released=True))
    assert pair.at_rest()
    assert not asked.decision.granted


def test_a_caller_may_give_up_between_the_restart_and_the_answer(pair: SessionPair) -> None:
    asked = Asked(pair, wait_s=60)
    pair.resume()
    with pytest.raises(StopIteration) as end:
        asked.operation.throw(Unavailable("no answer", "TIMEOUT"))
    assert end.value.value.reason == "TIMEOUT"
    lease, cancel = pair.asked_again()
    assert (lease["id"], cancel["request_id"]) == (asked.request["id"],) * 2
    pair.send(ok(cancel, cancelled=True), ok(lease, **denial_fields("CANCELLED")))
    assert pair.at_rest()


# -- answered twice


def test_a_second_answer_to_what_was_sent_again_changes_nothing(pair: SessionPair) -> None:
    asked = Asked(pair, wait_s=60)
    pair.resume()
    pair.asked_again()
    # What had been waiting is granted before the daemon reads that it is asked for again.
    pair.send(ok(asked.request, **grant_fields(1)))
    release = operations.release(pair.session, asked.decision)
    release.send(None)
    (request,) = pair.asked()
    pair.send(ok(asked.request, **grant_fields(1)), ok(request, released=True))
    result_of(release)
    assert asked.decision.ended == "released"
    assert pair.at_rest()
    assert pair.session.ended is None


def test_another_grant_for_the_same_request_is_given_back(pair: SessionPair) -> None:
    asked = Asked(pair, wait_s=60)
    pair.resume()
    pair.asked_again()
    pair.send(ok(asked.request, **grant_fields(1)), ok(asked.request, **grant_fields(2)))
    (release,) = pair.asked()
    assert (release["op"], release["token"]) == ("release", "secret-2")
    assert asked.decision.live
    assert asked.decision.token == "secret-1"


def test_an_answer_to_what_was_not_sent_again_is_garbage(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.resume()
    pair.asked_again()
    pair.send(ok(asked.request, **grant_fields(1)))
    assert pair.session.ended is not None
    assert pair.session.ended.reason == "GARBAGE"


# -- events, subscriptions, renewals


def test_its_own_events_are_counted_anew_and_handlers_hear_of_it(pair: SessionPair) -> None:
    asked = held_lease(pair)
    pair.send(pair.event("daemon.safe_mode"), pair.event("daemon.safe_mode"))
    pair.resume()
    pair.send(pair.event("lease.revoking", lease_id="L1", reason="admin", deadline_s=10.0))
    tell(pair)
    assert [event["event"] for event in asked.events[2:]] == ["daemon.resumed", "lease.revoking"]
    assert "nonce" not in asked.events[2]
    assert asked.decision.revoking


def test_a_subscription_goes_on_under_another_number(pair: SessionPair) -> None:
    subscription = subscribed(pair)
    waiting = operations.next_event(pair.session, subscription)
    ticket = waiting.send(None)
    pair.resume()
    assert result_of(waiting)["event"] == "daemon.resumed"
    assert ticket.done
    (again,) = pair.asked_again()
    assert (again["op"], again["topics"]) == ("subscribe", ["gpu.*"])
    pair.send(
        ok(again, subscription=1, seq=0),
        {"event": "gpu.cordoned", "subscription": 1, "seq": 1, "time": 0.0},
    )
    assert result_of(operations.next_event(pair.session, subscription))["event"] == "gpu.cordoned"
    ending = operations.unsubscribe(pair.session, subscription)
    ending.send(None)
    (request,) = pair.asked()
    assert request["subscription"] == 1
    pair.send(ok(request))
    result_of(ending)
    assert pair.at_rest()


def test_a_subscription_that_is_ended_meanwhile_stays_ended(pair: SessionPair) -> None:
    subscription = subscribed(pair)
    pair.resume()
    (again,) = pair.asked_again()
    result_of(operations.unsubscribe(pair.session, subscription))
    pair.send(ok(again, subscription=7, seq=0))
    (request,) = pair.asked()
    assert (request["op"], request["subscription"]) == ("unsubscribe", 7)
    pair.send(ok(request))
    assert pair.at_rest()


def test_a_subscription_that_is_refused_ends_and_says_so(pair: SessionPair) -> None:
    subscription = subscribed(pair)
    pair.resume()
    (again,) = pair.asked_again()
    pair.send(refused(again, "limit"))
    assert result_of(operations.next_event(pair.session, subscription))["event"] == "daemon.resumed"
    with pytest.raises(Unavailable, match="limit: no"):
        operations.next_event(pair.session, subscription).send(None)
    assert pair.at_rest()


def test_two_restarts_make_a_subscription_once(pair: SessionPair) -> None:
    subscribed(pair)
    pair.resume(1)
    pair.resume(2)
    (again,) = pair.asked_again(2)
    assert again["op"] == "subscribe"


def test_renewals_go_on(pair: SessionPair) -> None:
    asked = held_lease(pair, timestamp=1_000.0, expires_at=1_030.0)
    pair.now_s += 10
    pair.session.renew_due(pair.now_s)
    (renew,) = pair.asked()
    pair.resume()
    assert pair.asked_again() == [renew]
    pair.send(ok(renew, expires_at=1_040.0))
    assert asked.decision.expires_at == 1_040.0
    pair.resume(2)
    assert pair.asked_again(2) == []
    pair.session.renew_due(pair.now_s + 10)
    assert ops(pair.asked()) == ["renew"]


# -- any order


class Daemon:
    """Processes that follow one another, and do nothing twice. Text says what was done."""

    def __init__(self) -> None:
        self.done: dict[int, str] = {}
        self.times = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["id"] not in self.done:
            self.times += 1
            self.done[request["id"]] = request["what"]
        return ok(request, what=self.done[request["id"]])


steps = st.lists(
    st.sampled_from(["ask", "give up", "send 9 bytes", "send", "answer", "swallow", "restart"]),
    max_size=40,
)


@given(steps)
def test_whatever_the_order_everything_is_done_once_and_answered_once(order: list[str]) -> None:
    pair, daemon = SessionPair(), Daemon()
    session = pair.session
    tickets: list[Ticket] = []
    input_, restarts = b"", 0

    def serve(most: int, *, heard: bool) -> None:
        # The process reads at most so many bytes; whether its answers get out is another matter.
        nonlocal input_
        input_ += session.outgoing[:most]
        session.outgoing = session.outgoing[most:]
        if restarts:
            marker = b"\xff" * 4 + bytes([restarts]) * 16
            if marker not in input_ and not pair_is_joined[0]:
                return
            if marker in input_:
                input_ = input_.partition(marker)[2]
                pair_is_joined[0] = True
        pair._splitter.feed(input_)
        input_ = b""
        while (payload := pair._splitter.next_frame()) is not None:
            reply = daemon.answer(pair.decode(payload))
            if heard:
                pair.send(reply)

    pair_is_joined = [True]
    for step in [*order, "restart", "answer"]:
        if step == "ask":
            tickets.append(session.ask("x", {"what": f"thing {len(tickets)}"}))
        elif step == "give up" and tickets:
            session.abandon(tickets[-1])
        elif step == "send 9 bytes":
            serve(9, heard=False)
        elif step in ("send", "swallow"):
            serve(len(session.outgoing), heard=False)
        elif step == "answer":
            serve(len(session.outgoing), heard=True)
        elif step == "restart":
            restarts += 1
            pair_is_joined[0] = False
            input_ = b""
            pair.reset()
            pair.resume(restarts)
    assert session.ended is None
    assert daemon.times == len(tickets)
    for number, ticket in enumerate(tickets):
        assert ticket.done
        assert ticket.result()["what"] == f"thing {number}"
    assert pair.at_rest()


def test_a_thousand_restarts_leave_nothing_behind(pair: SessionPair) -> None:
    asked = held_lease(pair)
    waiting = Asked(pair, wait_s=600)
    subscribed(pair)
    tracemalloc.start()
    for number in range(1_000):
        if number == 100:
            before, _ = tracemalloc.get_traced_memory()
        pair.resume(number % 200)
        lease, subscribe = pair.asked_again(number % 200)
        assert lease == waiting.request
        pair.send(ok(subscribe, subscription=number, seq=0))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The events of the restarts that nobody took, and no more: they are bounded as well.
    assert after - before < 900 * 1_000
    session = pair.session
    assert len(session.pending) == 1
    assert len(session.repeats) <= 2
    assert (len(session.subscriptions), session.lapsed) == (1, [])
    assert session.outgoing == b""
    assert asked.decision.live
    assert isinstance(waiting.decision, Decision)
