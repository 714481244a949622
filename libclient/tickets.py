"""What a caller waits for: the answer to one request, or the next event of a subscription.

Filled in by the session; waited for, and taken from, by a driver on behalf of an operation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from libclient.decision import Decision, Event
from libclient.errors import CLOSED, RequestError, Unavailable
from libclient.messages import Malformed
from libclient.wire.vocabulary import EVENTS_LOST

# All of one operation: connecting, sending, waiting for the answer. A wait that was asked for comes
# on top of it.
ANSWER_S = 2.0
# Events of one subscription that nobody has taken yet: about a megabyte. More are counted and
# dropped, and the taker is told how many.
BACKLOG_EVENTS = 4_096


class Ticket:
    """One request under way, or one wait for an event.

    A driver waits until `done`; it may set `wake`, which is called once at that moment and must
    neither block nor come back into the session.
    """

    # One is made for every request: what is seldom set costs nothing as a default of the class.
    request_id = 0
    op = ""
    target: Decision | Subscription | None = None
    done = False
    # Whether the answer is a good one.
    ok = False
    abandoned = False
    # As it was sent, to be sent again, and whether it has been, to whichever process.
    frame = b""
    sent = False
    # When its caller gives up, on the driver's clock, where the driver says so.
    deadline_s: float | None = None
    # Of a `cancel`: the request that it is about.
    cancels = 0
    failure: Unavailable | None = None
    wake: Callable[[], object] | None = None
    reply: dict[str, Any]

    def result(self) -> dict[str, Any]:
        """Return the reply's map. Raises what went wrong instead, as the caller should see it."""
        if self.failure is not None:
            raise Unavailable(self.failure.detail, self.failure.reason)
        reply = self.reply
        if not self.ok:
            error = reply["error"]
            raise RequestError(
                error["code"],
                error["message"],
                error.get("field"),
                error.get("retryable") is True,
            )
        return reply

    def finish(self) -> None:
        """Mark it done and wake whoever waits."""
        self.done = True
        if self.wake is not None:
            self.wake()


class Subscription:
    """The events of one subscription that have arrived and were not taken yet."""

    __slots__ = ("dropped", "events", "number", "over", "seq", "topics", "waiting")

    def __init__(self, topics: list[str] | None) -> None:
        """`topics` as they were asked for, None for all."""
        self.topics = topics
        # Why no event comes any more. It begins with the daemon's answer and ends once.
        self.over: Unavailable | None = Unavailable("not subscribed yet", CLOSED)
        self.number: int | None = None
        self.seq: int | None = None
        self.events: deque[Event] = deque()
        self.dropped = 0
        self.waiting: Ticket | None = None

    def settle(self, reply: dict[str, Any]) -> int:
        """Take the daemon's answer; return its number. Raises `Malformed` if there is none."""
        number = reply.get("subscription")
        if type(number) is not int:
            raise Malformed("a subscription without a number")
        self.number = number
        self.over = None
        return number

    def end(self, fault: Unavailable) -> None:
        """No event comes any more; whoever waits for one is told why."""
        self.over = fault
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            waiting.failure = fault
            waiting.finish()

    def take(self) -> Event | None:
        """Return the next event, None where there is none. What was dropped is told in its place.

        Also where nothing has come since: the taker has not seen what it thinks it has.
        """
        if self.events:
            return self.events.popleft()
        if not self.dropped:
            return None
        lost: Event = {"event": EVENTS_LOST, "count": self.dropped}
        self.dropped = 0
        return lost

    def put(self, event: Event) -> None:
        """Take an event in. When full, drop it and count it."""
        if len(self.events) >= BACKLOG_EVENTS:
            self.dropped += 1
            return
        if self.dropped:
            self.events.append({"event": EVENTS_LOST, "count": self.dropped})
            self.dropped = 0
        self.events.append(event)
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            waiting.finish()
