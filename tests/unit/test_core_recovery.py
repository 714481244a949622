"""After a restart all goes on: same answers, once each; the same leases, queue and deadlines."""

from __future__ import annotations

import pytest

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core import rows
from gpuorchd.core.model import (
    Ask,
    ConnectionId,
    LeaseState,
    Note,
    Priority,
    ProcessUse,
    Reading,
    Token,
)
from tests.support.succeeding import GRACE_NS, Core, answers, code, process, token_of, told
from tests.support.world import MS, SECOND, card

CARD_MB = 10_000
ONE, TWO, THREE = ConnectionId(1), ConnectionId(2), ConnectionId(3)


@pytest.fixture
def core() -> Core:
    """One simulated card and three clients; the first holds nearly all of it."""
    core = Core(card(0, CARD_MB, drain_ms=100))
    for conn in (1, 2, 3):
        core.arrive(conn)
    core.lease(1, "first", 9_000)
    return core


def note(effects: list[fx.Effect]) -> Note:
    (effect,) = answers(effects)
    assert isinstance(effect, fx.AnswerDenial), effect
    return effect.denial.note


def is_new(core: Core, conn: int, request_id: int | str) -> bool:
    """Whether the server takes a request for a new one."""
    client = core.client(conn)
    return request_id not in (client.repeats or {}) and request_id not in client.requests


def test_a_grant_is_given_again_once_when_it_is_asked_for_again(core: Core) -> None:
    lease = core.held(1, "first")
    assert answers(core.restart()) == []
    (effect,) = core.repeat(1, "first")
    assert isinstance(effect, fx.AnswerGrant)
    same = effect.lease
    assert same is not lease
    for name in ("lease_id", "token", "number", "granted_ns", "waited_ns", "expires_ns", "ask"):
        assert getattr(same, name) == getattr(lease, name)
    # After that its id is in use, and nothing to be repeated.
    client = core.client(1)
    assert "first" in client.requests
    assert "first" not in (client.repeats or {})


def test_a_wait_goes_on_to_its_old_deadline(core: Core) -> None:
    core.lease(2, "w", 5_000, wait_s=10)
    core.now_ns += 4 * SECOND
    core.restart()
    assert core.repeat(2, "w") == []
    assert answers(core.wait(6 * SECOND - 1)) == []
    assert note(core.wait(1)) is Note.TIMEOUT


def test_an_answer_that_ends_a_wait_waits_until_it_is_asked_for_and_is_given_once(
    core: Core,
) -> None:
    core.lease(2, "w", 5_000, wait_s=10)
    core.restart()
    effects = core.wait(20 * SECOND)
    assert answers(effects) == []
    # Everybody else hears of it at once.
    assert len(told(effects, "lease.denied")) == 1
    assert note(core.repeat(2, "w")) is Note.TIMEOUT
    assert is_new(core, 2, "w")
    assert not core.state.unrepeated


def test_such_an_answer_outlives_yet_another_daemon(core: Core) -> None:
    core.lease(2, "w", 5_000, wait_s=10)
    core.restart()
    core.wait(20 * SECOND)
    for _ in range(2):
        core.restart()
        assert answers(core.wait(SECOND)) == []
    assert note(core.repeat(2, "w")) is Note.TIMEOUT
    assert is_new(core, 2, "w")


def test_a_grant_to_one_who_waited_waits_until_it_is_asked_for(core: Core) -> None:
    core.lease(2, "w", 5_000, wait_s=10)
    core.restart()
    effects = core.submit(ev.ReleaseAsked(ONE, "r", token_of(1, "first")))
    effects += core.wait(SECOND)
    assert [type(effect) for effect in answers(effects)] == [fx.Answer]
    assert core.held(2, "w").state is LeaseState.ACTIVE
    (effect,) = core.repeat(2, "w")
    assert isinstance(effect, fx.AnswerGrant)
    assert effect.lease is core.held(2, "w")


@pytest.mark.parametrize("waited", [False, True])
def test_a_request_whose_lease_has_ended_meanwhile_is_a_new_one(core: Core, waited: bool) -> None:
    conn = 2 if waited else 1
    if waited:
        core.lease(2, "first", 5_000, wait_s=10)
    core.restart()
    if waited:
        core.submit(ev.ReleaseAsked(ONE, "r", token_of(1, "first")))
        core.wait(SECOND)
    lease = core.held(conn, "first")
    core.submit(ev.RevokeAsked(THREE, "x", lease.lease_id, 0, "wanted"))
    # Else it would be answered with nothing at all.
    assert is_new(core, conn, "first")
    core.wait(SECOND)
    effect = answers(core.lease(conn, "first", 5_000))[0]
    assert isinstance(effect, fx.AnswerGrant)


def test_what_was_done_is_answered_the_same_and_not_done_again(core: Core) -> None:
    core.lease(2, "w", 5_000, wait_s=10)
    core.now_ns += MS
    cancelled, denied = answers(core.submit(ev.CancelAsked(TWO, "c", "w")))
    released = answers(core.submit(ev.ReleaseAsked(ONE, "r", token_of(1, "first"))))
    core.restart()
    granted = core.state.granted_total
    assert answers(core.repeat(2, "c")) == [cancelled]
    assert answers(core.repeat(1, "r")) == released
    # The wait that was cancelled is answered the same, too.
    assert answers(core.repeat(2, "w")) == [denied]
    assert core.state.granted_total == granted


def test_who_was_refused_at_once_asks_as_if_for_the_first_time(core: Core) -> None:
    assert note(core.lease(2, "no", 5_000)) is Note.INSUFFICIENT_MEMORY
    assert code(core.submit(ev.ReleaseAsked(TWO, "r", Token("x")))) == "unknown_token"
    core.restart()
    assert is_new(core, 2, "no")
    assert is_new(core, 2, "r")


def test_a_renewal_is_answered_with_the_time_that_it_gave() -> None:
    core = Core(card(0, CARD_MB, drain_ms=0), ttl_ns=60 * SECOND)
    core.arrive(1)
    core.lease(1, "l", 1_000)
    core.wait(10 * SECOND)
    renewed = answers(core.submit(ev.RenewAsked(ONE, "n", token_of(1, "l"))))
    core.now_ns += 5 * SECOND
    core.restart()
    assert answers(core.repeat(1, "n")) == renewed


def test_the_newest_answers_are_kept_and_no_more() -> None:
    core = Core(card(0, CARD_MB, drain_ms=0), ttl_ns=60 * SECOND)
    core.arrive(1)
    core.lease(1, "l", 1_000)
    count = 2 * rows.OUTCOMES_KEPT + 7
    for number in range(count):
        core.submit(ev.RenewAsked(ONE, number, token_of(1, "l")))
    assert sum(key[0] == rows.OUTCOME for key in core.table.rows) == rows.OUTCOMES_KEPT
    core.restart()
    assert is_new(core, 1, count - rows.OUTCOMES_KEPT - 1)
    for number in range(count - rows.OUTCOMES_KEPT, count):
        assert len(answers(core.repeat(1, number))) == 1
    # Numbered on, so that what is answered now takes the place of the oldest.
    core.submit(ev.RenewAsked(ONE, "new", token_of(1, "l")))
    core.restart()
    assert len(answers(core.repeat(1, "new"))) == 1


def test_nothing_of_a_connection_that_has_left_is_kept(core: Core) -> None:
    core.submit(ev.ReleaseAsked(ONE, "r", token_of(1, "first")))
    core.restart()
    core.repeat(1, "r")
    core.lease(1, "again", 100)
    core.wait(SECOND)
    core.submit(ev.ReleaseAsked(ONE, "r2", token_of(1, "again")))
    for conn in (1, 2, 3):
        core.submit(ev.ClientLeft(ConnectionId(conn)))
    core.wait(SECOND)
    assert {key[0] for key in core.table.rows} == {rows.DEVICE}


def test_who_died_meanwhile_is_drained_and_not_dropped(core: Core) -> None:
    core.lease(2, "w", 5_000, wait_s=10)
    effects = core.restart(attached=[2, 3])
    assert len(told(effects, "lease.draining")) == 1
    core.repeat(2, "w")
    assert answers(core.wait(99 * MS)) == []
    (effect,) = answers(core.wait(MS))
    assert isinstance(effect, fx.AnswerGrant)


def test_the_queue_keeps_its_order() -> None:
    core = Core(card(0, CARD_MB, drain_ms=0))
    for conn in range(1, 7):
        core.arrive(conn)
    core.lease(1, "all", 9_000)
    order = [(2, Priority.BACKGROUND), (3, None), (4, None), (5, Priority.CRITICAL), (6, None)]
    for conn, priority in order:
        core.lease(conn, "w", 8_000, wait_s=600, priority=priority)
    for _ in range(2):
        core.restart()
    for conn, _ in order:
        core.repeat(conn, "w")
    served: list[int] = []
    holder: tuple[int, str] = (1, "all")
    while len(served) < 5:
        event = ev.ReleaseAsked(ConnectionId(holder[0]), "r", token_of(*holder))
        effects = core.submit(event)
        (grant,) = [effect for effect in effects if isinstance(effect, fx.AnswerGrant)]
        holder = (grant.lease.conn, "w")
        served.append(grant.lease.conn)
    assert served == [5, 3, 4, 6, 2]


def test_numbers_go_on_where_they_were(core: Core) -> None:
    first = core.held(1, "first")
    core.submit(ev.ClientLeft(ONE))
    core.wait(SECOND)
    core.restart()
    core.lease(2, "next", 100)
    assert core.held(2, "next").number == first.number + 1
    assert core.held(2, "next").lease_id != first.lease_id


def test_a_lease_that_drains_goes_on_draining_until_its_time(core: Core) -> None:
    core.submit(ev.ClientLeft(ONE))
    core.now_ns += 40 * MS
    core.restart()
    assert told(core.wait(59 * MS), "lease.drained") == []
    assert len(told(core.wait(MS), "lease.drained")) == 1


def test_what_is_withheld_stays_withheld_until_a_reading() -> None:
    core = Core(card(0, CARD_MB))
    holder = core.arrive(1)
    core.arrive(2)
    read(core, used_mb=0)
    core.lease(1, "l", 9_000)
    read(core, 9_000, ProcessUse(process(1), 9_000), ProcessUse(process(50), 50, (process(1),)))
    core.submit(ev.ClientLeft(holder))
    # Nothing can be read while its time runs out.
    assert len(told(core.wait(20 * SECOND), "lease.withheld")) == 1
    effects = core.restart()
    watched = {effect.process for effect in effects if isinstance(effect, fx.WatchProcess)}
    assert {process(1), process(50)} <= watched
    assert told(core.wait(20 * SECOND), "lease.withheld") == []
    assert note(core.lease(2, "no", 5_000)) is not None
    core.submit(ev.ProcessEnded(process(1)))
    core.submit(ev.ProcessEnded(process(50)))
    read(core, used_mb=0)
    (effect,) = answers(core.lease(2, "yes", 5_000))
    assert isinstance(effect, fx.AnswerGrant)


def read(core: Core, used_mb: int, *uses: ProcessUse) -> None:
    core.now_ns += MS
    reading = Reading(core.cards[0].uuid, CARD_MB - used_mb, used_mb, uses)
    core.submit(ev.ReadingsTaken(core.now_ns, (reading,)))


def test_nothing_is_granted_before_the_cards_are_found_again(core: Core) -> None:
    core.restart(find=False)
    assert core.lease(2, "w", 100, wait_s=5)
    assert core.client(2).requests
    assert "w" in core.client(2).requests
    effects = core.submit(ev.DevicesFound(core.cards))
    (effect,) = answers(effects)
    assert isinstance(effect, fx.AnswerGrant)
    # What the earlier daemon had given is still given.
    assert core.state.order[0].claim_mb == 9_100


def test_a_time_limit_leaves_the_grace_at_least() -> None:
    core = Core(card(0, CARD_MB, drain_ms=0), ttl_ns=10 * SECOND)
    core.arrive(1)
    core.lease(1, "l", 1_000)
    # Nobody was there to renew it with.
    core.now_ns += 60 * SECOND
    core.restart()
    assert told(core.wait(GRACE_NS - 1), "lease.expired") == []
    assert len(told(core.wait(1), "lease.expired")) == 1


def test_a_seal_is_recorded_and_that_its_answer_has_left(core: Core) -> None:
    core.submit(ev.SealAsked(ONE, "s", "USR1"))
    core.restart()
    assert (core.client(1).sealed, core.client(1).seal_told) == (True, False)
    # Its client does not know yet, and asks again.
    (effect,) = answers(core.repeat(1, "s"))
    assert isinstance(effect, fx.Answer)
    assert effect.fields == {"sealed": True}
    core.submit(ev.SealTold(ONE))
    core.restart()
    assert (core.client(1).sealed, core.client(1).seal_told) == (True, True)
    lease = core.held(1, "first")
    effects = core.submit(ev.RevokeAsked(TWO, "x", lease.lease_id, SECOND, "wanted"))
    assert [x for x in effects if isinstance(x, fx.SignalPeer)] == [fx.SignalPeer(ONE, "USR1")]
    # Programs take a second signal for an order to break off.
    assert not any(isinstance(x, fx.SignalPeer) for x in core.restart())


def test_who_is_asked_to_yield_is_asked_again_with_what_is_left_of_the_time(core: Core) -> None:
    lease = core.held(1, "first")
    core.submit(ev.RevokeAsked(TWO, "x", lease.lease_id, 10 * SECOND, "wanted"))
    core.now_ns += 4 * SECOND
    (event,) = told(core.restart(), "lease.revoking")
    assert (event.owner, event.private) == (ONE, True)
    assert event.fields["reason"] == "wanted"
    assert event.fields["deadline_s"] == 6.0
    assert len(told(core.wait(6 * SECOND), "lease.revoked")) == 1


def test_safe_mode_that_came_with_the_restart_asks_everybody_to_yield(core: Core) -> None:
    core.lease(2, "w", 5_000, wait_s=60)
    core.submit(ev.ClientLeft(THREE))
    effects = core.restart(safe_mode=True)
    (event,) = told(effects, "lease.revoking")
    assert (event.owner, event.fields["reason"]) == (ONE, "SAFE_MODE")
    assert note(core.repeat(2, "w")) is Note.SAFE_MODE
    assert note(core.lease(2, "no", 1)) is Note.SAFE_MODE
    # Another restart asks again, but gives no second time.
    core.now_ns += 10 * SECOND
    (event,) = told(core.restart(), "lease.revoking")
    assert event.fields["deadline_s"] == 20.0
    assert len(told(core.wait(20 * SECOND), "lease.revoked")) == 1


def test_text_lines_without_an_id_wait_and_end_like_others(core: Core) -> None:
    # Their connections are not kept; what they awaited ends with them.
    event = ev.LeaseAsked(TWO, None, Ask("agent", 5_000, wait_ns=60 * SECOND), Token("t"))
    core.submit(event)
    effects = core.restart(attached=[1, 3])
    assert not core.state.waiters
    assert len(told(effects, "lease.denied")) == 1
