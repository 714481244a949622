"""What admins change, by the letter, and what it does to those who wait."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core import invariants, snapshot
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import Ask, Code, ConnectionId, Note, Priority, Token
from gpuorchd.core.rows import WaiterRow
from tests.support.world import SECOND
from tests.unit.test_core_answers import ADMIN, FIRST, OTHER, SMALL, change, lease, machine_with


@pytest.mark.parametrize("on", [False, True])
def test_safe_mode_set_to_null_returns_to_its_default(on: bool) -> None:
    machine = machine_with(SMALL)
    change(machine, {"safe_mode": on})
    answer = change(machine, {"safe_mode": None, "default_memory_mb": 100})
    assert answer == fx.AnswerPolicy(ADMIN, "p", None)
    assert machine.state.safe_mode is False
    assert machine.state.policy.default_memory_mb == 100


def test_a_waiter_that_safe_mode_ends_is_told_why_as_a_new_request_is() -> None:
    machine = machine_with(SMALL)
    lease(machine, "r", Ask("a", 10_000))
    lease(machine, "w", Ask("a", 10_000, wait_ns=60 * SECOND))
    machine.handle(ev.PolicyChangeAsked(ADMIN, "p", {"safe_mode": True}, None, {}), SECOND)
    effects = machine.handle(ev.SettingsPersisted(), SECOND)
    (ended,) = (x.denial for x in effects if isinstance(x, fx.AnswerDenial))
    new = lease(machine, "n", Ask("a", 10_000))
    assert isinstance(new, fx.AnswerDenial)
    assert ended.note is Note.SAFE_MODE
    assert ended.reasons == new.denial.reasons != ()


def test_a_known_card_is_cordoned_and_uncordoned_by_its_uuid_under_safe_mode() -> None:
    machine = machine_with(SMALL)
    change(machine, {"safe_mode": True})
    for reason in ("a fan", None):
        machine.handle(ev.CordonAsked(ADMIN, "c", SMALL.uuid, reason), SECOND)
        assert any(
            isinstance(effect, fx.Answer) and effect.fields["cordoned"] is (reason is not None)
            for effect in machine.handle(ev.SettingsPersisted(), SECOND)
        )
    (again,) = machine.handle(ev.CordonAsked(ADMIN, "d", SMALL.uuid, None), SECOND)
    assert isinstance(again, fx.Answer)
    (unknown,) = machine.handle(ev.CordonAsked(ADMIN, "e", "GPU-nowhere", "a fan"), SECOND)
    assert isinstance(unknown, fx.AnswerError)


def test_where_every_lease_takes_whole_cards_caps_bound_what_was_asked_for() -> None:
    machine = machine_with(SMALL)
    change(machine, {"max_memory_per_agent_mb": 1_000})
    denied = lease(machine, "r", Ask("a", exclusive=True))
    assert isinstance(denied, fx.AnswerDenial)
    assert denied.denial.note is Note.QUOTA
    change(machine, {"allow_fractional_shares": False})
    for number, ask in enumerate((Ask("a", exclusive=True), Ask("a", 900, exclusive=True))):
        granted = lease(machine, f"g{number}", ask)
        assert isinstance(granted, fx.AnswerGrant)
        assert granted.lease.parts[0].memory_mb == SMALL.total_mb
        machine.handle(ev.ReleaseAsked(FIRST, "x", granted.lease.token), SECOND)
        machine.handle(ev.DevicesFound((SMALL,)), SECOND)
    over = lease(machine, "o", Ask("a", 1_001, exclusive=True))
    assert isinstance(over, fx.AnswerDenial)
    assert over.denial.note is Note.QUOTA


def waits(machine: Machine, request_id: str, ask: Ask, conn: ConnectionId = FIRST) -> None:
    told = lease(machine, request_id, ask._replace(wait_ns=60 * SECOND), conn)
    assert isinstance(told, fx.Announce)


def put_in_force(machine: Machine, changes: Mapping[str, object]) -> list[fx.Effect]:
    machine.handle(ev.PolicyChangeAsked(ADMIN, "p", changes, None, {}), SECOND)
    effects = machine.handle(ev.SettingsPersisted(), SECOND)
    invariants.check(machine.state, SECOND)
    return effects


@pytest.mark.parametrize("rule", [{"users": [1_000]}, {"units": ["scout.service"]}])
def test_a_waiter_whose_name_is_closed_to_it_is_answered_forbidden_and_gets_nothing(
    rule: Mapping[str, object],
) -> None:
    machine = machine_with(SMALL)
    lease(machine, "r", Ask("holder", 10_000))
    waits(machine, "w", Ask("scout", 100))
    waits(machine, "v", Ask("other", 100))
    waits(machine, "x", Ask("scout", 100), OTHER)
    effects = put_in_force(machine, {"agents": {"scout": rule}})
    ended = {x.request_id: x.refusal for x in effects if isinstance(x, fx.AnswerError)}
    assert set(ended) == ({"w"} if "users" in rule else {"w", "x"})
    new = lease(machine, "n", Ask("scout", 100))
    assert isinstance(new, fx.AnswerError)
    assert ended["w"] == new.refusal
    assert new.refusal.code is Code.FORBIDDEN
    freed = machine.handle(ev.ReleaseAsked(FIRST, "y", Token("r")), SECOND)
    freed += machine.handle(ev.TimePassed(), 2 * SECOND)
    granted = {x.lease.request_id for x in freed if isinstance(x, fx.AnswerGrant)}
    assert granted == ({"v", "x"} if "users" in rule else {"v"})


def test_who_waits_has_the_place_that_the_rules_in_force_would_have_given_it() -> None:
    machine = machine_with(SMALL)
    lease(machine, "r", Ask("holder", 10_000))
    for name in ("first", "second", "third", "fourth"):
        asked = Priority.CRITICAL if name in ("first", "third") else None
        waits(machine, name, Ask(name, 100, priority=asked))
    queue = machine.state.queue
    assert [x.request_id for x in queue] == ["first", "third", "second", "fourth"]
    rules = {"first": {"max_priority": "normal"}, "fourth": {"priority": "critical"}}
    put_in_force(machine, {"agents": rules})
    assert [x.request_id for x in queue] == ["third", "fourth", "first", "second"]
    rows = [x for x in snapshot.everything(machine.state).values() if isinstance(x, WaiterRow)]
    kept = {row.request_id: Priority(row.priority) for row in rows}
    assert kept == {x.request_id: x.priority for x in queue}
    told = machine.handle(ev.TimePassed(), 2 * SECOND)
    places = {
        (x.owner_fields or {}).get("request_id"): x.fields["position"]
        for x in told
        if isinstance(x, fx.Announce) and x.name == "lease.queued"
    }
    assert places == {"third": 1, "fourth": 2, "first": 3, "second": 4}
    put_in_force(machine, {"agents": None})
    assert [x.request_id for x in queue] == ["first", "third", "second", "fourth"]
