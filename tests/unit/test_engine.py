"""The engine: a turn that fails is a bug, and what it grants is of one moment on both clocks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from gpuorchd import views
from gpuorchd.core import snapshot
from gpuorchd.core.effects import Announce, AnswerGrant, OpenDevices, TakeReading
from gpuorchd.core.events import ClientArrived, DevicesFound, Kept, LeaseAsked, Restored, TimePassed
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import NS_PER_S, Ask, ConnectionId, Peer, ProcessKey, Token
from gpuorchd.core.rows import ClientRow, DeviceRow, LeaseRow
from gpuorchd.core.state import Settings
from gpuorchd.engine import Engine, TurnFailedError
from gpuorchd.server import replies
from gpuorchd.views import Moment
from tests.support.world import card

CONN = ConnectionId(1)


async def test_an_operating_systems_error_in_a_turn_of_the_timer_is_a_bug() -> None:
    loop = asyncio.get_running_loop()
    met: asyncio.Future[BaseException] = loop.create_future()

    def on_exception(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        met.set_result(context["exception"])

    loop.set_exception_handler(on_exception)
    engine = Engine(Machine(Settings("engine", ttl_ns=NS_PER_S // 50)), loop)

    def announce(effect: Announce) -> None:
        if effect.name == "lease.expired":
            raise PermissionError(13, "an actor that does not expect this")

    engine.on(Announce, announce)
    for kind in (AnswerGrant, OpenDevices, TakeReading):
        engine.on(kind, lambda effect: None)
    engine.submit(DevicesFound((card(0, 1_000, drain_ms=0),)))
    engine.submit(ClientArrived(CONN, Peer(ProcessKey(1, 1), 0)))
    engine.submit(LeaseAsked(CONN, 1, Ask("a", 100), Token("t")))
    error = await asyncio.wait_for(met, 10)
    engine.close()
    # Not an OSError: those are taken for the outside's, and end nothing.
    assert isinstance(error, TurnFailedError)
    assert isinstance(error.__cause__, PermissionError)
    assert "TimePassed" in str(error)


async def test_a_grant_is_of_one_moment_whatever_the_wall_clock_is_set_to_later() -> None:
    wall_ns = [1_000 * NS_PER_S]
    machine = Machine(Settings("engine"))
    engine = Engine(machine, asyncio.get_running_loop(), wall_clock=lambda: wall_ns[0])
    shown: list[replies.Grant] = []
    engine.on(AnswerGrant, lambda effect: shown.append(replies.grant(effect.lease)))
    for kind in (Announce, OpenDevices, TakeReading):
        engine.on(kind, lambda effect: None)
    engine.submit(DevicesFound((card(0, 1_000, drain_ms=0),)))
    engine.submit(ClientArrived(CONN, Peer(ProcessKey(1, 1), 0)))
    wall_ns[0] += 7
    engine.submit(LeaseAsked(CONN, 1, Ask("a", 100), Token("t")))
    wall_ns[0] -= 3_600 * NS_PER_S
    engine.submit(TimePassed())
    (lease,) = machine.state.leases.values()
    again = replies.grant(lease)
    moment = Moment(engine.now_ns(), wall_ns[0])
    (row,) = msgspec.to_builtins(views.allocations(machine.state, moment))["allocations"]
    engine.close()
    assert shown == [again]
    assert row["timestamp"] == again.timestamp == 1_000.000_000_007


def test_a_grant_is_of_the_same_moment_after_a_restart() -> None:
    machine = Machine(Settings("engine", ttl_ns=NS_PER_S))
    machine.handle(DevicesFound((card(0, 1_000, drain_ms=0),)), NS_PER_S, 50 * NS_PER_S)
    machine.handle(ClientArrived(CONN, Peer(ProcessKey(1, 1), 0)), NS_PER_S, 50 * NS_PER_S)
    asked = LeaseAsked(CONN, 1, Ask("a", 100), Token("t"))
    machine.handle(asked, 2 * NS_PER_S, 51 * NS_PER_S)
    (before,) = machine.state.leases.values()
    rows = snapshot.everything(machine.state).values()
    kept = Kept(
        tuple(row for row in rows if isinstance(row, DeviceRow)),
        tuple(row for row in rows if isinstance(row, ClientRow)),
        tuple(row for row in rows if isinstance(row, LeaseRow)),
    )
    after = Machine(Settings("engine", ttl_ns=NS_PER_S))
    restored = Restored(kept, frozenset((CONN,)), frozenset(), NS_PER_S)
    after.handle(restored, 2 * NS_PER_S + 5, 99 * NS_PER_S)
    (lease,) = after.state.leases.values()
    assert replies.grant(lease).timestamp == replies.grant(before).timestamp == 51.0
