"""One connection's conversation with the daemon, without I/O.

Owns what has been asked and not answered, which leases this connection holds, what it is subscribed
to, and the bytes that still have to go out. A driver moves bytes: it sends `outgoing`, and feeds
what arrives to `feed`, with the time. Everything else is told through tickets (a request is done),
decisions (a lease changed) and `notices` (call this handler with that event).

Rules kept here: an answer to a request that its caller gave up is still understood, and a grant
among such answers is released at once. Unknown fields and events are ignored. What breaks the
contract ends the conversation: nothing after it could be trusted. A daemon that comes back on the
same connection (`daemon.resumed`) ends it too; to send the marker and `pending` again in its place
belongs in `_on_resumed`.

Not safe for several threads: the driver sees to that.
"""

from __future__ import annotations

from collections.abc import Mapping

from libclient.codec import MALFORMED, decode, encoder
from libclient.decision import Decision, Event, EventHandler
from libclient.errors import CLOSED, GARBAGE, NO_DAEMON, SEALED, Unavailable
from libclient.messages import (
    Malformed,
    check_error,
    deadline_of,
    gist_of,
    missed_before,
    number_of,
    text_of,
)
from libclient.tickets import Subscription, Ticket
from libclient.wire.framing import (
    HEADER,
    HEADER_BYTES,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    EmptyFrame,
    FrameSplitter,
    FrameTooLarge,
)
from libclient.wire.vocabulary import EVENTS_LOST, UNKNOWN_REQUEST, UNKNOWN_TOKEN

# What a session says by itself, beside the events of the wire: the connection is gone.
CONNECTION_LOST = "connection.lost"


class Session:
    """The state of one conversation. See the head of this file."""

    def __init__(self) -> None:
        self.outgoing = b""
        # Handlers to be called by the driver, outside of any lock, in this order.
        self.notices: list[tuple[EventHandler, Event]] = []
        self.pending: dict[int, Ticket] = {}
        self.leases: dict[str, Decision] = {}
        self.subscriptions: dict[int, Subscription] = {}
        # Why nothing more can be asked; the connection is of no use unless it is sealed.
        self.ended: Unavailable | None = None
        # Answers to come that nobody waits for.
        self.late = 0
        # When the first lease has to be renewed, on the driver's clock.
        self.renew_at: float | None = None
        self._last_id = 0
        self._encode = encoder()
        self._splitter = FrameSplitter(MAX_REPLY_BYTES)
        self._midway = False
        self._own_seq: int | None = None
        # True while input is taken in or output sent, and for good if that was interrupted.
        self.torn = False

    @property
    def sealed(self) -> bool:
        """Whether the connection only holds from now on."""
        return self.ended is not None and self.ended.reason == SEALED

    @property
    def expects_input(self) -> bool:
        """Whether something can arrive that matters although nobody waits for an answer."""
        return bool(self.leases or self.subscriptions or self.late or self.outgoing)

    # -- what goes out

    def ask(
        self,
        op: str,
        fields: Mapping[str, object],
        target: Decision | Subscription | None = None,
    ) -> Ticket:
        """Put a request into `outgoing`. Raises Unavailable, ValueError or TypeError instead."""
        if self.ended is not None:
            raise Unavailable(self.ended.detail, self.ended.reason)
        request_id = self._last_id + 1
        payload = self._encode({"id": request_id, "op": op, **fields})
        if len(payload) > MAX_REQUEST_BYTES:
            raise ValueError(f"a request of {len(payload)} bytes, at most {MAX_REQUEST_BYTES}")
        self._last_id = request_id
        self.outgoing += HEADER.pack(len(payload)) + payload
        ticket = self.pending[request_id] = Ticket()
        ticket.request_id = request_id
        ticket.op = op
        ticket.target = target
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """The caller gave up: nothing that the ticket brings may stay behind.

        A waiting request is cancelled, a grant (already here, or still to come) released, a
        subscription ended. The requests for that are in `outgoing`.
        """
        if ticket.abandoned:
            return
        ticket.abandoned = True
        self.mend()
        if self.ended is not None:
            return
        if ticket.done:
            if ticket.failure is None:
                self._undo(ticket)
            return
        if ticket.request_id not in self.pending:
            return
        self.late += 1
        if ticket.op == "lease":
            # Answered `unknown_request` where it does not wait: then its answer is on its way.
            cancel = self._ask_quietly("cancel", {"request_id": ticket.request_id})
            cancel.cancels = ticket.request_id

    def mend(self) -> None:
        """End the conversation if input or output was interrupted half-way.

        What was interrupted may have been a grant, or a request cut in two: only the end of the
        connection is sure to give everything back.
        """
        if self.torn:
            self.torn = False
            self.end("interrupted in the middle of a message", CLOSED)

    def drop(self, lease: Decision) -> bool:
        """Forget a lease that is about to be released. Return whether there is one to release."""
        if self.ended is not None or lease.ended is not None or lease.lease_id is None:
            return False
        lease.ended = "released"
        self.leases.pop(lease.lease_id, None)
        if lease.renew_at is not None:
            self._plan_renewals()
        return True

    def by_token(self, token: str) -> Decision | None:
        """Return the lease that has this token, if it is one of this connection."""
        return next((one for one in self.leases.values() if one.token == token), None)

    def renew_due(self, now_s: float) -> None:
        """Ask to renew every lease whose time has come."""
        if self.ended is not None:
            return
        for lease in self.leases.values():
            if lease.renew_at is not None and lease.renew_at <= now_s and not lease.renewing:
                lease.renewing = True
                self._ask_quietly("renew", {"token": lease.token}, lease)
        self._plan_renewals()

    def _ask_quietly(
        self, op: str, fields: Mapping[str, object], target: Decision | None = None
    ) -> Ticket:
        """Ask on nobody's behalf: the answer is dealt with here."""
        if self.ended is not None:
            return Ticket()
        ticket = self.ask(op, fields, target)
        ticket.abandoned = True
        self.late += 1
        return ticket

    def _undo(self, ticket: Ticket) -> None:
        """Give back what an answer brought to a caller who is gone."""
        reply, target = ticket.reply, ticket.target
        if not ticket.ok:
            return
        if ticket.op == "lease" and reply.get("granted") is True:
            if isinstance(target, Decision):
                self.drop(target)
            if type(reply.get("token")) is str:
                self._ask_quietly("release", {"token": reply["token"]})
        elif ticket.op == "subscribe" and type(reply.get("subscription")) is int:
            self.subscriptions.pop(reply["subscription"], None)
            self._ask_quietly("unsubscribe", {"subscription": reply["subscription"]})

    def _plan_renewals(self) -> None:
        due = [
            lease.renew_at
            for lease in self.leases.values()
            if lease.renew_at is not None and not lease.renewing
        ]
        self.renew_at = min(due) if due else None

    # -- what comes in

    def feed(self, data: bytes, now_s: float) -> bool:
        """Take bytes as they came; no bytes are the end of input. `now_s` is a monotonic clock's.

        Returns whether the driver has anything to do besides: send, call, renew, close. Never
        raises for what the peer sent: it ends the session instead.
        """
        if not data:
            self.end("the daemon closed the connection")
            return True
        if self.ended is not None:
            # Sealed: read and thrown away. Over: nobody asked.
            return True
        self.torn = True
        try:
            size = len(data) - HEADER_BYTES
            if not self._midway and size > 0 and HEADER.unpack_from(data)[0] == size:
                # Nearly always a read is one whole frame.
                self._on_payload(data[HEADER_BYTES:], now_s)
            else:
                splitter = self._splitter
                splitter.feed(data)
                while (payload := splitter.next_frame()) is not None:
                    self._on_payload(payload, now_s)
                self._midway = splitter.pending_bytes > 0
        except (Malformed, FrameTooLarge) as fault:
            self.end(f"garbage from the daemon: {fault}", GARBAGE)
        except EmptyFrame:
            self.end("garbage from the daemon: a frame of no bytes", GARBAGE)
        self.torn = False
        return bool(self.outgoing or self.notices or self.renew_at) or self.ended is not None

    def end(self, detail: str, reason: str = NO_DAEMON) -> None:
        """Nothing more comes. Every request fails, every lease of this connection is over."""
        if self.ended is not None and not self.sealed:
            return
        self.ended = Unavailable(detail, reason)
        self.outgoing = b""
        self.late = 0
        self.renew_at = None
        waiting = [*self.pending.values()]
        waiting += [s.waiting for s in self.subscriptions.values() if s.waiting is not None]
        self.pending.clear()
        self.subscriptions.clear()
        for ticket in waiting:
            ticket.failure = self.ended
            ticket.ok = False
            ticket.finish()
        for lease in list(self.leases.values()):
            lost = {"event": CONNECTION_LOST, "lease_id": lease.lease_id, "reason": reason}
            self._lose(lease, f"connection lost: {detail}")
            self._notify(lease, lost)

    def close(self) -> None:
        """End it by the caller's wish: nobody has to be told of leases lost."""
        for lease in list(self.leases.values()):
            self._lose(lease, "closed")
        self.end("this client was closed", CLOSED)

    def _on_payload(self, payload: bytes, now_s: float) -> None:
        if self.ended is not None:
            return
        try:
            message = decode(payload)
        except MALFORMED as fault:
            raise Malformed(f"a frame that is not msgpack ({type(fault).__name__})") from None
        if type(message) is not dict:
            raise Malformed(f"a frame holds a {type(message).__name__}, not a map")
        ok = message.get("ok")
        if ok is None:
            self._on_event(message)
            return
        if ok is not True:
            check_error(message)
        request_id = message.get("id")
        ticket = self.pending.get(request_id) if type(request_id) is int else None
        if ticket is None:
            raise Malformed(f"an answer to nothing that was asked: {gist_of(message)}")
        # What follows in the same read may already be about what this brought, so it is kept now.
        # A reply that breaks the contract leaves its request pending: it fails with all others.
        ticket.reply = message
        ticket.ok = ok is True
        target = ticket.target
        if ticket.abandoned:
            self._on_late_reply(ticket, now_s)
        elif target is not None and ok is True:
            if isinstance(target, Subscription):
                self.subscriptions[target.settle(message)] = target
            elif (lease_id := target.settle(message, now_s)) is not None:
                self.leases[lease_id] = target
                if target.renew_at is not None:
                    self._plan_renewals()
        elif ok is True and ticket.op == "seal":
            self._on_sealed()
        self.pending.pop(ticket.request_id, None)
        ticket.done = True
        if ticket.wake is not None:
            ticket.wake()

    def _on_late_reply(self, ticket: Ticket, now_s: float) -> None:
        self.late -= 1
        code = None if ticket.ok else ticket.reply["error"]["code"]
        if isinstance(ticket.target, Decision) and ticket.op == "renew":
            if ticket.ok:
                ticket.target.renewed(ticket.reply.get("expires_at"), now_s)
            elif code == UNKNOWN_TOKEN:
                self._lose(ticket.target, "expired")
            else:
                ticket.target.not_renewed(now_s)
            self._plan_renewals()
        elif code == UNKNOWN_REQUEST and ticket.cancels in self.pending:
            # It does not wait, so it was answered before this: an interrupt has swallowed that
            # answer, which may have been a grant.
            self.end("interrupted while an answer was read", CLOSED)
        else:
            self._undo(ticket)

    # -- events

    def _on_event(self, event: Event) -> None:
        name, number = event.get("event"), event.get("subscription")
        if type(name) is not str:
            raise Malformed("a message that is neither a reply nor an event")
        if number is not None:
            # One that was just ended may still have events under way.
            if type(number) is int and number in self.subscriptions:
                subscription = self.subscriptions[number]
                missed = missed_before(subscription.seq, event)
                subscription.seq = event["seq"]
                if missed and name != EVENTS_LOST:
                    subscription.put({"event": EVENTS_LOST, "count": missed})
                subscription.put(event)
            return
        if name == "daemon.resumed":
            self._on_resumed()
            return
        missed = missed_before(self._own_seq, event)
        self._own_seq = event["seq"]
        if missed and name != EVENTS_LOST:
            for lease in self.leases.values():
                self._notify(lease, {"event": EVENTS_LOST, "count": missed})
        self._on_own_event(name, event)

    def _on_own_event(self, name: str, event: Event) -> None:
        lease = self.leases.get(text_of(event.get("lease_id")))
        if name == "lease.queued":
            ticket = self.pending.get(number_of(event.get("request_id")))
            if ticket is not None and isinstance(ticket.target, Decision):
                self._notify(ticket.target, event)
        elif lease is not None:
            if name == "lease.revoking":
                lease.revoking = True
                lease.deadline = deadline_of(event)
            elif name == "lease.revoked":
                self._lose(lease, f"revoked: {event.get('reason')}")
            elif name == "lease.expired":
                self._lose(lease, "expired")
            self._notify(lease, event)
        elif "lease_id" not in event:
            # About the daemon or a GPU: those whom it names, or all.
            named = event.get("lease_ids")
            for lease_id, held in self.leases.items():
                if type(named) is not list or lease_id in named:
                    self._notify(held, event)

    def _on_sealed(self) -> None:
        self.ended = Unavailable("the connection is sealed: it only holds its leases", SEALED)
        for lease in self.leases.values():
            lease.expires_at = lease.renew_at = None
        self.renew_at = None

    def _on_resumed(self) -> None:
        self.end("the daemon was restarted, and its leases with it")

    def _lose(self, lease: Decision, why: str) -> None:
        lease.ended = lease.ended or why
        self.leases.pop(lease.lease_id or "", None)
        self._plan_renewals()

    def _notify(self, lease: Decision, event: Event) -> None:
        if lease.on_event is not None:
            self.notices.append((lease.on_event, event))
