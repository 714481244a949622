"""One connection's conversation with the daemon, without I/O.

Owns what has been asked and not answered, which leases this connection holds, what it is subscribed
to, and the bytes that still have to go out. A driver moves bytes: it sends `outgoing`, and feeds
what arrives to `feed`, with the time. Everything else is told through tickets (a request is done),
decisions (a lease changed) and `notices` (call this handler with that event).

Rules kept here: an answer to a request that its caller gave up is still understood, and a grant
among such answers is released at once. Unknown fields and events are ignored. What breaks the
contract ends the conversation: nothing after it could be trusted. A daemon that was restarted does
not end it, whether the connection was kept or lost: see `resume`. After its end a conversation may
begin anew on another connection, unless that was the caller's wish.

Not safe for several threads: the driver sees to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from libclient import resume
from libclient.absence import Absence
from libclient.codec import MALFORMED, decode, encoder
from libclient.decision import Decision, Event, EventHandler
from libclient.errors import CLOSED, GARBAGE, NO_DAEMON, SEALED, Unavailable
from libclient.hearing import hear, take_late, undo
from libclient.messages import Malformed, check_error, gist_of
from libclient.renewals import renew
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


class Session:
    """The state of one conversation. See the head of this file."""

    def __init__(self, *, lasting: bool = True) -> None:
        """`lasting` False is for a driver that does not connect anew: a lost connection ends it."""
        self.lasting = lasting
        self.outgoing = b""
        # Handlers to be called by the driver, outside of any lock, in this order.
        self.notices: list[tuple[EventHandler, Event]] = []
        self.pending: dict[int, Ticket] = {}
        self.leases: dict[str, Decision] = {}
        self.subscriptions: dict[int, Subscription] = {}
        # Subscriptions that ended with a process or a connection, and are being made again.
        self.lapsed: list[Subscription] = []
        # Why nothing more can be asked; the connection is of no use unless it is sealed.
        self.ended: Unavailable | None = None
        # Whether that is for good: closed by the caller, or sealed.
        self.final = False
        # While the connection is lost and this goes on: what the driver has to know of it.
        self.away: Absence | None = None
        # Answers to come that nobody waits for.
        self.late = 0
        # When the first lease has to be renewed, on the driver's clock.
        self.renew_at: float | None = None
        self._last_id = 0
        self._encode = encoder()
        self._splitter = FrameSplitter(MAX_REPLY_BYTES)
        self._midway = False
        self.own_seq: int | None = None
        # True while input is taken in, and for good if that was interrupted.
        self.torn = False
        # Set by the driver while it sends: what, and then how much of it went out.
        self.sending: bytes | None = None
        self.sent: list[int] = []
        # While a connection is lost or made: what an interrupt has to be followed by.
        self.unfinished: Callable[[], None] | None = None
        # Requests that were sent again to a new process, as long as one may be answered twice.
        self.repeats: dict[int, Ticket | None] = {}
        # Tokens of leases to be released once there is a connection again.
        self.owed: set[str] = set()
        # Of the connection that was made last: when, the first request on it, and how many in a row
        # were closed without an answer.
        self.joined_s: float | None = None
        self.first: Ticket | None = None
        self.refusals = 0

    @property
    def sealed(self) -> bool:
        """Whether the connection only holds from now on."""
        return self.ended is not None and self.ended.reason == SEALED

    @property
    def expects_input(self) -> bool:
        """Whether something can arrive that matters although nobody waits for an answer."""
        return bool(self.leases or self.subscriptions or self.late or self.outgoing)

    @property
    def has_to_go_on(self) -> bool:
        """Whether a lost connection is to be made anew without anybody asking for more."""
        return bool(self.leases or self.pending or self.lapsed)

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
        frame = HEADER.pack(len(payload)) + payload
        self.outgoing += frame
        ticket = self.pending[request_id] = Ticket()
        ticket.request_id = request_id
        ticket.frame = frame
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
                undo(self, ticket)
            return
        if ticket.request_id not in self.pending:
            return
        if self.away is not None:
            # The connection that it was asked on is gone, and with it what it could have brought.
            del self.pending[ticket.request_id]
            self.outgoing = b"".join([other.frame for other in self.pending.values()])
            return
        self.late += 1
        if ticket.op == "lease":
            # Answered `unknown_request` where it does not wait: then its answer is on its way.
            cancel = self.ask_quietly("cancel", {"request_id": ticket.request_id})
            cancel.cancels = ticket.request_id

    def mend(self) -> None:
        """Put right what an interrupt left half done, or end the conversation.

        Of what was being sent it is known how much went out, and nothing was sent yet on a
        connection that was being made. Input taken in half-way may have been a grant: only the end
        of the connection is sure to give everything back.
        """
        self.settle_sent()
        if self.unfinished is not None:
            self.unfinished()
        if self.torn:
            self.torn = False
            self.end("interrupted in the middle of a message", CLOSED)

    def settle_sent(self) -> None:
        """Take what went out off `outgoing`, where an interrupt struck before the driver did.

        More may have been asked since.
        """
        sending, self.sending = self.sending, None
        if sending is not None and self.sent and self.outgoing.startswith(sending):
            self.outgoing = self.outgoing[self.sent[0] :]

    def drop(self, lease: Decision) -> bool:
        """Forget a lease that is about to be released. Return whether there is one to release."""
        if self.ended is not None or lease.ended is not None or lease.lease_id is None:
            return False
        lease.ended = "released"
        self.leases.pop(lease.lease_id, None)
        if lease.renew_at is not None:
            self.plan_renewals()
        if self.away is not None and lease.token is not None:
            # Never to be reattached; and told to the daemon, should it be back before its grace
            # for the lease is over.
            self.owed.add(lease.token)
            return False
        return True

    def by_token(self, token: str) -> Decision | None:
        """Return the lease that has this token, if it is one of this connection."""
        return next((one for one in self.leases.values() if one.token == token), None)

    def renew_due(self, now_s: float) -> None:
        """Ask to renew every lease whose time has come."""
        renew(self, now_s)

    def ask_quietly(
        self,
        op: str,
        fields: Mapping[str, object],
        target: Decision | Subscription | None = None,
    ) -> Ticket:
        """Ask on nobody's behalf: the answer is dealt with here."""
        if self.ended is not None or self.away is not None:
            return Ticket()
        ticket = self.ask(op, fields, target)
        ticket.abandoned = True
        self.late += 1
        return ticket

    def release_quietly(self, token: str) -> None:
        """Release a lease that nobody holds, now or on the next connection."""
        if self.away is not None:
            self.owed.add(token)
        else:
            self.ask_quietly("release", {"token": token})

    def encode(self, message: Mapping[str, object]) -> bytes:
        """Return a message as its payload. Raises ValueError, TypeError or OverflowError."""
        return self._encode(message)

    def plan_renewals(self) -> None:
        """Find out when the first lease has to be renewed."""
        due = [lease.renew_at for lease in self.leases.values() if lease.renew_at is not None]
        self.renew_at = min(due) if due else None

    # -- what comes in

    def feed(self, data: bytes | None, now_s: float) -> bool:
        """Take bytes as they came; no bytes are the end of input, and None is nothing at all.

        `now_s` is a monotonic clock's.

        Returns whether the driver has anything to do besides: send, call, renew, close. Never
        raises for what the peer sent: it ends the session instead.
        """
        if not data:
            if data is not None:
                self._on_end_of_input(now_s)
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

    def _on_end_of_input(self, now_s: float) -> None:
        if self.away is not None:
            return
        detail = "the daemon closed the connection"
        if self.ended is not None or not self.lasting:
            self.end(detail)
            return
        resume.part(self, detail, now_s)

    def end(self, detail: str, reason: str = NO_DAEMON) -> None:
        """Nothing more comes. Every request fails, every lease of this connection is over."""
        if self.ended is not None and not self.sealed:
            return
        self.ended = fault = Unavailable(detail, reason)
        self.away = None
        self.owed.clear()
        self.forget_connection()
        for ticket in list(self.pending.values()):
            self.fail(ticket, fault)
        for subscription in [*self.subscriptions.values(), *self.lapsed]:
            subscription.end(fault)
        self.subscriptions.clear()
        self.lapsed.clear()
        for lease in list(self.leases.values()):
            lost = {"event": resume.CONNECTION_LOST, "lease_id": lease.lease_id, "reason": reason}
            self.lose(lease, f"connection lost: {detail}")
            self.notify(lease, lost)

    def close(self) -> None:
        """End it by the caller's wish: nobody has to be told of leases lost."""
        self.final = True
        for lease in list(self.leases.values()):
            self.lose(lease, "closed")
        self.end("this client was closed", CLOSED)

    def begin_anew(self, now_s: float) -> None:
        """Let a conversation that has ended, not for good, go on with the next connection."""
        if self.ended is not None and not self.final:
            self.away = Absence(self.ended, now_s, 0)
            self.ended = None

    def forget_connection(self) -> None:
        """Drop what was about the connection alone: bytes on their way in and out, numbering."""
        self.outgoing = b""
        self.sending = None
        self.late = 0
        self.renew_at = None
        self.own_seq = None
        self.repeats.clear()
        self._splitter = FrameSplitter(MAX_REPLY_BYTES)
        self._midway = False

    def fail(self, ticket: Ticket, fault: Unavailable) -> None:
        """Let a request end without an answer."""
        ticket.failure = fault
        ticket.ok = False
        ticket.finish()
        self.pending.pop(ticket.request_id, None)

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
            hear(self, message)
            return
        if ok is not True:
            check_error(message)
        request_id = message.get("id")
        ticket = self.pending.get(request_id) if type(request_id) is int else None
        if ticket is None:
            if type(request_id) is int and request_id in self.repeats:
                resume.on_repeated(self, self.repeats.pop(request_id), message)
                return
            raise Malformed(f"an answer to nothing that was asked: {gist_of(message)}")
        # What follows in the same read may already be about what this brought, so it is kept now.
        # A reply that breaks the contract leaves its request pending: it fails with all others.
        ticket.reply = message
        ticket.ok = ok is True
        target = ticket.target
        if ticket.abandoned:
            take_late(self, ticket, now_s)
        elif target is not None and ok is True:
            if isinstance(target, Subscription):
                self.subscriptions[target.settle(message)] = target
            elif (lease_id := target.settle(message, now_s)) is not None:
                self.leases[lease_id] = target
                if target.renew_at is not None:
                    self.plan_renewals()
        elif ok is True and ticket.op == "seal":
            self._on_sealed()
        self.pending.pop(ticket.request_id, None)
        ticket.done = True
        if ticket.wake is not None:
            ticket.wake()

    # -- what becomes of leases

    def _on_sealed(self) -> None:
        self.final = True
        self.ended = Unavailable("the connection is sealed: it only holds its leases", SEALED)
        for lease in self.leases.values():
            lease.expires_at = lease.renew_at = None
        self.renew_at = None

    def lose(self, lease: Decision, why: str) -> None:
        """A lease is over, and not by its holder's wish."""
        lease.ended = lease.ended or why
        self.leases.pop(lease.lease_id or "", None)
        self.plan_renewals()

    def notify(self, lease: Decision, event: Event) -> None:
        """Have a lease's handler called with an event."""
        if lease.on_event is not None:
            self.notices.append((lease.on_event, event))
