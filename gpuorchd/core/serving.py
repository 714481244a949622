"""Serving those who wait: who is next, who keeps whom waiting, and what each is told.

One pass goes through the waiting requests in order. Who fits is granted. Who does not, for lack
of memory, keeps every GPU that it could use from those behind it, so that large requests are not
starved by small ones. Who is held up by anything else (its own agent's cap, a cordon, a sick GPU)
keeps nothing from anybody. A new request is decided by the same rule at its own place
(`State.wanted`).
"""

from __future__ import annotations

from gpuorchd.core import leases, ledger, placement
from gpuorchd.core.effects import Announce, AnswerDenial, AnswerError, Effect
from gpuorchd.core.model import (
    NS_PER_S,
    Denial,
    DeviceUuid,
    Note,
    Priority,
    Reason,
    Waiter,
)
from gpuorchd.core.state import State

# Key of the deadline at which changed positions are told.
POSITIONS = ("positions", None)
# Key of the deadline at which a reading grows too old: who waited for that GPU then waits for
# nothing, and keeps it from nobody.
STALE = ("stale", None)
# A waiting request hears of its place at most four times a second.
POSITION_EVERY_NS = NS_PER_S // 4
# Telling goes through the whole queue: no more often than this, however fast it moves.
TELLING_EVERY_NS = NS_PER_S // 20

UNWANTED = (placement.NOBODY,) * len(Priority)


def enqueue(state: State, waiter: Waiter, denial: Denial, now_ns: int, out: list[Effect]) -> None:
    """Let a request wait, and tell its owner where it stands."""
    position = state.queue.add(waiter)
    state.queued_total = waiter.number
    state.clients[waiter.conn].requests[leases.request_key(waiter)] = waiter
    uid = state.clients[waiter.conn].peer.uid
    state.waiting_by_uid[uid] = state.waiting_by_uid.get(uid, 0) + 1
    state.deadlines.set((leases.WAIT, waiter.number), waiter.deadline_ns)
    state.waiters[waiter.number] = waiter
    state.changed_waiters[waiter.number] = waiter
    state.unsettled = True
    _tell(waiter, position, denial.eta_ns, now_ns, out, private=False)


def dequeue(state: State, waiter: Waiter) -> None:
    """Take a request out of the queue; what becomes of it is the caller's business."""
    state.queue.remove(waiter)
    del state.waiters[waiter.number]
    state.changed_waiters[waiter.number] = waiter
    state.deadlines.drop((leases.WAIT, waiter.number))
    leases.drop_count(state.waiting_by_uid, state.clients[waiter.conn].peer.uid)
    state.unsettled = True


def drop(state: State, waiter: Waiter) -> None:
    """End a wait for good; its answer is the caller's to give."""
    dequeue(state, waiter)
    client = state.clients[waiter.conn]
    del client.requests[leases.request_key(waiter)]
    leases.settle_holding(state, client)


def answer(state: State, waiter: Waiter, denial: Denial, now_ns: int, out: list[Effect]) -> None:
    """End a wait without a grant."""
    drop(state, waiter)
    deny(waiter, denial, now_ns, out)


def deny(waiter: Waiter, denial: Denial, now_ns: int, out: list[Effect]) -> None:
    """Answer a request that gets nothing, whether it waited or not."""
    waited_ns = now_ns - waiter.queued_ns
    agent = waiter.ask.agent
    out.append(AnswerDenial(waiter.conn, waiter.request_id, agent, denial, waited_ns))
    fields = {
        "agent": agent,
        "note": denial.note.value,
        "waited_s": waited_ns / NS_PER_S,
        "pid": waiter.holder.process.pid,
    }
    out.append(Announce("lease.denied", fields))


def end_wait(state: State, waiter: Waiter, note: Note, now_ns: int, out: list[Effect]) -> None:
    """Answer a wait that was cancelled or ran out, with what it was waiting for."""
    # What it keeps from others itself is not kept from it.
    taken = state.taken_before.get(waiter.number, state.wanted[waiter.priority])
    found = placement.place(state, waiter.ask, waiter.holder.process, now_ns, taken, estimate=False)
    reasons: tuple[Reason, ...] = found.reasons if isinstance(found, Denial) else ()
    answer(state, waiter, Denial(note, reasons, final=True), now_ns, out)


def follow_rules(state: State, out: list[Effect]) -> None:
    """Apply changed rules to those who wait: who may not use its name any more is answered so.

    Everyone else gets the place that the rules in force would have given it.
    """
    moved: list[tuple[Waiter, Priority]] = []
    for waiter in tuple(state.queue):
        ask = waiter.ask
        client = state.clients[waiter.conn]
        refusal = placement.bound_to_others(state, client.peer, ask)
        if refusal is not None:
            drop(state, waiter)
            out.append(AnswerError(waiter.conn, waiter.request_id, refusal))
            continue
        priority = state.policy.priority(state.policy.rule(ask.agent), ask.priority)
        if priority is not waiter.priority:
            moved.append((waiter, priority))
            state.changed_waiters[waiter.number] = waiter
    state.queue.rank_anew(moved)


def nobody_waits(state: State) -> None:
    """Settle a change where the queue is empty: no GPU is waited for."""
    state.unsettled = state.upheaval = False
    if state.wanted is not UNWANTED:
        state.wanted = UNWANTED
        state.taken_before.clear()
        state.deadlines.drop(STALE)


def serve(state: State, now_ns: int, out: list[Effect]) -> None:
    """Serve whoever can be served, in order, and note which GPUs are waited for.

    Leaves `unsettled` set where another pass may serve more or keep other GPUs: a grant that takes
    its agent to its cap frees what another request of that agent kept from those behind it.
    """
    thorough = state.upheaval
    state.unsettled = state.upheaval = False
    everything = frozenset(device.facts.uuid for device in state.order)
    closed = placement.closed(state, now_ns)
    taken: frozenset[DeviceUuid] = placement.NOBODY
    # Where nobody from here on gets anything, nor has anything to keep from others.
    shut = closed
    wanted: list[frozenset[DeviceUuid]] = []
    served: list[Waiter] = []
    hopeless: list[tuple[Waiter, Denial]] = []
    # Within a pass room only shrinks: what failed once fails again, and so does more of it.
    failed: dict[object, int] = {}
    anew = False
    state.taken_before.clear()
    for priority in Priority:
        for waiter in state.queue.lane(priority):
            if anew:
                break
            if not thorough:
                if shut >= everything:
                    break
                if _chosen(state, waiter) <= shut:
                    continue
            shape = placement.shape(state, waiter.ask, waiter.holder.process)
            memory_mb = waiter.ask.memory_mb
            if not thorough and failed.get(shape, memory_mb + 1) <= memory_mb:
                continue
            found = placement.place(
                state, waiter.ask, waiter.holder.process, now_ns, taken, estimate=False
            )
            if isinstance(found, placement.Plan):
                # Who waits ahead may wait for what is a lease's from now on, and keep it.
                anew = any(ledger.adopts(device, waiter.holder) for device in found.devices)
                leases.grant(state, waiter, found, now_ns, out)
                served.append(waiter)
            elif found.final:
                hopeless.append((waiter, found))
            else:
                failed[shape] = memory_mb
                if not found.wanted <= taken:
                    state.taken_before[waiter.number] = taken
                    taken |= found.wanted
                    shut = taken | closed
        wanted.append(taken)
    state.wanted = tuple(wanted)
    again = state.unsettled
    for waiter in served:
        dequeue(state, waiter)
    for waiter, denial in hopeless:
        answer(state, waiter, denial, now_ns, out)
    state.unsettled, state.upheaval = again, anew and thorough
    _plan_positions(state, now_ns)
    _plan_stale(state, now_ns)


def _chosen(state: State, waiter: Waiter) -> frozenset[DeviceUuid]:
    """Name the GPUs that a request chooses from; found out once for every list of them."""
    if waiter.chosen_of is not state.order:
        waiter.chosen = placement.chosen(state, waiter.ask)
        waiter.chosen_of = state.order
    return waiter.chosen


def _plan_positions(state: State, now_ns: int) -> None:
    if len(state.queue) and state.deadlines.due_ns(POSITIONS) is None:
        state.deadlines.set(POSITIONS, max(now_ns, state.told_ns + TELLING_EVERY_NS))


def _plan_stale(state: State, now_ns: int) -> None:
    age_ns = state.settings.reading_max_age_ns + 1
    dues = [device.reading_ns + age_ns for device in state.order if device.reading is not None]
    coming = [due_ns for due_ns in dues if due_ns > now_ns]
    if coming and len(state.queue):
        state.deadlines.set(STALE, min(coming))
    else:
        state.deadlines.drop(STALE)


def tell_positions(state: State, now_ns: int, out: list[Effect]) -> None:
    """Tell every waiting request whose position has changed, each at most four times a second."""
    state.told_ns = now_ns
    soonest_ns: int | None = None
    for position, waiter in enumerate(state.queue, start=1):
        if waiter.told_position == position:
            continue
        due_ns = waiter.told_ns + POSITION_EVERY_NS
        if due_ns > now_ns:
            soonest_ns = due_ns if soonest_ns is None else min(soonest_ns, due_ns)
            continue
        eta_ns = None
        if position == 1:
            found = placement.place(state, waiter.ask, waiter.holder.process, now_ns)
            eta_ns = found.eta_ns if isinstance(found, Denial) else None
        _tell(waiter, position, eta_ns, now_ns, out, private=True)
    if soonest_ns is not None:
        state.deadlines.set(POSITIONS, soonest_ns)


def _tell(
    waiter: Waiter,
    position: int,
    eta_ns: int | None,
    now_ns: int,
    out: list[Effect],
    *,
    private: bool,
) -> None:
    waiter.told_position = position
    waiter.told_ns = now_ns
    fields = {
        "queue_id": waiter.queue_id,
        "agent": waiter.ask.agent,
        "position": position,
        "ahead": position - 1,
        "eta_s": None if eta_ns is None or position > 1 else eta_ns / NS_PER_S,
    }
    own = {"request_id": waiter.request_id}
    out.append(Announce("lease.queued", fields, waiter.conn, own, private))
