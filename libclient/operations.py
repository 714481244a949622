"""One generator per operation: what is asked, and what its answer means.

An operation yields the ticket that it waits for and is resumed when that is done. A driver that
gives up (out of time, interrupted, cancelled) throws what happened into it; the operation then
leaves nothing behind that its caller would not know of. Drivers differ in how they wait, and in
nothing else.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

from libclient.decision import Decision, Event
from libclient.errors import CLOSED, NotGranted, RequestError, Unavailable, warn_refused
from libclient.session import Session
from libclient.tickets import Subscription, Ticket
from libclient.wire.vocabulary import BAD_REQUEST, FORBIDDEN

T = TypeVar("T")
Operation = Generator[Ticket, None, T]


def _answer(session: Session, ticket: Ticket) -> Operation[dict[str, Any]]:
    """Wait for an answer and return it; undo the request if nobody is there to have it."""
    try:
        yield ticket
        return ticket.result()
    except BaseException:
        # A time limit, an interrupt, a cancelled task: all the same to the daemon.
        session.abandon(ticket)
        raise


def call(session: Session, op: str, fields: Mapping[str, object]) -> Operation[dict[str, Any]]:
    """Ask for any op; return the fields of its reply without `id` and `ok`."""
    reply = yield from _answer(session, session.ask(op, fields))
    return {name: value for name, value in reply.items() if name not in ("id", "ok")}


D = TypeVar("D", bound=Decision)


def lease(
    session: Session, decision: D, fields: Mapping[str, object], required: bool
) -> Operation[D]:
    """Ask for a lease; return `decision`, for the GPU or for the CPU.

    Raises NotGranted in place of a CPU decision where `required`, and nothing else for what the
    daemon or the host did.
    """
    try:
        ticket = session.ask("lease", fields, decision)
        try:
            yield ticket
            if not ticket.ok:
                ticket.result()
        except BaseException:
            # As in `_answer`; written out, because this is the path of every lease.
            session.abandon(ticket)
            raise
    except Unavailable as fault:
        decision.refuse(fault.reason, fault.detail)
    except RequestError as fault:
        decision.refuse(fault.code.upper(), str(fault))
        if fault.code in (BAD_REQUEST, FORBIDDEN) and not required:
            # The caller's doing, so it must not go unseen.
            warn_refused(f"no lease: {fault}")
    if required and not decision.granted:
        raise NotGranted(decision.reason, decision.detail)
    return decision


def release(session: Session, decision: Decision) -> Operation[None]:
    """Give a lease back; asks nothing for one that is over. Never raises for the daemon's part.

    Without an answer in time the request is on its way all the same. Without a connection it is
    done at once: the lease is never reattached.
    """
    if not session.drop(decision):
        return
    try:
        ticket = session.ask("release", {"token": decision.token})
        try:
            yield ticket
        except BaseException:
            # The same again.
            session.abandon(ticket)
            raise
    except Unavailable:
        return


def subscribe(session: Session, topics: Sequence[str] | None) -> Operation[Subscription]:
    """Subscribe to events; raises Unavailable or RequestError."""
    fields = {} if topics is None else {"topics": list(topics)}
    subscription = Subscription(fields.get("topics"))
    yield from _answer(session, session.ask("subscribe", fields, subscription))
    return subscription


def next_event(session: Session, subscription: Subscription) -> Operation[Event]:
    """Wait for the next event of a subscription. Raises Unavailable once there can be none.

    A restart of the daemon is not the end: the subscription is made again, and `daemon.resumed` or
    `connection.resumed` says where something may be missing.
    """
    event = subscription.take()
    if event is not None:
        return event
    if subscription.over is not None:
        raise Unavailable(subscription.over.detail, subscription.over.reason)
    if subscription.waiting is not None:
        raise ValueError("another thread or task is waiting for this subscription's next event")
    ticket = subscription.waiting = Ticket()
    try:
        yield ticket
    except BaseException:
        subscription.waiting = None
        raise
    event = subscription.take()
    if event is None:
        ticket.result()
        raise AssertionError("an event or the end has come")
    return event


def unsubscribe(session: Session, subscription: Subscription) -> Operation[None]:
    """End a subscription. Never raises for the daemon's part."""
    if subscription.over is not None:
        return
    # Another thread or task may wait for an event that will not come.
    subscription.end(Unavailable("the subscription was ended", CLOSED))
    number = subscription.number
    if number not in session.subscriptions:
        # It is being made again, and ended as soon as that is answered.
        return
    del session.subscriptions[number]
    try:
        yield from _answer(session, session.ask("unsubscribe", {"subscription": number}))
    except (Unavailable, RequestError):
        return
