"""How a conversation goes on when the daemon was restarted, or the connection lost. No I/O.

Two ways. The daemon's new process has the connection still: it says so (`daemon.resumed`), gets a
marker, and every request without an answer again (`on_resumed`). Or the connection is gone: the
driver connects anew, each lease is reattached by its token, and what was asked is asked again where
that can do no harm (`part`, `rejoin`). Callers see neither: their tickets stay open meanwhile, and
their leases live.

What is never done: to send anything twice that may have been done once (`policy_set`, `revoke`),
to bring back a lease whose release was asked for, to come back after the caller's own close.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from libclient.absence import REFUSALS_MAX, REFUSED_S, Absence
from libclient.codec import decode
from libclient.decision import Decision, Event
from libclient.errors import CLOSED, NO_DAEMON, Unavailable
from libclient.messages import Malformed, missed_before, text_of
from libclient.tickets import ANSWER_S, Subscription, Ticket
from libclient.wire.framing import HEADER, HEADER_BYTES
from libclient.wire.vocabulary import INTERNAL, LIMIT, SHUTTING_DOWN

if TYPE_CHECKING:
    from libclient.session import Session

# What a session says by itself, beside the events of the wire: the lease is over with its
# connection; there is a new connection, and what happened in between went unheard.
CONNECTION_LOST = "connection.lost"
CONNECTION_RESUMED = "connection.resumed"
DAEMON_RESUMED = "daemon.resumed"

# No frame can begin like this: it would announce 4 GiB.
MARKER = b"\xff\xff\xff\xff"
NONCE_BYTES = 16
# How soon a lease is tried again that the daemon could not reattach for the moment.
REATTACH_AGAIN_S = 1.0

# Asking these again changes nothing, or nothing that the lost connection did not take with it.
ASKED_AGAIN = frozenset(
    {
        "hello",
        "health",
        "ready",
        "gpu_info",
        "policy_get",
        "lease",
        "renew",
        "cancel",
        "reattach",
        "allocations",
        "queue",
        "explain",
        "subscribe",
        "metrics",
        "whoami",
    }
)
# The end of the connection does these.
DONE_BY_LOSS = frozenset({"release", "unsubscribe"})
# The daemon's refusals of `reattach` after which the lease may still be there.
NOT_NOW = frozenset({LIMIT, SHUTTING_DOWN, INTERNAL})


# -- the same connection, another process


def on_resumed(session: Session, event: Event) -> None:
    """Take up the conversation with a daemon that was restarted and kept the connection."""
    nonce = event.get("nonce")
    if type(nonce) is not bytes or len(nonce) != NONCE_BYTES:
        raise Malformed(f"a {DAEMON_RESUMED} whose nonce is not {NONCE_BYTES} bytes")
    missed_before(None, event)
    session.own_seq = event["seq"]
    session.settle_sent()
    for ticket in sent_of(session):
        ticket.sent = True
    # What is asked again now may be answered twice: by what the daemon had kept, and then as asked.
    session.repeats = {
        ticket.request_id: ticket if ticket.op == "lease" else None
        for ticket in session.pending.values()
    }
    frames = [ticket.frame for ticket in session.pending.values()]
    session.outgoing = b"".join([MARKER, nonce, *frames])
    news = {name: value for name, value in event.items() if name not in ("nonce", "seq")}
    for lease in session.leases.values():
        # What the old process did not answer is no fault of the new one.
        lease.renewals = 0
        session.notify(lease, news)
    subscribed = list(session.subscriptions.values())
    session.subscriptions.clear()
    session.lapsed += subscribed
    resubscribe(session, subscribed, news)


def on_repeated(session: Session, ticket: Ticket | None, reply: dict[str, Any]) -> None:
    """Take a second answer to a request that was sent again; it brings nothing new.

    Should it grant another lease than the first, nobody knows of that one: it is released.
    """
    token = reply.get("token")
    if ticket is not None and type(token) is str and token != ticket.reply.get("token"):
        session.release_quietly(token)


def resubscribe(session: Session, lapsed: Iterable[Subscription], news: Event) -> None:
    """Subscribe again to what ended with the old process or connection; tell its takers."""
    for subscription in lapsed:
        subscription.put(news)
        subscription.number = subscription.seq = None
        topics = subscription.topics
        fields = {} if topics is None else {"topics": topics}
        session.ask_quietly("subscribe", fields, subscription)


def on_resubscribed(session: Session, ticket: Ticket, subscription: Subscription) -> bool:
    """Take the answer to a subscription that was made again.

    Returns whether it is wanted still: its taker may have ended it, or never had it.
    """
    if subscription in session.lapsed:
        session.lapsed.remove(subscription)
    if subscription.over is not None:
        return False
    if ticket.ok:
        session.subscriptions[subscription.settle(ticket.reply)] = subscription
    else:
        error = ticket.reply["error"]
        detail = f"the subscription could not be made again: {error['code']}: {error['message']}"
        subscription.end(Unavailable(detail, CLOSED))
    return True


def sent_of(session: Session) -> list[Ticket]:
    """Return what was asked and has been sent whole on this connection."""
    left = len(session.outgoing)
    asked = list(session.pending.values())
    while asked and left > 0:
        # One that is cut in two counts as not sent: nobody can have understood it.
        left -= len(asked.pop().frame)
    return asked


# -- another connection


def part(session: Session, detail: str, now_s: float) -> None:
    """The connection is lost: settle what that settles, and keep the rest for the next one.

    Where nothing is left that has to go on, the conversation is over. It may be begun again where
    it was interrupted.
    """
    session.unfinished = partial(part, session, detail, now_s)
    session.ended = None
    session.settle_sent()
    for ticket in sent_of(session):
        ticket.sent = True
    if session.away is None:
        session.refusals = _refusals(session, now_s)
    refusals = session.refusals
    fault = Unavailable(detail, NO_DAEMON)
    session.away = Absence(fault, now_s, refusals)
    session.forget_connection()
    for ticket in list(session.pending.values()):
        if ticket.abandoned or ticket.op in DONE_BY_LOSS:
            _settle(session, ticket)
        elif refusals >= REFUSALS_MAX or not _may_ask_again(ticket):
            session.fail(ticket, fault)
    for lease in session.leases.values():
        lease.detached = True
        lease.renewals = 0
        lease.renew_at = None
    if session.pending or session.leases:
        subscribed = session.subscriptions.values()
        session.lapsed += [one for one in subscribed if one not in session.lapsed]
        session.subscriptions.clear()
    else:
        session.end(detail)
    session.unfinished = None


def rejoin(session: Session, now_s: float) -> None:
    """There is a new connection: reattach the leases, then ask again what has no answer yet."""
    assert session.away is not None
    asked = list(session.pending.values())
    owed = session.owed
    session.lapsed = lapsed = [one for one in session.lapsed if one.over is None]
    session.unfinished = partial(_leave_again, session, session.away, asked, owed)
    session.owed = set()
    session.away = None
    session.joined_s = now_s
    session.pending.clear()
    session.outgoing = b""
    for lease in session.leases.values():
        session.ask_quietly("reattach", {"token": lease.token}, lease)
    for token in owed:
        session.release_quietly(token)
    for ticket in asked:
        if ticket.op == "lease":
            _shorten_wait(session, ticket, now_s)
        session.pending[ticket.request_id] = ticket
        session.outgoing += ticket.frame
        ticket.sent = False
    resubscribe(session, list(lapsed), {"event": CONNECTION_RESUMED})
    session.first = next(iter(session.pending.values()), None)
    session.unfinished = None


def _leave_again(session: Session, away: Absence, asked: list[Ticket], owed: set[str]) -> None:
    """Undo a `rejoin` that was interrupted, before anything was sent: there is to be another."""
    session.pending = {ticket.request_id: ticket for ticket in asked}
    session.forget_connection()
    session.owed = owed
    session.away = away
    session.unfinished = None


def on_reattached(session: Session, ticket: Ticket, lease: Decision, now_s: float) -> None:
    """Take the answer to `reattach`: the lease goes on, is tried again, or is over."""
    before = lease.lease_id or ""
    if lease.ended is not None:
        # Released, or ended by the daemon, meanwhile; its release is on its way.
        return
    if ticket.ok:
        lease_id = lease.reattached(ticket.reply, now_s)
        del session.leases[before]
        session.leases[lease_id] = lease
        session.notify(lease, {"event": CONNECTION_RESUMED, "lease_id": lease_id})
        return
    error = ticket.reply["error"]
    if error["code"] in NOT_NOW:
        lease.renew_at = now_s + REATTACH_AGAIN_S
        return
    session.lose(lease, f"lost: {error['message']} ({error['code']})")
    lost = {"event": CONNECTION_LOST, "lease_id": before, "reason": error["code"].upper()}
    session.notify(lease, lost)


def _refusals(session: Session, now_s: float) -> int:
    """How many connections in a row, this one included, were closed instead of answered."""
    joined_s, first = session.joined_s, session.first
    if joined_s is None or first is None or first.done or now_s - joined_s > REFUSED_S:
        return 0
    return session.refusals + 1


def _may_ask_again(ticket: Ticket) -> bool:
    if ticket.op == "seal":
        # It is about the leases of that connection.
        return False
    return not ticket.sent or ticket.op in ASKED_AGAIN


def _settle(session: Session, ticket: Ticket) -> None:
    """Finish what the loss has done, or what nobody waits for."""
    if ticket.op == "release":
        token = text_of(_fields_of(ticket).get("token"))
        session.owed.add(token)
        ticket.reply = {"id": ticket.request_id, "ok": True, "released": True, "token": token}
    else:
        ticket.reply = {"id": ticket.request_id, "ok": True}
    ticket.ok = True
    ticket.finish()
    del session.pending[ticket.request_id]


def _shorten_wait(session: Session, ticket: Ticket, now_s: float) -> None:
    """Ask only for what is left of the wait."""
    fields = _fields_of(ticket)
    wait_s = fields.get("wait_s")
    if not isinstance(wait_s, int | float) or ticket.deadline_s is None:
        return
    fields["wait_s"] = max(0.0, min(wait_s, ticket.deadline_s - ANSWER_S - now_s))
    payload = session.encode(fields)
    ticket.frame = HEADER.pack(len(payload)) + payload


def _fields_of(ticket: Ticket) -> dict[str, Any]:
    fields: dict[str, Any] = decode(ticket.frame[HEADER_BYTES:])
    return fields
