"""A real engine on simulated cards and a clock that the test moves: what the observe room looks at.

Each connection is a process of its own, of one of ten users. Tokens all hold `SECRET`, so that a
test can look for them wherever they must not be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast, get_args

from gpuorchd.core.effects import Effect
from gpuorchd.core.events import (
    ClientArrived,
    ClientLeft,
    DevicesFound,
    LeaseAsked,
    ReleaseAsked,
    TimePassed,
)
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import (
    NS_PER_S,
    Ask,
    ConnectionId,
    DeviceFacts,
    DeviceUuid,
    Peer,
    ProcessKey,
    Token,
)
from gpuorchd.core.state import Settings
from gpuorchd.engine import Engine

SECRET = "kept-secret"
DRAIN_NS = 100_000_000
DEADLINE_S = 10.0


class _StillLoop:
    """A loop whose timers never fire: the test says when time has passed."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.Handle:
        return cast("asyncio.Handle", self)

    def cancel(self) -> None:
        pass


class ObservedEngine(Engine):
    """An engine with cards, and short ways to make things happen."""

    def __init__(self, cards: int = 2, total_mb: int = 81_920, *, simulated: bool = True) -> None:
        self.time_ns = 1_000 * NS_PER_S
        machine = Machine(Settings("an-epoch"))
        super().__init__(machine, cast("Any", _StillLoop()), lambda: self.time_ns)
        for kind in get_args(Effect):
            self.on(kind, lambda effect: None)
        self._conns = 0
        drain_ns = DRAIN_NS if simulated else None
        facts = [
            DeviceFacts(DeviceUuid(f"GPU-{n}"), n, "card", total_mb, drain_ns=drain_ns)
            for n in range(cards)
        ]
        if cards:
            self.submit(DevicesFound(tuple(facts)))

    def ask(self, agent: str = "analyst", memory_mb: int = 1_000, wait_s: int = 0) -> ConnectionId:
        """Let a new process ask for a lease."""
        self._conns += 1
        conn = ConnectionId(self._conns)
        process = ProcessKey(10_000 + conn, 5)
        self.submit(ClientArrived(conn, Peer(process, uid=1_000 + conn % 10)))
        ask = Ask(agent, memory_mb, wait_ns=wait_s * NS_PER_S)
        self.submit(LeaseAsked(conn, 1, ask, self.token(conn)))
        return conn

    def release(self, conn: ConnectionId) -> None:
        """Give a lease back."""
        self.submit(ReleaseAsked(conn, 2, self.token(conn)))

    def leave(self, conn: ConnectionId) -> None:
        """End a connection."""
        self.submit(ClientLeft(conn))

    def pass_s(self, duration_s: float) -> None:
        """Let time pass, and what is due happen."""
        self.time_ns += round(duration_s * NS_PER_S)
        self.submit(TimePassed())

    @staticmethod
    def token(conn: ConnectionId) -> Token:
        """The token of a connection's lease."""
        return Token(f"{SECRET}-{conn}")


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds, or fail after `DEADLINE_S`."""
    async with asyncio.timeout(DEADLINE_S):
        # Conditions are of the outside (a pipe, a socket): there is nothing to be woken by.
        while not condition():
            await asyncio.sleep(0.005)
