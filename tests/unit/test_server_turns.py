"""Turns: the loop's time is shared out, counted by a clock that only work moves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from gpuorchd import views
from gpuorchd.server import switchboard
from gpuorchd.server.turns import SHARE_NS, TURN_NS, Turns
from tests.support.wire import LENGTH, packed
from tests.unit.test_server_room import Bugs, served

CROWD, PIPELINED = 20, 10


class Clock:
    """Time that passes only where work is done."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


class Peer:
    """A connection with so many requests, each of which takes so long."""

    def __init__(
        self, clock: Clock, name: str, requests: int, cost_ns: int, *, view: bool = False
    ) -> None:
        self.clock, self.name, self.left, self.cost_ns = clock, name, requests, cost_ns
        self.wants_view = view
        self.turns: Turns | None = None
        self.taken: list[str] = []

    def take_turn(self, until_ns: int) -> None:
        assert until_ns == self.clock.now_ns + SHARE_NS
        while self.left:
            self.left -= 1
            self.clock.now_ns += self.cost_ns
            self.taken.append(self.name)
            if self.clock.now_ns >= until_ns:
                break
        if self.left and self.turns is not None:
            self.turns.line_up(self)


async def turn() -> None:
    """Let one turn of the loop pass."""
    await asyncio.sleep(0)


async def test_a_turn_ends_when_its_time_is_used_and_those_in_line_come_one_after_the_other() -> (
    None
):
    clock = Clock()
    turns = Turns(asyncio.get_running_loop(), clock)
    order: list[str] = []
    for name in "abcdef":
        peer = Peer(clock, name, 2, TURN_NS // 4)
        peer.turns, peer.taken = turns, order
        turns.line_up(peer)
    for taken in ("abcd", "efab", "cdef", ""):
        order.clear()
        began_ns = clock.now_ns
        await turn()
        assert "".join(order) == taken
        assert clock.now_ns - began_ns <= TURN_NS


async def test_views_come_after_all_else_and_one_of_each_line_comes_in_every_turn() -> None:
    clock = Clock()
    turns = Turns(asyncio.get_running_loop(), clock)
    order: list[str] = []
    for name, view in (("v", True), ("w", True), ("a", False), ("b", False)):
        peer = Peer(clock, name, 1, TURN_NS, view=view)
        peer.taken = order
        turns.line_up(peer)
    for taken in ("av", "bw", ""):
        order.clear()
        await turn()
        assert "".join(order) == taken


async def test_who_has_just_read_gets_a_share_only_while_the_turn_has_time_and_nobody_waits() -> (
    None
):
    clock = Clock()
    turns = Turns(asyncio.get_running_loop(), clock)
    assert turns.share(clock()) == SHARE_NS
    clock.now_ns += TURN_NS
    turns.spend(0)
    assert turns.share(clock()) == 0
    await turn()
    assert turns.share(clock()) == clock() + SHARE_NS
    turns.line_up(Peer(clock, "a", 1, 1))
    assert turns.share(clock()) == 0
    turns.close()


async def test_what_peers_pipeline_holds_another_up_for_no_longer_than_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(switchboard, "Turns", lambda loop: Turns(loop, clock))
    shown = views.allocations
    # Of each view that was made: in which turn of the loop.
    made: list[int] = []
    turn_number = 0

    def allocations(*asked: object) -> Mapping[str, object]:
        clock.now_ns += TURN_NS
        made.append(turn_number)
        return shown(*asked)  # type: ignore[arg-type]  # as the server asks

    def count_turns() -> None:
        nonlocal turn_number
        turn_number += 1
        if len(made) < CROWD * PIPELINED:
            loop.call_soon(count_turns)

    monkeypatch.setattr(views, "allocations", allocations)
    async with served(Bugs(), tmp_path / "s"):
        crowd = [await asyncio.open_unix_connection(tmp_path / "s") for _ in range(CROWD)]
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")

        async def ask_health() -> None:
            writer.write(packed({"id": 1, "op": "health"}))
            (length,) = LENGTH.unpack(await reader.readexactly(4))
            await reader.readexactly(length)

        await ask_health()
        count_turns()
        burst = b"".join(packed({"id": n, "op": "allocations"}) for n in range(PIPELINED))
        for _, one in crowd:
            one.write(burst)
        while not made:
            await turn()
        between = []
        while len(made) < CROWD * PIPELINED // 2:
            before = len(made)
            await ask_health()
            between.append(len(made) - before)
        for peer, _ in crowd:
            for _ in range(PIPELINED):
                (length,) = LENGTH.unpack(await peer.readexactly(4))
                await peer.readexactly(length)
        for _, one in [*crowd, (reader, writer)]:
            one.close()
            await one.wait_closed()
    # A view from what was read in the turn, and one from the line.
    assert max(made.count(number) for number in set(made)) <= 2
    # Sent, read and answered, heard: a few turns, and not what the crowd has asked for.
    assert max(between) <= 10
    assert len(made) == CROWD * PIPELINED
