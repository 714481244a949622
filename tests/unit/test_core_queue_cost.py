"""What a long queue costs the others: a pass over it decides few requests, however many wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpuorchd.core import events as ev
from gpuorchd.core import forecast, placement
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import Ask, ConnectionId, Peer, ProcessKey, Token
from gpuorchd.core.state import Limits, Settings
from tests.support.world import SECOND, card

BUSY, FREE = card(0, 10_000, drain_ms=0), card(1, 10_000, drain_ms=0)
HOLDER, OTHER = ConnectionId(1), ConnectionId(2)
LONG_NS = 1_000 * SECOND
LIMITS = Limits(leases_per_connection=2_000, waiting_per_connection=2_000)


def crowd(wait: Callable[[int], Ask], waiters: int, *, cordoned: bool = False) -> Machine:
    """Fill the first card, and let so many wait for it, each on a connection of its own process."""
    machine = Machine(Settings("cost", limits=LIMITS))
    machine.handle(ev.DevicesFound((BUSY, FREE)), SECOND)
    for conn in (HOLDER, OTHER):
        machine.handle(ev.ClientArrived(conn, Peer(ProcessKey(conn, 1), 1_000)), SECOND)
    ask(machine, HOLDER, Ask("holder", 10_000, devices=(0,)))
    if cordoned:
        machine.handle(ev.CordonAsked(HOLDER, "cordon", 0, "by hand"), SECOND)
        machine.handle(ev.SettingsPersisted(), SECOND)
    for number in range(waiters):
        conn = ConnectionId(10 + number)
        machine.handle(ev.ClientArrived(conn, Peer(ProcessKey(conn, 1), 1_000)), SECOND)
        ask(machine, conn, wait(number)._replace(wait_ns=LONG_NS))
    assert len(machine.state.queue) == waiters
    return machine


def ask(machine: Machine, conn: ConnectionId, ask: Ask) -> Token:
    """Ask for a lease; give what would be its token."""
    token = Token(f"{conn} {ask.purpose} {machine.state.granted_total}")
    machine.handle(ev.LeaseAsked(conn, str(token), ask, token), SECOND)
    return token


def decisions(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> int:
    """Count what is decided while somebody leases on the other card, and releases again."""
    decided = 0
    place = placement.place

    def count(*args: object, **options: object) -> object:
        nonlocal decided
        decided += 1
        return place(*args, **options)  # type: ignore[arg-type]  # passed on as it came

    with monkeypatch.context() as patch:
        patch.setattr(placement, "place", count)
        token = ask(machine, OTHER, Ask("other", 1, devices=(1,)))
        machine.handle(ev.ReleaseAsked(OTHER, "back", token), SECOND)
    assert machine.state.live_leases == 1
    return decided


@pytest.mark.parametrize(
    ("wait", "cordoned"),
    [
        (lambda number: Ask("a", 10_000, devices=(0,), purpose=str(number)), False),
        (lambda number: Ask("a", 10_000 - number, devices=(0,)), False),
        (lambda number: Ask(f"a{number}", 1 + number, devices=(0,), purpose="x"), False),
        (lambda number: Ask("a", devices=(0,), labels=(("n", str(number)),)), False),
        (lambda number: Ask("a", devices=(BUSY.uuid,), expected_ns=1 + number), False),
        (lambda number: Ask("a", exclusive=True, devices=(0,) * (1 + number)), False),
        (lambda number: Ask(f"a{number}", 1 + number, devices=(0,)), True),
    ],
)
def test_those_who_wait_for_another_gpu_cost_nothing_each(
    wait: Callable[[int], Ask], cordoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = decisions(crowd(wait, 5, cordoned=cordoned), monkeypatch)
    many = decisions(crowd(wait, 60, cordoned=cordoned), monkeypatch)
    assert few == many <= 4


def test_requests_alike_are_decided_once_whatever_they_say_of_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def over_cap(number: int) -> Ask:
        return Ask("holder", 1 + number, devices=(0, 1), gpus=2, purpose=str(number))

    counts = []
    for waiters in (5, 60):
        machine = crowd(lambda number: Ask("a", 10_000, devices=(0,)), 0)
        changes = {"agents": {"holder": {"max_memory_mb": 10_000}}}
        machine.handle(ev.PolicyChangeAsked(HOLDER, "policy", changes, None, {}), SECOND)
        machine.handle(ev.SettingsPersisted(), SECOND)
        for number in range(waiters):
            ask(machine, HOLDER, over_cap(number)._replace(wait_ns=LONG_NS))
        assert len(machine.state.queue) == waiters
        counts.append(decisions(machine, monkeypatch))
    assert counts[0] == counts[1] <= 4


def test_a_pass_estimates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = crowd(lambda number: Ask("a", 10_000, devices=(0,)), 5)

    def estimate(*args: object) -> None:
        raise AssertionError("an estimate that nobody is told")

    monkeypatch.setattr(forecast, "eta_ns", estimate)
    assert decisions(machine, monkeypatch) <= 4
