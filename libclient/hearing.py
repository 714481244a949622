"""What a session makes of what nobody waits for: events, and answers to what it asked by itself.

Events of a subscription go to its taker; those about the connection's own leases change the lease
first and are then told to its handler. Events of others and unknown ones are ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from libclient import resume
from libclient.decision import Decision, Event
from libclient.errors import CLOSED
from libclient.messages import Malformed, deadline_of, missed_before, number_of, text_of
from libclient.tickets import Subscription, Ticket
from libclient.wire.vocabulary import EVENTS_LOST, UNKNOWN_REQUEST, UNKNOWN_TOKEN

if TYPE_CHECKING:
    from libclient.session import Session


def hear(session: Session, event: Event) -> None:
    """Take an event. Raises `Malformed` for what is none."""
    name, number = event.get("event"), event.get("subscription")
    if type(name) is not str:
        raise Malformed("a message that is neither a reply nor an event")
    if number is not None:
        # One that was just ended may still have events under way.
        if type(number) is int and number in session.subscriptions:
            subscription = session.subscriptions[number]
            missed = missed_before(subscription.seq, event)
            subscription.seq = event["seq"]
            if missed and name != EVENTS_LOST:
                subscription.put({"event": EVENTS_LOST, "count": missed})
            subscription.put(event)
        return
    if name == resume.DAEMON_RESUMED:
        resume.on_resumed(session, event)
        return
    missed = missed_before(session.own_seq, event)
    session.own_seq = event["seq"]
    if missed and name != EVENTS_LOST:
        for lease in session.leases.values():
            session.notify(lease, {"event": EVENTS_LOST, "count": missed})
    _hear_own(session, name, event)


def _hear_own(session: Session, name: str, event: Event) -> None:
    lease = session.leases.get(text_of(event.get("lease_id")))
    if name == "lease.queued":
        ticket = session.pending.get(number_of(event.get("request_id")))
        if ticket is not None and isinstance(ticket.target, Decision):
            session.notify(ticket.target, event)
    elif lease is not None:
        if name == "lease.revoking":
            lease.revoking = True
            lease.deadline = deadline_of(event)
        elif name == "lease.revoked":
            session.lose(lease, f"revoked: {event.get('reason')}")
        elif name == "lease.expired":
            session.lose(lease, "expired")
        session.notify(lease, event)
    elif "lease_id" not in event:
        # About the daemon or a GPU: those whom it names, or all.
        named = event.get("lease_ids")
        for lease_id, held in session.leases.items():
            if type(named) is not list or lease_id in named:
                session.notify(held, event)


def take_late(session: Session, ticket: Ticket, now_s: float) -> None:
    """Take an answer that nobody waits for: asked by the session, or given up by its caller."""
    session.late -= 1
    code, target = None if ticket.ok else ticket.reply["error"]["code"], ticket.target
    if isinstance(target, Decision) and ticket.op == "renew":
        if ticket.ok:
            target.renewed(ticket.reply.get("expires_at"), now_s)
        elif code == UNKNOWN_TOKEN:
            session.lose(target, "expired")
        else:
            target.not_renewed(now_s)
        session.plan_renewals()
    elif isinstance(target, Decision) and ticket.op == "reattach":
        resume.on_reattached(session, ticket, target, now_s)
        session.plan_renewals()
    elif isinstance(target, Subscription):
        if not resume.on_resubscribed(session, ticket, target):
            undo(session, ticket)
    elif code == UNKNOWN_REQUEST and ticket.cancels in session.pending:
        # It does not wait, so it was answered before this: an interrupt has swallowed that
        # answer, which may have been a grant.
        session.end("interrupted while an answer was read", CLOSED)
    else:
        undo(session, ticket)


def undo(session: Session, ticket: Ticket) -> None:
    """Give back what an answer brought to a caller who is gone."""
    reply, target = ticket.reply, ticket.target
    if not ticket.ok:
        return
    if ticket.op == "lease" and reply.get("granted") is True:
        if isinstance(target, Decision):
            session.drop(target)
        if type(reply.get("token")) is str:
            session.release_quietly(reply["token"])
    elif ticket.op == "subscribe" and type(reply.get("subscription")) is int:
        session.subscriptions.pop(reply["subscription"], None)
        session.ask_quietly("unsubscribe", {"subscription": reply["subscription"]})
