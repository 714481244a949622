"""Unasked events: an owner that does not read is told the latest place of each of its waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpuorchd.core import events as ev
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import Ask, ConnectionId, Peer, ProcessKey, RequestId, Token
from gpuorchd.core.state import Settings
from gpuorchd.server.unasked import QUEUED, Unasked
from tests.support.world import SECOND, card

CONN = ConnectionId(1)


@pytest.mark.parametrize("ids", [("a", "b", "c"), (None, None, None)])
def test_places_held_back_are_told_by_request_with_an_id_or_without(
    ids: tuple[RequestId, ...],
) -> None:
    machine = Machine(Settings("unasked"))
    machine.handle(ev.DevicesFound((card(0, 1_000, drain_ms=0),)), SECOND)
    machine.handle(ev.ClientArrived(CONN, Peer(ProcessKey(1, 1), 0)), SECOND)
    machine.handle(ev.LeaseAsked(CONN, "held", Ask("a", 1_000), Token("held")), SECOND)
    for number, request_id in enumerate(ids):
        ask = Ask("a", 100, wait_ns=SECOND)
        machine.handle(ev.LeaseAsked(CONN, request_id, ask, Token(str(number))), SECOND)
    told: list[tuple[object, object]] = []
    speaker: Any = SimpleNamespace(
        unsent_bytes=2,
        bound_bytes=1,
        number=CONN,
        board=SimpleNamespace(state=machine.state, unix_s=lambda: 0.0),
        put_event=lambda body, subscription, seq: told.append(
            (body.fields["queue_id"], body.fields["position"])
        ),
    )
    unasked = Unasked(speaker)
    waiting = list(machine.state.queue)
    for position in (9, 5):
        for waiter in waiting:
            fields = {"queue_id": waiter.queue_id, "position": position}
            unasked.tell(QUEUED, {**fields, "request_id": waiter.request_id})
    assert told == []
    machine.handle(ev.TimePassed(), SECOND)
    gone = waiting.pop(0)
    machine.state.clients[CONN].requests = {
        key: each for key, each in machine.state.clients[CONN].requests.items() if each is not gone
    }
    speaker.unsent_bytes = 0
    unasked.resume()
    assert told == [(waiter.queue_id, 5) for waiter in waiting]
