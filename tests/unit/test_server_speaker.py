"""What a connection says: there is an answer even to what cannot be repeated."""

from __future__ import annotations

import json
import socket
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from gpuorchd.core.model import ConnectionId
from gpuorchd.server.bounds import LimitCounts
from gpuorchd.server.faults import Fault
from gpuorchd.server.outbox import Unsent
from gpuorchd.server.speaker import Speaker


@pytest.mark.parametrize(
    "fault",
    [
        Fault("bad_request", "id", "id", "\ud800"),
        Fault("bad_request", "half of \udfff", "id", 1),
        Fault("bad_request", "id", "\ud800", 1),
    ],
)
@pytest.mark.parametrize("text", [True, False])
def test_a_fault_that_cannot_be_said_is_answered_all_the_same(fault: Fault, text: bool) -> None:
    counted: Counter[tuple[str, str]] = Counter()
    board: Any = SimpleNamespace(
        unsent=Unsent(),
        dirty=[],
        limits=LimitCounts(),
        count=lambda *key: counted.update([key]),
    )
    here, there = socket.socketpair()
    with here, there:
        speaker = Speaker(board, ConnectionId(1), here.fileno())
        if text:
            speaker.speak_text()
        speaker.refuse(fault)
        speaker.outbox.flush()
        said = there.recv(65_536)
    assert counted == {("unknown", "bad_request"): 1}
    assert b"bad_request" in said
    if text:
        told = json.loads(said)
        assert (told["id"], told["ok"]) == (None, False)
