"""The engine: a turn that could not be carried out is a bug, whoever began it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gpuorchd.core.effects import Announce, AnswerGrant, OpenDevices, TakeReading
from gpuorchd.core.events import ClientArrived, DevicesFound, LeaseAsked
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import NS_PER_S, Ask, ConnectionId, Peer, ProcessKey, Token
from gpuorchd.core.state import Settings
from gpuorchd.engine import Engine, TurnFailedError
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
