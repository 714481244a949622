"""Subscriptions tell everything in order, count exactly what was lost, and yield to others."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuorchd.server import subscriptions as room
from gpuorchd.server.replies import EventBody
from gpuorchd.server.subscriptions import Subscriptions, wanted_by
from libclient.wire.vocabulary import EVENTS

NAMES = ("lease.granted", "lease.released", "gpu.appeared")


class Reader:
    """A connection that may stop reading."""

    def __init__(self) -> None:
        self.unsent_bytes = 0
        self.reads = True
        self.got: list[tuple[str, int, int]] = []
        self.sends = 0

    def put_event(self, body: EventBody, subscription: int, seq: int) -> None:
        fields = body.fields
        count = fields.get("count", 0)
        assert isinstance(count, int)
        self.got.append((body.name, seq, count))
        if not self.reads:
            self.unsent_bytes += 1_000

    def send_now(self) -> None:
        self.sends += 1


async def settled() -> None:
    """Let the pump run until it has nothing to do."""
    for _ in range(2_000):
        await asyncio.sleep(0)


def made() -> Subscriptions:
    return Subscriptions(asyncio.get_running_loop(), lambda: 1.0)


async def test_everyone_is_told_in_order_of_publication() -> None:
    subscriptions = made()
    readers = [Reader() for _ in range(100)]
    for reader in readers:
        subscriptions.add(reader, 1, wanted_by(["lease"]))
    for number in range(30):
        subscriptions.publish(NAMES[number % 3], {})
    await settled()
    wanted = [NAMES[number % 3] for number in range(30) if number % 3 < 2]
    for reader in readers:
        assert [name for name, _, _ in reader.got] == wanted
        assert [seq for _, seq, _ in reader.got] == list(range(1, 21))
    subscriptions.close()


async def test_one_turn_of_the_loop_tells_a_bounded_number() -> None:
    subscriptions = made()
    readers = [Reader() for _ in range(1_000)]
    for reader in readers:
        subscriptions.add(reader, 1, wanted_by(None))
    subscriptions.publish("lease.granted", {})
    told: list[int] = []
    while sum(told) < len(readers):
        before = sum(reader.sends for reader in readers)
        await asyncio.sleep(0)
        told.append(sum(reader.sends for reader in readers) - before)
        assert told[-1] <= room.TOLD_PER_TURN
    assert all(len(reader.got) == 1 for reader in readers)
    subscriptions.close()


async def test_an_event_that_nobody_wants_costs_nothing() -> None:
    subscriptions = made()
    reader = Reader()
    subscriptions.add(reader, 1, wanted_by(["policy"]))
    subscriptions.publish("lease.granted", {"never": object()})
    await settled()
    assert reader.got == []
    subscriptions.close()


async def test_a_reader_that_was_slow_gets_what_is_left_and_the_count_of_the_rest() -> None:
    subscriptions = made()
    slow, quick = Reader(), Reader()
    slow.reads = False
    ours = subscriptions.add(slow, 1, wanted_by(["lease.granted"]))
    subscriptions.add(quick, 1, wanted_by(["lease"]))
    total = 3 * room.LOG_EVENTS
    for number in range(total):
        subscriptions.publish(NAMES[number % 2], {})
        if number % 100 == 0:
            await settled()
    await settled()
    assert len(quick.got) == total
    assert {name for name, _, _ in quick.got} == {"lease.granted", "lease.released"}
    slow.reads = True
    slow.unsent_bytes = 0
    subscriptions.wake(ours)
    await settled()
    lost = sum(count for name, _, count in slow.got if name == "events.lost")
    told = sum(1 for name, _, _ in slow.got if name == "lease.granted")
    assert lost > 0
    assert told + lost == total // 2
    assert [seq for _, seq, _ in slow.got] == list(range(1, len(slow.got) + 1))
    subscriptions.close()


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["publish", "stop", "read"]), st.integers(0, 2)), max_size=60
    )
)
def test_told_and_lost_add_up_whatever_the_reader_does(steps: list[tuple[str, int]]) -> None:
    async def run() -> None:
        subscriptions = made()
        readers = [Reader() for _ in NAMES]
        theirs = [
            subscriptions.add(reader, 1, wanted_by([name]))
            for reader, name in zip(readers, NAMES, strict=True)
        ]
        published = [0] * len(NAMES)
        for step, which in steps:
            if step == "publish":
                for _ in range(7 * (which + 1)):
                    subscriptions.publish(NAMES[which], {})
                published[which] += 7 * (which + 1)
            else:
                readers[which].reads = step == "read"
                if step == "read":
                    readers[which].unsent_bytes = 0
                    subscriptions.wake(theirs[which])
            await asyncio.sleep(0)
        for reader, ours in zip(readers, theirs, strict=True):
            reader.reads = True
            reader.unsent_bytes = 0
            subscriptions.wake(ours)
        for _ in range(200):
            await asyncio.sleep(0)
        for reader, count in zip(readers, published, strict=True):
            lost = sum(lost for _, _, lost in reader.got)
            told = sum(1 for name, _, _ in reader.got if name != "events.lost")
            assert told + lost == count
            assert [seq for _, seq, _ in reader.got] == list(range(1, len(reader.got) + 1))
        subscriptions.close()

    log_events, room.LOG_EVENTS = room.LOG_EVENTS, 10  # type: ignore[misc]  # a small log soon loses
    visit_bytes, room.VISIT_BYTES = room.VISIT_BYTES, 300  # type: ignore[misc]  # as above
    try:
        asyncio.run(run())
    finally:
        room.LOG_EVENTS = log_events  # type: ignore[misc]  # as above
        room.VISIT_BYTES = visit_bytes  # type: ignore[misc]  # as above


async def test_nothing_is_told_after_the_end_of_a_subscription() -> None:
    subscriptions = made()
    reader, other = Reader(), Reader()
    ours = subscriptions.add(reader, 1, wanted_by(None))
    subscriptions.add(other, 1, wanted_by(None))
    subscriptions.publish("lease.granted", {})
    subscriptions.remove(ours)
    subscriptions.remove(ours)
    await settled()
    assert reader.got == []
    assert len(other.got) == 1
    subscriptions.close()


async def test_a_new_subscription_begins_with_the_next_event() -> None:
    subscriptions = made()
    first, second = Reader(), Reader()
    subscriptions.add(first, 1, wanted_by(None))
    subscriptions.publish("lease.granted", {})
    subscriptions.add(second, 1, wanted_by(None))
    subscriptions.publish("lease.released", {})
    await settled()
    assert [name for name, _, _ in first.got] == ["lease.granted", "lease.released"]
    assert [name for name, _, _ in second.got] == ["lease.released"]
    subscriptions.close()


def test_topics_are_areas_events_or_everything() -> None:
    everything = frozenset(range(len(EVENTS)))
    assert wanted_by(None) == wanted_by(["*"]) == everything
    assert wanted_by(["lease"]) == wanted_by(["lease.*"])
    assert wanted_by(["lease", "gpu", "policy", "daemon"]) == everything
    assert wanted_by(["gpu.unhealthy"]) == {EVENTS.index("gpu.unhealthy")}
    for unknown in ("", "le", "lease.", "lease.grant", "lease.granted.*", "events"):
        with pytest.raises(KeyError):
            wanted_by([unknown])
