"""Admission where readings are odd: the smaller of two views counts, and unknown is never zero."""

from __future__ import annotations

import re

import pytest

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import (
    Ask,
    ConnectionId,
    Note,
    Peer,
    ProcessKey,
    ProcessUse,
    Reading,
    RequestId,
    Token,
)
from gpuorchd.core.state import Limits, Settings
from tests.support.world import SECOND, card

FIRST, SECOND_ONE = ConnectionId(1), ConnectionId(2)
HOLDER, OTHER = ProcessKey(101, 1010), ProcessKey(102, 1020)
CARD = card(0, 10_000)


@pytest.fixture
def machine() -> Machine:
    machine = Machine(Settings("admission", limits=Limits(waiting_per_connection=3)))
    machine.handle(ev.DevicesFound((CARD,)), SECOND)
    for conn, process in ((FIRST, HOLDER), (SECOND_ONE, OTHER)):
        machine.handle(ev.ClientArrived(conn, Peer(process, 1000)), SECOND)
    return machine


def read(machine: Machine, free_mb: int, *uses: ProcessUse, at_ns: int = SECOND) -> None:
    reading = Reading(CARD.uuid, free_mb, 10_000 - free_mb, uses)
    machine.handle(ev.ReadingsTaken(at_ns, (reading,)), at_ns)


def ask(
    machine: Machine,
    conn: ConnectionId,
    memory_mb: int,
    *,
    request_id: RequestId = None,
    wait_ns: int = 0,
    at_ns: int = SECOND,
) -> Note | str:
    """Ask for a lease; give `granted`, `waits`, an error's code, or the note of the denial."""
    token = Token(f"{conn} {request_id} {memory_mb} {at_ns}")
    event = ev.LeaseAsked(conn, request_id, Ask("analyst", memory_mb, wait_ns=wait_ns), token)
    for effect in machine.handle(event, at_ns):
        match effect:
            case fx.AnswerGrant():
                return "granted"
            case fx.AnswerDenial():
                return effect.denial.note
            case fx.AnswerError():
                return effect.refusal.code.value
            case _:
                continue
    return "waits"


def test_the_ledger_bounds_what_a_driver_calls_free(machine: Machine) -> None:
    read(machine, 10_000)
    assert ask(machine, FIRST, 8_000) == "granted"
    # The driver counts the holder's use and calls it free all the same.
    read(machine, 10_000, ProcessUse(HOLDER, 8_000))
    assert ask(machine, SECOND_ONE, 2_001) is Note.INSUFFICIENT_MEMORY
    assert ask(machine, SECOND_ONE, 2_000) == "granted"


def test_the_driver_bounds_what_the_ledger_has_left(machine: Machine) -> None:
    read(machine, 1_000)
    assert ask(machine, FIRST, 1_001) is Note.INSUFFICIENT_MEMORY
    assert ask(machine, FIRST, 1_000) == "granted"


def test_a_holders_own_use_is_counted_once(machine: Machine) -> None:
    read(machine, 10_000)
    assert ask(machine, FIRST, 6_000) == "granted"
    read(machine, 4_000, ProcessUse(HOLDER, 6_000))
    assert ask(machine, SECOND_ONE, 4_000) == "granted"


def test_use_that_the_driver_does_not_tell_counts_as_not_used_yet(machine: Machine) -> None:
    read(machine, 10_000)
    assert ask(machine, FIRST, 5_000) == "granted"
    read(machine, 7_000, ProcessUse(HOLDER, None))
    assert ask(machine, SECOND_ONE, 2_001) is Note.INSUFFICIENT_MEMORY
    assert ask(machine, SECOND_ONE, 2_000) == "granted"


def test_a_process_may_lease_what_it_used_before_its_first_lease(machine: Machine) -> None:
    read(machine, 3_000, ProcessUse(HOLDER, 7_000))
    assert ask(machine, SECOND_ONE, 3_001) is Note.INSUFFICIENT_MEMORY
    assert ask(machine, FIRST, 10_000) == "granted"


def test_a_negative_amount_of_free_memory_is_not_a_promise(machine: Machine) -> None:
    read(machine, 10_000)
    assert ask(machine, FIRST, 9_000) == "granted"
    read(machine, 0, ProcessUse(ProcessKey(7, 70), 10_000))
    assert ask(machine, SECOND_ONE, 1) is Note.INSUFFICIENT_MEMORY


def test_the_same_card_keeps_its_leases_when_the_driver_is_away(machine: Machine) -> None:
    read(machine, 10_000)
    assert ask(machine, FIRST, 9_000) == "granted"
    machine.handle(ev.DevicesLost("reloading"), SECOND)
    assert ask(machine, SECOND_ONE, 1_000) is Note.NO_GPU
    machine.handle(ev.DevicesFound((CARD,)), SECOND)
    assert ask(machine, SECOND_ONE, 1_000) is Note.UNHEALTHY
    read(machine, 10_000)
    assert ask(machine, SECOND_ONE, 1_001) is Note.INSUFFICIENT_MEMORY
    assert ask(machine, SECOND_ONE, 1_000) == "granted"


def test_many_requests_without_an_id_wait_and_are_answered_each(machine: Machine) -> None:
    read(machine, 10_000)
    assert ask(machine, FIRST, 10_000) == "granted"
    waits = [
        ask(machine, SECOND_ONE, memory_mb, wait_ns=2 * SECOND) for memory_mb in (100, 200, 300)
    ]
    assert waits == ["waits"] * 3
    assert ask(machine, SECOND_ONE, 400, wait_ns=2 * SECOND) == "limit"
    read(machine, 10_000, at_ns=2 * SECOND)
    effects = machine.handle(ev.TimePassed(), 3 * SECOND)
    denied = [effect for effect in effects if isinstance(effect, fx.AnswerDenial)]
    assert [effect.denial.note for effect in denied] == [Note.TIMEOUT] * 3
    assert len(machine.state.queue) == 0


def test_an_earlier_reading_does_not_replace_a_later_one(machine: Machine) -> None:
    read(machine, 1_000, at_ns=2 * SECOND)
    late = Reading(CARD.uuid, 10_000, 0)
    machine.handle(ev.ReadingsTaken(SECOND, (late,)), 2 * SECOND)
    assert ask(machine, FIRST, 1_001, at_ns=2 * SECOND) is Note.INSUFFICIENT_MEMORY


@pytest.mark.parametrize(
    ("asked", "capped_mb", "says"),
    [
        (Ask("analyst", 9_000), 0, "to be had of"),
        (Ask("analyst", 20_000), 0, "the whole GPU has"),
        (Ask("analyst", 4_000), 3_000, "may have"),
        (Ask("analyst", 2_000), 3_000, "asked and"),
        (Ask("analyst", exclusive=True), 0, "leased and"),
    ],
)
def test_every_amount_in_a_reason_has_its_unit(
    machine: Machine, asked: Ask, capped_mb: int, says: str
) -> None:
    read(machine, 7_000, ProcessUse(ProcessKey(9, 9), 3_000))
    assert ask(machine, FIRST, 2_000) == "granted"
    if capped_mb:
        changes = {"max_memory_per_agent_mb": capped_mb}
        machine.handle(ev.PolicyChangeAsked(FIRST, 2, changes, None, {}), SECOND)
        machine.handle(ev.SettingsPersisted(), SECOND)
    effects = machine.handle(ev.LeaseAsked(SECOND_ONE, 3, asked, Token("t")), SECOND)
    (denial,) = (effect.denial for effect in effects if isinstance(effect, fx.AnswerDenial))
    (reason,) = denial.reasons
    assert says in reason.detail
    amounts = re.findall(r"\d{2,}\S*( \w+)?", reason.detail)
    assert amounts
    assert set(amounts) == {" MiB"}, reason.detail
