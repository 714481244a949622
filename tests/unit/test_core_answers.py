"""What answers of the core say: true deadlines, true notes, fields that can be read."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gpuorchd import views
from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core import invariants, snapshot
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import (
    Ask,
    Code,
    ConnectionId,
    DeviceFacts,
    Note,
    Peer,
    ProcessKey,
    ProcessUse,
    Reading,
    Token,
)
from gpuorchd.core.rows import LeaseRow
from gpuorchd.core.settings import BEHIND_MAX
from gpuorchd.core.state import Limits, Settings
from tests.support.world import SECOND, card

LIMITS = Limits()
ADMIN, FIRST, OTHER = ConnectionId(9), ConnectionId(1), ConnectionId(2)
HOLDER = ProcessKey(101, 1)
SMALL, LARGE = card(0, 10_000, drain_ms=0), card(1, 80_000, drain_ms=0)


def machine_with(*cards: DeviceFacts, limits: Limits = LIMITS) -> Machine:
    machine = Machine(Settings("answers", limits=limits, keeps=True))
    machine.handle(ev.DevicesFound(cards), SECOND)
    for conn, uid in ((FIRST, 0), (OTHER, 1_000)):
        machine.handle(ev.ClientArrived(conn, Peer(HOLDER, uid)), SECOND)
    return machine


def lease(machine: Machine, request_id: str, ask: Ask, conn: ConnectionId = FIRST) -> fx.Effect:
    """Ask for a lease; give the answer, or what its owner is told while it waits."""
    event = ev.LeaseAsked(conn, request_id, ask, Token(request_id))
    kinds = fx.AnswerGrant | fx.AnswerDenial | fx.AnswerError | fx.Announce
    effects = machine.handle(event, SECOND)
    invariants.check(machine.state, SECOND)
    return next(effect for effect in effects if isinstance(effect, kinds))


def change(
    machine: Machine, changes: Mapping[str, object], revision: int | None = None
) -> fx.Effect:
    """Ask for a change of policy and let the disk have it; give the answer."""
    event = ev.PolicyChangeAsked(ADMIN, "p", changes, revision, {})
    effects = machine.handle(event, SECOND)
    if any(isinstance(effect, fx.PersistSettings) for effect in effects):
        effects = machine.handle(ev.SettingsPersisted(), SECOND)
    return next(x for x in effects if isinstance(x, fx.AnswerPolicy | fx.AnswerError))


@pytest.mark.parametrize(("again_s", "left_s"), [(3_600, 4.0), (2, 2.0)])
def test_a_second_revocation_is_told_when_the_lease_ends(again_s: int, left_s: float) -> None:
    machine = machine_with(SMALL)
    granted = lease(machine, "r", Ask("a", 100))
    assert isinstance(granted, fx.AnswerGrant)
    lease_id = granted.lease.lease_id
    machine.handle(ev.RevokeAsked(ADMIN, "v", lease_id, 5 * SECOND, "by hand"), SECOND)
    again = ev.RevokeAsked(ADMIN, "w", lease_id, again_s * SECOND, "by hand")
    answer = next(x for x in machine.handle(again, 2 * SECOND) if isinstance(x, fx.Answer))
    assert answer.fields["deadline_s"] == left_s
    machine.handle(ev.TimePassed(), 2 * SECOND + int(left_s * SECOND))
    assert not machine.state.tokens


def test_what_can_never_be_is_not_called_by_what_only_stands_in_the_way_now() -> None:
    machine = machine_with(SMALL, LARGE)
    change(machine, {"max_memory_per_agent_mb": 30_000})
    lease(machine, "r", Ask("a", 20_000))
    denied = lease(machine, "s", Ask("a", 20_000, gpus=2, wait_ns=SECOND))
    assert isinstance(denied, fx.AnswerDenial)
    assert denied.denial.final
    assert denied.denial.note is Note.INSUFFICIENT_MEMORY


@pytest.mark.parametrize(
    ("changes", "revision"),
    [
        ({"nonsense": True}, None),
        ({"default_memory_mb": -5}, None),
        ({"default_memory_mb": 100}, 99),
        ({"safe_mode": True, "default_memory_mb": 100}, None),
        ({"safe_mode": True}, 99),
        ({}, None),
    ],
)
def test_under_safe_mode_nothing_changes_whatever_is_asked(
    changes: Mapping[str, object], revision: int | None
) -> None:
    machine = machine_with(SMALL)
    change(machine, {"safe_mode": True})
    before = machine.state.policy
    answer = change(machine, changes, revision)
    assert isinstance(answer, fx.AnswerPolicy)
    assert answer.note == "SAFE_MODE"
    assert machine.state.policy is before
    error = change(machine, {"safe_mode": False, "nonsense": True})
    assert isinstance(error, fx.AnswerError)
    assert machine.state.safe_mode


@pytest.mark.parametrize("name", ["x" * 60_000, "a\n\x1b[31m", "\u202e", "\ud800"])
def test_a_field_that_is_none_is_named_escaped_and_cut(name: str) -> None:
    rule = {"agents": {"a": {name: 1}}}
    for changes in ({name: 1}, rule):
        answer = change(machine_with(SMALL), changes)
        assert isinstance(answer, fx.AnswerError)
        refusal = answer.refusal
        assert refusal.code is Code.BAD_REQUEST
        assert refusal.message.isprintable()
        assert len(refusal.message) < 400
        assert refusal.field is not None
        assert len(refusal.field) <= 80


def test_the_first_in_the_queue_is_given_the_estimate_that_it_was_told() -> None:
    machine = machine_with(SMALL)
    lease(machine, "r", Ask("a", 10_000, expected_ns=5 * SECOND))
    told = lease(machine, "s", Ask("a", 10_000, wait_ns=60 * SECOND))
    lease(machine, "t", Ask("a", 10_000, wait_ns=60 * SECOND))
    assert isinstance(told, fx.Announce)
    rows = views.queue(machine.state, views.Moment(SECOND, SECOND))["waiting"]
    assert isinstance(rows, list)
    assert [row["eta_s"] for row in rows] == [told.fields["eta_s"], None] == [5.0, None]


def test_leases_and_waits_count_to_the_user_of_their_connection() -> None:
    machine = machine_with(SMALL, limits=Limits(leases_per_uid=2))
    for number in range(2):
        assert isinstance(lease(machine, f"r{number}", Ask("a", 1)), fx.AnswerGrant)
        assert isinstance(lease(machine, f"s{number}", Ask("a", 1), OTHER), fx.AnswerGrant)
    for conn in (FIRST, OTHER):
        refused = lease(machine, f"t{conn}", Ask("a", 1), conn)
        assert isinstance(refused, fx.AnswerError)
        assert "of one user" in refused.refusal.message
    rows = snapshot.everything(machine.state)
    uids = sorted(row.uid for row in rows.values() if isinstance(row, LeaseRow))
    assert uids == [0, 0, 1_000, 1_000]
    machine.handle(ev.ClientLeft(OTHER), SECOND)
    invariants.check(machine.state, SECOND)
    assert machine.state.leases_by_uid == {0: 2}


def test_changes_that_wait_for_the_disk_are_bounded() -> None:
    machine = machine_with(SMALL)
    answers = []
    for number in range(BEHIND_MAX + 2):
        changes = {"default_memory_mb": 100 + number}
        asked = ev.PolicyChangeAsked(ADMIN, number, changes, None, {})
        answers += machine.handle(asked, SECOND)
    refused = [x for x in answers if isinstance(x, fx.AnswerError)]
    assert [x.request_id for x in refused] == [BEHIND_MAX + 1]
    assert refused[0].refusal.code is Code.LIMIT
    assert str(BEHIND_MAX) in refused[0].refusal.message
    for _ in range(BEHIND_MAX + 1):
        machine.handle(ev.SettingsPersisted(), SECOND)
    assert machine.state.policy.default_memory_mb == 100 + BEHIND_MAX


def test_a_card_of_which_the_driver_keeps_more_takes_nothing_more() -> None:
    machine = machine_with(SMALL)
    lease(machine, "r", Ask("a", 9_800))
    smaller = card(0, 10_000, reserved_mb=500, drain_ms=0)
    machine.handle(ev.DevicesFound((smaller,)), SECOND)
    invariants.check(machine.state, SECOND)
    denied = lease(machine, "s", Ask("a", 1))
    assert isinstance(denied, fx.AnswerDenial)
    machine.handle(ev.ReleaseAsked(FIRST, "x", Token("r")), SECOND)
    machine.handle(ev.DevicesFound((smaller,)), SECOND)
    assert isinstance(lease(machine, "t", Ask("a", 9_501)), fx.AnswerDenial)
    assert isinstance(lease(machine, "u", Ask("a", 9_500)), fx.AnswerGrant)


def test_cards_are_told_to_come_and_go_in_turn() -> None:
    machine = machine_with(SMALL, LARGE)
    change(machine, {"safe_mode": True})
    change(machine, {"safe_mode": False})
    told = machine.handle(ev.DevicesFound((SMALL,)), SECOND)
    names = [(x.name, x.fields["gpu"]) for x in told if isinstance(x, fx.Announce)]
    assert names == [("gpu.vanished", LARGE.uuid)]
    assert set(machine.state.devices) == {SMALL.uuid}
    again = machine.handle(ev.DevicesFound((SMALL, LARGE)), SECOND)
    names = [(x.name, x.fields["gpu"]) for x in again if isinstance(x, fx.Announce)]
    assert names == [("gpu.appeared", LARGE.uuid)]


def test_use_that_is_not_known_stays_so_when_its_holder_leases_again() -> None:
    real = card(0, 10_000)
    machine = machine_with(real)
    free = Reading(real.uuid, 10_000, 0)
    machine.handle(ev.ReadingsTaken(SECOND, (free,)), SECOND)
    lease(machine, "r", Ask("a", 5_000))
    untold = Reading(real.uuid, 7_000, 3_000, (ProcessUse(HOLDER, None),))
    machine.handle(ev.ReadingsTaken(SECOND, (untold,)), SECOND)
    machine.handle(ev.ReleaseAsked(FIRST, "x", Token("r")), SECOND)
    assert isinstance(lease(machine, "s", Ask("a", 5_000)), fx.AnswerGrant)
    assert machine.state.devices[real.uuid].holdings[HOLDER].used_mb is None
