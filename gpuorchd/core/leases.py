"""The life of a lease while it lives: granted, renewed, asked back, ended.

From the end of a lease on, `drain` follows its bytes. Everything here leaves the state consistent
and appends what is to be done to `out`.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpuorchd.core import drain, ledger
from gpuorchd.core.effects import Announce, AnswerGrant, Effect, SignalPeer
from gpuorchd.core.model import (
    NS_PER_S,
    Client,
    Lease,
    LeaseId,
    LeaseState,
    Part,
    Waiter,
)
from gpuorchd.core.placement import Plan
from gpuorchd.core.state import State

# Kinds of deadline, each with what it belongs to.
TTL = "ttl"
REVOKE = "revoke"
WAIT = "wait"
# The owner of a detached lease did not come back.
DETACH = "detach"


def request_key(request: Lease | Waiter) -> object:
    """The name of a request among its connection's: the client's id, or one of our own."""
    if request.request_id is not None:
        return request.request_id
    # Text-mode requests without an id: distinct from every id a client can send.
    return (None, request.token)


def grant(state: State, asked: Waiter, plan: Plan, now_ns: int, out: list[Effect]) -> None:
    """Make the lease that `plan` found for a request, book it and answer the request."""
    number = state.granted_total = state.granted_total + 1
    settings = state.settings
    parts = tuple(map(Part, plan.devices, plan.memory_mb, plan.memory_mb, plan.charge_mb))
    client = state.clients[asked.conn]
    ttl_ns = 0 if client.sealed else settings.ttl_ns
    uid = client.peer.uid
    lease = Lease(
        lease_id=LeaseId(f"{settings.epoch[:8]}-{number}"),
        number=number,
        token=asked.token,
        conn=asked.conn,
        request_id=asked.request_id,
        ask=asked.ask,
        holder=asked.holder,
        uid=uid,
        priority=asked.priority,
        parts=parts,
        granted_ns=now_ns,
        granted_unix_ns=now_ns + state.unix_offset_ns,
        waited_ns=now_ns - asked.queued_ns,
        expires_ns=now_ns + ttl_ns if ttl_ns else None,
    )
    gave: list[Lease] = []
    for part in parts:
        if state.waiters and ledger.adopts(part.device, lease.holder):
            state.unsettled = True
        gave += ledger.take(lease, part)
        if plan.exclusive:
            part.device.exclusive = lease.lease_id
    state.leases[lease.lease_id] = lease
    state.tokens[lease.token] = lease
    client.requests[request_key(lease)] = lease
    lease.holder.leases[lease.lease_id] = lease
    state.live_leases += 1
    state.leases_by_uid[uid] = state.leases_by_uid.get(uid, 0) + 1
    if ttl_ns:
        state.deadlines.set((TTL, lease.lease_id), now_ns + ttl_ns)
    if state.waiters and is_capped(state, asked.ask.agent):
        state.unsettled = True
    state.changed_leases[number] = lease
    out.append(AnswerGrant(lease))
    out.append(Announce("lease.granted", granted_fields(lease)))
    for old in gave:
        state.changed_leases[old.number] = old
        drain.finish_if_empty(state, old, now_ns, out)


def is_capped(state: State, agent: str) -> bool:
    """Whether the agent's leases on one GPU are bounded together."""
    return state.policy.cap_mb(state.policy.rule(agent)) > 0


def granted_fields(lease: Lease) -> Mapping[str, object]:
    """What the event of a grant says."""
    return {
        "lease_id": lease.lease_id,
        "agent": lease.ask.agent,
        "priority": lease.priority.word,
        "gpus": drain.gpus(lease),
        "waited_s": lease.waited_ns / NS_PER_S,
        "pid": lease.holder.process.pid,
        "uid": lease.uid,
    }


def ask_back(
    state: State, lease: Lease, reason: str, grace_ns: int, now_ns: int, out: list[Effect]
) -> None:
    """Revoke a live lease: tell its owner, and end it when the grace is over.

    A lease that is being revoked already keeps the earlier of the two ends.
    """
    if grace_ns <= 0:
        signal(state, lease, out)
        revoke_now(state, lease, reason, now_ns, out)
        return
    due_ns = now_ns + grace_ns
    pending_ns = state.deadlines.due_ns((REVOKE, lease.lease_id))
    if pending_ns is not None and pending_ns <= due_ns:
        return
    if lease.state is not LeaseState.DETACHED:
        lease.state = LeaseState.REVOKING
    lease.revoke_reason = reason
    state.changed_leases[lease.number] = lease
    state.deadlines.set((REVOKE, lease.lease_id), due_ns)
    fields = {
        "lease_id": lease.lease_id,
        "agent": lease.ask.agent,
        "reason": reason,
        "deadline_s": grace_ns / NS_PER_S,
    }
    out.append(Announce("lease.revoking", fields, lease.conn))
    signal(state, lease, out)


def signal(state: State, lease: Lease, out: list[Effect]) -> None:
    """Signal the peer of a sealed connection, as it asked: one of its leases is to be revoked."""
    client = state.clients.get(lease.conn)
    if client is not None and client.sealed and client.signal is not None:
        out.append(SignalPeer(lease.conn, client.signal))


def tell_revoking(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    """Tell the owner of a lease that is being asked back, and nobody else, once more."""
    due_ns = state.deadlines.due_ns((REVOKE, lease.lease_id))
    assert due_ns is not None, "a lease is asked back without a deadline"
    fields = {
        "lease_id": lease.lease_id,
        "agent": lease.ask.agent,
        "reason": lease.revoke_reason,
        "deadline_s": max(0, due_ns - now_ns) / NS_PER_S,
    }
    # No second signal: programs take that for an order to break off.
    out.append(Announce("lease.revoking", fields, lease.conn, private=True))


def revoke_now(state: State, lease: Lease, reason: str, now_ns: int, out: list[Effect]) -> None:
    """End a lease that was asked back."""
    fields = {"lease_id": lease.lease_id, "agent": lease.ask.agent, "reason": reason}
    end(state, lease, Announce("lease.revoked", fields, lease.conn), now_ns, out)


def expire(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    """End a lease whose time limit has come."""
    state.expired_total += 1
    fields = {"lease_id": lease.lease_id, "agent": lease.ask.agent}
    end(state, lease, Announce("lease.expired", fields, lease.conn), now_ns, out)


def released(lease: Lease, reason: str) -> Announce:
    """The event of a lease that its own side ended, by `release` or with its connection."""
    fields = {"lease_id": lease.lease_id, "agent": lease.ask.agent, "reason": reason}
    return Announce("lease.released", fields)


def end(state: State, lease: Lease, event: Announce, now_ns: int, out: list[Effect]) -> None:
    """End a live lease, however it came to its end; its bytes begin to drain."""
    deadlines = state.deadlines
    if lease.expires_ns is not None:
        deadlines.drop((TTL, lease.lease_id))
    if lease.state is not LeaseState.ACTIVE:
        deadlines.drop((REVOKE, lease.lease_id))
        deadlines.drop((DETACH, lease.lease_id))
    detached = lease.state is LeaseState.DETACHED
    lease.state = LeaseState.DRAINING
    lease.ended_ns = now_ns
    del state.tokens[lease.token]
    if not detached:
        client = state.clients[lease.conn]
        del client.requests[request_key(lease)]
        if client.repeats:
            # Nothing is left to answer its request with, should it be asked again: a new one then.
            client.repeats.pop(lease.request_id, None)
            state.unrepeated.discard((lease.conn, lease.request_id))
        settle_holding(state, client)
    state.changed_leases[lease.number] = lease
    state.live_leases -= 1
    drop_count(state.leases_by_uid, lease.uid)
    state.unsettled = True
    out.append(event)
    drain.begin(state, lease, now_ns, out)


def settle_holding(state: State, client: Client) -> None:
    """Count a connection that no longer holds or awaits anything out of the holding ones."""
    if not client.requests:
        state.holding_clients -= 1
        drop_count(state.holders_by_uid, client.peer.uid)


def drop_count(counts: dict[int, int], uid: int) -> None:
    """Count one less for a uid, keeping no zeros."""
    if counts[uid] == 1:
        del counts[uid]
    else:
        counts[uid] -= 1
