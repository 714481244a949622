"""Judgements on grants, denials and waits, by the books and by the physical truth.

Owns no state. Every function raises `Violation` where the core did what the rules forbid, or did
not do what they ask for; where the books leave a moment open both outcomes pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpuorchd.core.effects import AnswerError
from gpuorchd.core.model import (
    Ask,
    ConnectionId,
    DeviceUuid,
    Lease,
    Note,
    Priority,
    ProcessKey,
    RequestId,
    Token,
)
from gpuorchd.core.state import Limits
from tests.support.books import Books
from tests.support.entries import Held
from tests.support.rules import NOT_FOR_MEMORY, WALK, Rules
from tests.support.world import World

NOTHING: frozenset[DeviceUuid] = frozenset()
MEMORY_NOTES = {Note.RESERVED, Note.INSUFFICIENT_MEMORY}
FOR_THE_HOST = (Note.SAFE_MODE, Note.NO_GPU, Note.POLICY)


class Violation(AssertionError):
    """The core broke one of its promises."""


def require(condition: bool, promise: str, *details: object) -> None:
    """Raise `Violation` with the promise that was broken."""
    if not condition:
        raise Violation(" | ".join([promise, *map(repr, details)]))


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits, as seen from outside."""

    conn: ConnectionId
    request_id: RequestId
    token: Token
    ask: Ask
    holder: ProcessKey
    uid: int
    priority: Priority
    number: int
    queued_ns: int
    told_position: int = 0
    # Where it stands, and since when.
    position: int = 0
    moved_ns: int = 0
    told_ns: deque[int] = field(default_factory=lambda: deque(maxlen=5))

    @property
    def deadline_ns(self) -> int:
        """When it has to be answered at the latest."""
        return self.queued_ns + self.ask.wait_ns

    @property
    def place(self) -> tuple[Priority, int]:
        """Its place in the order of service."""
        return (self.priority, self.number)


def reserved_surely(rules: Rules, ahead: Sequence[Waiting]) -> frozenset[DeviceUuid]:
    """Name the cards that those ahead wait for, however the books are read."""
    reserved = NOTHING
    for waiter in ahead:
        verdicts = [
            rules.verdict(waiter.ask, waiter.holder, most=most, reserved=reserved)
            for most in (False, True)
        ]
        if not any(verdict.doubtful for verdict in verdicts):
            reserved |= verdicts[0].wanted & verdicts[1].wanted
    return reserved


def reserved_perhaps(rules: Rules, ahead: Sequence[Waiting]) -> frozenset[DeviceUuid]:
    """Name the cards that those ahead wait for by any reading of the books."""
    reserved = NOTHING
    for waiter in ahead:
        for most in (True, False):
            verdict = rules.verdict(waiter.ask, waiter.holder, most=most, reserved=reserved)
            reserved |= verdict.wanted
            if verdict.doubtful:
                reserved |= {seat.facts.uuid for seat in rules.chosen(waiter.ask)}
    return reserved


def check_grant(
    rules: Rules, record: Lease, holder: ProcessKey, priority: Priority, ahead: Sequence[Waiting]
) -> None:
    """Check a grant before it is booked: these cards, this much, to this one, now."""
    ask, books = record.ask, rules.books
    uuids = [part.device.uuid for part in record.parts]
    require(not rules.safe_mode, "nothing is granted under SAFE_MODE", record.lease_id)
    require(not books.blind, "nothing is granted while no card can be used", record.lease_id)
    require(len(set(uuids)) == len(uuids) == ask.gpus, "as many cards as asked for", uuids)
    require(record.priority == priority, "a lease has its request's class", record.priority)
    chosen = {seat.facts.uuid: seat for seat in rules.chosen(ask)}
    reserved = reserved_surely(rules, ahead)
    for part in record.parts:
        seat = chosen.get(part.device.uuid)
        require(seat is not None, "a grant names present cards of those to choose from", uuids)
        assert seat is not None
        if rules.whole(ask):
            require(
                rules.asked_mb(ask) <= part.memory_mb <= rules.room_mb(seat, holder, most=False)
                or books.seats[part.device.uuid].doubtful,
                "a whole card is large enough, and no larger than there is room",
                part.memory_mb,
            )
        else:
            require(part.memory_mb == rules.asked_mb(ask), "no more, no less than asked", part)
        reason = rules.reason(ask, holder, seat, False, reserved)
        unsure = seat.reading is not None and books.told(part.device.uuid).murky
        if unsure and reason in (Note.INSUFFICIENT_MEMORY, Note.RESERVED):
            reason = None
        require(reason is None, "what is granted may be had", part.device.uuid, reason, ask)


def check_denial(
    rules: Rules, ask: Ask, holder: ProcessKey, note: Note, ahead: Sequence[Waiting], *, entry: bool
) -> None:
    """Check a denial: it was due, and its note is one that the rules give."""
    most = rules.verdict(ask, holder, most=True, reserved=reserved_perhaps(rules, ahead))
    least = rules.verdict(ask, holder, most=False, reserved=reserved_surely(rules, ahead))
    if most.doubtful or least.doubtful:
        return
    require(most.note is not None, "what can be had is not denied", note, ask)
    if ask.wait_ns or not entry:
        require(most.final or least.final, "who may wait is not denied at once", note, ask)
    if most.note in FOR_THE_HOST:
        require(note is most.note, "the note says what is wrong with the host", note, most.note)
    elif most.final:
        require(note in WALK, "the note of what can never be had", note, most.note)
    else:
        allowed = {most.note, least.note} - {None}
        if allowed & MEMORY_NOTES:
            # Kept for others and too small besides: either is true.
            allowed |= MEMORY_NOTES
        require(note in allowed, "the note is the first that applies", note, allowed, ask)


def check_waiters(rules: Rules, waiting: Sequence[Waiting]) -> None:
    """Check that nobody waits who could be served, or who never can be."""
    reserved = NOTHING
    ahead = []
    for waiter in waiting:
        most = rules.verdict(waiter.ask, waiter.holder, most=True, reserved=reserved)
        ahead.append((waiter.request_id, waiter.ask.agent, most.note, sorted(most.wanted)))
        if not most.doubtful:
            require(
                most.note is not None,
                "nobody waits who could be served",
                waiter.ask,
                ahead,
            )
            require(
                not most.final, "nobody waits for what can never be", waiter.request_id, most.note
            )
        reserved |= most.wanted
        if most.doubtful:
            reserved |= {seat.facts.uuid for seat in rules.chosen(waiter.ask)}
        elif most.note in NOT_FOR_MEMORY or most.note is Note.NO_GPU:
            least = rules.verdict(waiter.ask, waiter.holder, most=False, reserved=reserved)
            reserved |= least.wanted


def check_truth(
    rules: Rules, world: World, lease: Held, before_mb: Mapping[DeviceUuid, int]
) -> None:
    """Check that all leases can be used up to the last byte after this grant, for all we know.

    What a stray, or a holder beyond its leases, took after the newest reading is excused: nobody
    could know it. So is a grant that takes nothing beyond what its holder has already: what it
    uses, or what its leases, draining ones too, kept for it before (`before_mb`).
    """
    books = rules.books
    for uuid in lease.shares:
        seat = books.seats[uuid]
        if seat.facts.drain_ns is not None or seat.reading is None:
            continue
        now = world.look(uuid)
        if any(use.used_mb is None for use in now.processes + seat.reading.processes):
            continue
        told_now = books.attribute(uuid, now)
        told_then = books.told(uuid)
        if told_now.murky or told_then.murky:
            continue
        known = {use.process: use.used_mb or 0 for use in seat.reading.processes}
        total_mb, excused_mb = 0, 0
        for use in told_now.loose:
            total_mb += use.used_mb or 0
            excused_mb += max(0, (use.used_mb or 0) - known.get(use.process, 0))
        claims = books.claims(uuid, most=False)
        for holder in claims.keys() | told_now.used.keys():
            claim_mb = sum(claims.get(holder, (0, 0)))
            used_mb = told_now.used.get(holder) or 0
            total_mb += max(claim_mb, used_mb)
            excused_mb += max(0, used_mb - max(claim_mb, told_then.used.get(holder) or 0))
        own_used_mb = told_now.used.get(lease.holder) or 0
        own_claim_mb = sum(claims[lease.holder])
        taken_mb = max(own_claim_mb, own_used_mb) - max(before_mb[uuid], own_used_mb)
        require(
            taken_mb <= 0 or total_mb <= seat.capacity_mb + excused_mb,
            "every lease can be used up to its last byte",
            uuid,
            f"{total_mb} promised or used of {seat.capacity_mb}, {excused_mb} excused",
            lease.lease_id,
        )


def counts(
    books: Books, waiting: Sequence[Waiting], conn: ConnectionId, uid: int
) -> dict[str, int]:
    """Count what the bounds are on: in all, of one user, of one connection."""
    live = [lease for lease in books.leases.values() if lease.live]
    uids = {each: peer.uid for each, peer in books.peers.items()}
    holding = {lease.conn for lease in live if lease.detached_ns is None}
    holding |= {waiter.conn for waiter in waiting}
    return {
        "holders": len(holding),
        "holders_per_uid": sum(1 for each in holding if uids[each] == uid),
        "leases": len(live),
        "leases_per_uid": sum(1 for lease in live if lease.uid == uid),
        "leases_per_connection": sum(1 for lease in live if lease.conn == conn),
        "waiting": len(waiting),
        "waiting_per_uid": sum(1 for waiter in waiting if waiter.uid == uid),
        "waiting_per_connection": sum(1 for waiter in waiting if waiter.conn == conn),
    }


def check_bounds(books: Books, waiting: Sequence[Waiting], limits: Limits) -> None:
    """Check that no bound is passed."""
    leases = books.leases.values()
    conns = {x.conn for x in leases if x.live and x.detached_ns is None}
    conns |= {waiter.conn for waiter in waiting}
    for conn in conns:
        for name, count in counts(books, waiting, conn, books.peers[conn].uid).items():
            bound = getattr(limits, name)
            require(count <= bound, "bounds hold", name, count, bound)


def check_over_bound(
    books: Books, waiting: Sequence[Waiting], limits: Limits, asker: Waiting, effect: AnswerError
) -> None:
    """Check that a refused request would have passed a bound, and that the message names it."""
    found = counts(books, waiting, asker.conn, asker.uid)
    for name in ("leases", "leases_per_uid", "leases_per_connection"):
        # A request that waits may become a lease: it may count as one from the start.
        found[name] += found[name.replace("leases", "waiting")]
    reached = {
        name: getattr(limits, name)
        for name, count in found.items()
        if count >= getattr(limits, name)
    }
    require(bool(reached), "only what passes a bound is refused for it", effect.refusal)
    named = any(str(bound) in effect.refusal.message for bound in reached.values())
    require(named, "a bound is named with its value", effect.refusal, reached)
