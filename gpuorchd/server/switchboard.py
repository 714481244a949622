"""The switchboard: carries the core's answers and events to the connections they are for.

Owns the connections by number, what they share (the read buffer, the count of unsent bytes, the
watch, the subscriptions), the counters of requests, and the flush: whatever a turn of the engine
put into outboxes leaves at the turn's end, one write for each connection. While a connection's
requests are being taken, the flush waits until that is done, so that pipelined requests share a
write too.

This is also the one place that says what a bug does: the request is answered `internal` and the
daemon stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set
from time import time_ns
from typing import TYPE_CHECKING, Final

from gpuorchd.core.effects import (
    Announce,
    Answer,
    AnswerDenial,
    AnswerError,
    AnswerGrant,
    AnswerPolicy,
    SignalPeer,
)
from gpuorchd.core.events import Event, PolicyChangeAsked
from gpuorchd.core.model import NS_PER_S, ConnectionId, RequestId
from gpuorchd.engine import Engine
from gpuorchd.server import replies
from gpuorchd.server.bounds import LimitCounts
from gpuorchd.server.faults import Fault
from gpuorchd.server.outbox import Unsent
from gpuorchd.server.services import Options, Services
from gpuorchd.server.speaker import Speaker
from gpuorchd.server.subscriptions import Subscriptions
from gpuorchd.server.tokens import TokenPool
from gpuorchd.server.turns import Turns
from gpuorchd.server.watch import Watch
from gpuorchd.views import Moment, policy_get
from libclient.wire import vocabulary as words

if TYPE_CHECKING:
    from gpuorchd.server.connection import Connection
    from gpuorchd.server.taking import Taking

# Room for the largest request, so that any one of them can arrive in one read.
READ_BYTES: Final = 65_540
GRANTED: Final = ("lease", "granted")
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Switchboard:
    """What all connections share. Not thread-safe: call it on the loop only."""

    def __init__(
        self,
        engine: Engine,
        services: Services,
        options: Options,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.engine = engine
        self.state = engine.state
        self.services = services
        self.options = options
        self.loop = loop
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.unsent = Unsent()
        self.watch = Watch(loop)
        self.turns = Turns(loop)
        self.tokens = TokenPool()
        self.subscriptions = Subscriptions(loop, self.unix_s)
        self.connections: dict[ConnectionId, Connection] = {}
        # Requests by op and outcome: `ok`, `granted`, the note of a denial, or the error's code.
        self.request_counts: dict[tuple[str, str], int] = {}
        self.limits = LimitCounts()
        # Connections with something to send at the end of this turn.
        self.dirty: list[Speaker] = []
        # The connection whose requests are being taken right now.
        self.busy: Taking | None = None
        # Connections that are to close, in the order in which they are cut off, and when.
        self._lingering: dict[ConnectionId, float] = {}
        self._linger_timer: asyncio.TimerHandle | None = None
        self._rendering: asyncio.Task[None] | None = None
        # Set once everything is being closed: done when the last connection is gone.
        self._empty: asyncio.Future[None] | None = None
        self._awaiting_metrics: list[tuple[Connection, RequestId]] = []
        # User names that are being looked up, each for a change that waits for it.
        self._look_ups: set[asyncio.Task[None]] = set()
        # Set while a stop waits for answers that take time: done when one was given.
        self._answered: asyncio.Future[None] | None = None
        engine.on(AnswerGrant, self._grant)
        engine.on(AnswerDenial, self._deny)
        engine.on(Answer, self._answer)
        engine.on(AnswerPolicy, self._answer_policy)
        engine.on(AnswerError, self._answer_error)
        engine.on(Announce, self._announce)
        engine.on(SignalPeer, self._signal_peer)
        engine.at_turn_end(self._turn_ended)

    def moment(self) -> Moment:
        """The present, on both clocks."""
        return Moment(self.engine.now_ns(), time_ns())

    def unix_s(self) -> float:
        """The present in unix seconds."""
        return time_ns() / NS_PER_S

    def count(self, op: str, outcome: str) -> None:
        """Count one answered request."""
        counts = self.request_counts
        key = (op, outcome)
        counts[key] = counts.get(key, 0) + 1

    def flush(self) -> None:
        """Send what connections have put since the last flush."""
        dirty = self.dirty
        while dirty:
            # What a flush brings about may add to the end: nobody is left out, none twice.
            connection = dirty.pop()
            connection.in_dirty = False
            connection.flush()

    def submit(self, event: Event) -> None:
        """Hand the engine an event that no request brought about."""
        try:
            self.engine.submit(event)
        except Exception as error:  # a bug, wherever it is: see `bug`
            self.services.on_bug(error, type(event).__name__, None)

    def bug(self, connection: Connection, request_id: RequestId, error: Exception) -> None:
        """Answer a request that met a bug, then let the daemon stop."""
        op = connection.op
        message = "a bug in the daemon, logged with this request's id; the daemon stops"
        connection.refuse(Fault(words.INTERNAL, message, None, request_id, op))
        connection.outbox.flush()
        connection.answered(request_id)
        self.services.on_bug(error, op, request_id)

    def connected(self, connection: Connection) -> None:
        """Take in a connection that can be written to."""
        self.connections[connection.number] = connection
        if connection.refusal is not None:
            self.linger(connection)

    def disconnected(self, connection: Connection) -> None:
        """Forget a connection that the loop has closed."""
        self.connections.pop(connection.number, None)
        self._lingering.pop(connection.number, None)
        self.tell_answered()
        if self._empty is not None and not self.connections and not self._empty.done():
            self._empty.set_result(None)

    def linger(self, connection: Connection) -> None:
        """Close a connection after a while, if it is still there then; counted once."""
        self._lingering.setdefault(connection.number, self.loop.time() + self.options.linger_s)
        if self._linger_timer is None:
            self._linger_timer = self.loop.call_later(self.options.linger_s, self._end_lingering)

    def render_metrics(self, connection: Connection, request_id: RequestId) -> None:
        """Answer with the metrics once they are rendered; one rendering serves all who ask."""
        connection.defer(request_id)
        self._awaiting_metrics.append((connection, request_id))
        if self._rendering is None:
            self._rendering = self.loop.create_task(self._render())

    def look_up(self, names: Set[str], change: PolicyChangeAsked) -> None:
        """Hand the engine a change once the users in it are known."""
        task = self.loop.create_task(self._look_up(names, change))
        self._look_ups.add(task)
        task.add_done_callback(self._look_ups.discard)

    async def answers_given(self, until: float) -> None:
        """Wait until every answer that takes time was given, to a moment of the loop at most."""
        while any(x.deferred and not x.ended for x in self.connections.values()):
            left_s = until - self.loop.time()
            if left_s <= 0:
                break
            self._answered = self.loop.create_future()
            await asyncio.wait([self._answered], timeout=left_s)
        self._answered = None

    def tell_answered(self) -> None:
        """Note that an answer that takes time was given, or that nobody is there to get it."""
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    async def close(self) -> None:
        """Close every connection and give back what is shared."""
        for task in self._look_ups:
            task.cancel()
        await asyncio.gather(*self._look_ups, return_exceptions=True)
        if self._rendering is not None:
            self._rendering.cancel()
            await asyncio.gather(self._rendering, return_exceptions=True)
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        self._lingering.clear()
        for connection in tuple(self.connections.values()):
            connection.close()
        if self.connections:
            # The loop reports each end in one of its next turns.
            self._empty = self.loop.create_future()
            await self._empty
        self.subscriptions.close()
        self.turns.close()
        self.watch.close()

    def _turn_ended(self) -> None:
        if self.busy is None and self.dirty:
            self.flush()

    def _grant(self, effect: AnswerGrant) -> None:
        lease = effect.lease
        connection = self.connections.get(lease.conn)
        if connection is not None:
            connection.send(connection.encode(replies.grant(lease)))
        counts = self.request_counts
        counts[GRANTED] = counts.get(GRANTED, 0) + 1

    def _deny(self, effect: AnswerDenial) -> None:
        note = effect.denial.note.value
        connection = self.connections.get(effect.conn)
        if connection is not None:
            denial = effect.denial
            message = replies.denial(
                effect.request_id, effect.agent, note, denial.reasons, denial.eta_ns
            )
            connection.send(connection.encode(message))
        self.count("lease", note)

    def _answer(self, effect: Answer) -> None:
        connection = self.connections.get(effect.conn)
        if connection is None:
            return
        op = connection.op
        message = replies.answer(effect.request_id, effect.fields, self.moment)
        connection.send(connection.encode(message))
        self.count(op, "ok")
        if op == "seal":
            connection.seal()
        connection.answered(effect.request_id)

    def _answer_policy(self, effect: AnswerPolicy) -> None:
        connection = self.connections.get(effect.conn)
        if connection is None:
            return
        fields = policy_get(self.state)
        if effect.note is not None:
            fields["note"] = effect.note
        connection.reply(effect.request_id, fields)
        connection.answered(effect.request_id)

    def _answer_error(self, effect: AnswerError) -> None:
        connection = self.connections.get(effect.conn)
        if connection is None:
            return
        code, message, field = effect.refusal
        connection.refuse(Fault(str(code), message, field, effect.request_id, connection.op))
        connection.answered(effect.request_id)

    def _announce(self, effect: Announce) -> None:
        if effect.owner is not None:
            connection = self.connections.get(effect.owner)
            if connection is not None:
                fields = effect.fields
                if effect.owner_fields is not None:
                    fields = {**fields, **effect.owner_fields}
                connection.tell(effect.name, fields)
        if self.subscriptions.any and not effect.private:
            self.subscriptions.publish(effect.name, effect.fields)

    def _signal_peer(self, effect: SignalPeer) -> None:
        connection = self.connections.get(effect.conn)
        if connection is not None and connection.peer is not None:
            peer = connection.peer
            self.services.signal_peer(peer.process, peer.uid, effect.signal)

    def _end_lingering(self) -> None:
        self._linger_timer = None
        now = self.loop.time()
        for number, due in tuple(self._lingering.items()):
            if due > now:
                self._linger_timer = self.loop.call_later(due - now, self._end_lingering)
                break
            del self._lingering[number]
            connection = self.connections.get(number)
            if connection is not None:
                connection.close()

    async def _look_up(self, names: Set[str], change: PolicyChangeAsked) -> None:
        uids = await self.services.resolve_users(names)
        self.submit(change._replace(uids=uids))

    async def _render(self) -> None:
        try:
            text = await self.services.render_metrics()
        except Exception as error:  # a bug: no client can bring it about
            for connection, request_id in self._taken_metrics():
                self.bug(connection, request_id, error)
            return
        for connection, request_id in self._taken_metrics():
            connection.reply(request_id, {"content_type": METRICS_TYPE, "text": text})
            connection.answered(request_id)
        self.flush()

    def _taken_metrics(self) -> list[tuple[Connection, RequestId]]:
        self._rendering = None
        asked, self._awaiting_metrics = self._awaiting_metrics, []
        return asked
