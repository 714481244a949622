"""Subscriptions: who is told of what, in order, without anyone waiting for a slow reader.

One log of recent events serves all subscribers. Publishing adds to the log and costs the same
however many there are; a pump then visits the subscribers, a few in each turn of the loop, so
that lease work goes between. Each subscription knows the last event that it has seen. One that
falls behind the log's end is told how many events it lost, counted from the totals that every
event carries, and goes on from there. So what a slow reader costs is bounded by the log, which is
shared, and by its outbox.

Events are told in order of their publication; `seq` rises by one with everything that is told.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from gpuorchd.server.replies import EventBody
from libclient.wire.vocabulary import EVENTS, EVENTS_LOST, TOPICS

# What the log keeps: some seconds of a busy daemon, about a megabyte.
LOG_EVENTS: Final = 4_096
LOG_BYTES: Final = 1_048_576
# Subscribers visited in one turn of the loop: those written to, and those merely looked at.
TOLD_PER_TURN: Final = 32
LOOKED_AT_PER_TURN: Final = 512
# A subscriber gets no more than this in one visit, and nothing while as much is still unsent.
VISIT_BYTES: Final = 32_768

INDEX_OF: Final[Mapping[str, int]] = {name: at for at, name in enumerate(EVENTS)}


class Listener(Protocol):
    """A connection, as its subscriptions see it."""

    @property
    def unsent_bytes(self) -> int:
        """Bytes put and not yet taken by the kernel."""

    def put_event(self, body: EventBody, subscription: int, seq: int) -> None:
        """Add an event to what is to be sent."""

    def send_now(self) -> None:
        """Send what has been put, as far as the kernel takes it."""


class _Published:
    """An event in the log. `totals` count the events of every name up to and with this one."""

    __slots__ = ("body", "index", "totals")

    def __init__(self, index: int, body: EventBody, totals: tuple[int, ...]) -> None:
        self.index = index
        self.body = body
        self.totals = totals


class Subscription:
    """One subscription of one connection."""

    __slots__ = ("listener", "number", "seen", "seq", "totals", "wanted")

    def __init__(self, listener: Listener, number: int, wanted: frozenset[int]) -> None:
        self.listener = listener
        self.number = number
        self.wanted = wanted
        # The number of the last event told or passed over, and the totals at that point.
        self.seen = 0
        self.totals: tuple[int, ...] = ()
        self.seq = 0


class Subscriptions:
    """All subscriptions. Not thread-safe: call it on the loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, unix_s: Callable[[], float]) -> None:
        self._loop = loop
        self._unix_s = unix_s
        self._log: dict[int, _Published] = {}
        self._log_bytes = 0
        self._first = 1
        self._last = 0
        self._totals = (0,) * len(EVENTS)
        # How many subscriptions want each event.
        self._interest = [0] * len(EVENTS)
        # Those that read and had more for them than one visit gives: they need no round.
        self._behind: OrderedDict[Subscription, None] = OrderedDict()
        self._round: OrderedDict[Subscription, None] = OrderedDict()
        # Visits that are left until every subscription has been visited since the last event.
        self._due = 0
        # Whether there is any subscription at all.
        self.any = False
        # Events dropped and told as `events.lost`, over all subscriptions and since the start.
        self.lost_total = 0
        self._pump: asyncio.Handle | None = None

    @property
    def count(self) -> int:
        """How many subscriptions there are."""
        return len(self._round)

    def add(self, listener: Listener, number: int, wanted: frozenset[int]) -> Subscription:
        """Subscribe a connection to the events at `wanted`, from the next one on."""
        subscription = Subscription(listener, number, wanted)
        subscription.seen = self._last
        subscription.totals = self._totals
        for index in wanted:
            self._interest[index] += 1
        self._round[subscription] = None
        self.any = True
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """End a subscription: nothing more is told."""
        if subscription not in self._round:
            return
        del self._round[subscription]
        self._behind.pop(subscription, None)
        for index in subscription.wanted:
            self._interest[index] -= 1
        if not self._round:
            self.any = False
            self._log.clear()
            self._log_bytes = 0
            self._first = self._last + 1

    def publish(self, name: str, fields: Mapping[str, object]) -> None:
        """Tell an event of the catalogue to those who want it, soon."""
        index = INDEX_OF[name]
        if not self._interest[index]:
            return
        self._totals = _added(self._totals, index, 1)
        self._last += 1
        body = EventBody(name, fields, self._unix_s())
        self._log[self._last] = _Published(index, body, self._totals)
        self._log_bytes += body.size
        while len(self._log) > LOG_EVENTS or self._log_bytes > LOG_BYTES:
            self._log_bytes -= self._log.pop(self._first).body.size
            self._first += 1
        self._due = len(self._round)
        self._pump_soon()

    def wake(self, subscription: Subscription) -> None:
        """Go on with a subscriber that did not read and now does."""
        if subscription.seen < self._last:
            self._behind[subscription] = None
            self._pump_soon()

    def _pump_soon(self) -> None:
        if self._pump is None:
            self._pump = self._loop.call_soon(self._visit_some)

    def _catch_up(self, subscription: Subscription) -> bool:
        """Tell a subscriber what it has not seen, as far as it reads; say if anything was put."""
        told = False
        budget = VISIT_BYTES - subscription.listener.unsent_bytes
        if budget > 0 and subscription.seen + 1 < self._first:
            told = self._tell_lost(subscription)
        while subscription.seen < self._last and budget > 0:
            subscription.seen += 1
            event = self._log[subscription.seen]
            subscription.totals = event.totals
            if event.index in subscription.wanted:
                budget -= event.body.size
                self._tell(subscription, event.body)
                told = True
        return told

    def close(self) -> None:
        """Tell nobody anything any more."""
        if self._pump is not None:
            self._pump.cancel()
            self._pump = None
        self._round.clear()

    def _visit_some(self) -> None:
        self._pump = None
        told = looked_at = 0
        for _ in range(min(len(self._behind), TOLD_PER_TURN // 2)):
            subscription, _nothing = self._behind.popitem(last=False)
            told += self._visit(subscription)
        while self._due and told < TOLD_PER_TURN and looked_at < LOOKED_AT_PER_TURN:
            if not self._round:
                self._due = 0
                break
            self._due -= 1
            looked_at += 1
            subscription = next(iter(self._round))
            self._round.move_to_end(subscription)
            if subscription.seen < self._last:
                told += self._visit(subscription)
        if self._due or self._behind:
            self._pump_soon()

    def _visit(self, subscription: Subscription) -> bool:
        if not self._catch_up(subscription):
            # It reads too slowly: it is woken when it has read.
            return False
        subscription.listener.send_now()
        if subscription.seen < self._last:
            self._behind[subscription] = None
        return True

    def _tell(self, subscription: Subscription, body: EventBody) -> None:
        subscription.seq += 1
        subscription.listener.put_event(body, subscription.number, subscription.seq)

    def _tell_lost(self, subscription: Subscription) -> bool:
        first = self._log[self._first]
        # The first that is still there counts itself in its totals, and is not lost.
        before = _added(first.totals, first.index, -1)
        lost = sum(before[index] - subscription.totals[index] for index in subscription.wanted)
        subscription.totals = before
        subscription.seen = self._first - 1
        if not lost:
            return False
        self.lost_total += lost
        self._tell(subscription, EventBody(EVENTS_LOST, {"count": lost}, self._unix_s()))
        return True


def wanted_by(topics: Iterable[str] | None) -> frozenset[int]:
    """Find the events that topics name: an area, `area.*`, one event, or `*` for all.

    Raises KeyError with the topic that names none.
    """
    if topics is None:
        return frozenset(INDEX_OF.values())
    wanted: set[int] = set()
    for topic in topics:
        area = topic.removesuffix(".*")
        if topic == "*":
            wanted.update(INDEX_OF.values())
        elif area in TOPICS:
            wanted.update(at for name, at in INDEX_OF.items() if name.startswith(f"{area}."))
        elif topic in INDEX_OF:
            wanted.add(INDEX_OF[topic])
        else:
            raise KeyError(topic)
    return frozenset(wanted)


def _added(totals: tuple[int, ...], index: int, more: int) -> tuple[int, ...]:
    return (*totals[:index], totals[index] + more, *totals[index + 1 :])
