"""What must hold after every step: sums are those of the records, no byte is promised twice.

`check` recomputes everything that the core keeps up to date as it goes and compares. It is for
tests, which call it after every event; it raises `AssertionError` with what does not hold.
"""

from __future__ import annotations

from collections import Counter

from gpuorchd.core import placement
from gpuorchd.core.model import Device, LeaseState, Priority, Waiter
from gpuorchd.core.state import State

HELD = (LeaseState.ACTIVE, LeaseState.REVOKING)
LIVE = (*HELD, LeaseState.DETACHED)


def check(state: State, now_ns: int) -> None:
    """Assert that the whole state is consistent at `now_ns`."""
    _check_leases(state)
    for device in state.devices.values():
        _check_device(state, device)
    _check_counts(state)
    _check_queue(state, now_ns)


def _check_leases(state: State) -> None:
    live = {lease.token: lease for lease in state.leases.values() if lease.state in LIVE}
    assert live == state.tokens, "tokens name other leases than the live ones"
    for lease in state.leases.values():
        assert lease.state is not LeaseState.FREED, f"{lease.lease_id} is freed and still there"
        assert any(part.claim_mb for part in lease.parts), f"{lease.lease_id} keeps nothing"
        assert state.holders.get(lease.holder.process) is lease.holder, "a lease without a holder"
        assert lease.holder.leases.get(lease.lease_id) is lease
        if lease.state in LIVE:
            assert all(part.claim_mb == part.memory_mb for part in lease.parts)
        if lease.state in HELD:
            client = state.clients.get(lease.conn)
            assert client is not None, f"{lease.lease_id} lives without a connection"
            assert client.peer.uid == lease.uid, f"{lease.lease_id} counts to another user"
            assert lease in client.requests.values(), "a live lease its connection does not know"
    for process, leases in state.watched.items():
        assert leases, f"{process} is watched for nothing"
        for lease in leases.values():
            assert state.leases.get(lease.lease_id) is lease, "a freed lease is watched for"
            assert process in (lease.others or ())
    for holder in state.holders.values():
        assert holder.clients or holder.leases, "a holder that holds nothing and has no connection"
        for lease_id, lease in holder.leases.items():
            assert state.leases.get(lease_id) is lease


def _check_device(state: State, device: Device) -> None:
    claims: Counter[object] = Counter()
    drains: Counter[object] = Counter()
    charges: Counter[str] = Counter()
    booked = 0
    for lease in state.leases.values():
        for part in lease.parts:
            if part.device is not device or not part.claim_mb:
                continue
            booked += 1
            assert device.parts.get(lease.lease_id) is part
            if lease.state is LeaseState.DRAINING:
                drains[lease.holder.process] += part.claim_mb
            else:
                claims[lease.holder.process] += part.claim_mb
                charges[lease.ask.agent] += part.charge_mb
    assert booked == len(device.parts), f"{device.uuid}: parts of leases that are not there"
    assert device.claim_mb == claims.total(), f"{device.uuid}: claims do not add up"
    assert device.draining_mb == drains.total(), f"{device.uuid}: draining does not add up"
    assert dict(charges) == device.charges, f"{device.uuid}: charges do not add up"
    unmet = 0
    for process, holding in device.holdings.items():
        assert holding.claim_mb == claims[process]
        assert holding.draining_mb == drains[process]
        unmet += holding.unmet_mb
    assert set(claims) | set(drains) <= set(device.holdings)
    assert device.unmet_mb == unmet, (
        f"{device.uuid}: unmet is {device.unmet_mb}, holdings say {unmet}"
    )
    total = device.claim_mb + device.draining_mb
    allowed_mb = device.capacity_mb + device.over_mb
    assert total <= allowed_mb, f"{device.uuid}: {total} promised of {allowed_mb}"
    if device.exclusive is not None:
        # What its own holder still drains may stand beside it; nobody else's bytes may.
        drained = {x.lease_id for x in state.leases.values() if x.state is LeaseState.DRAINING}
        holders = {state.leases[lease_id].holder.process for lease_id in device.parts}
        assert device.exclusive in device.parts, f"{device.uuid}: taken by a lease not on it"
        assert device.exclusive not in drained, f"{device.uuid}: taken by a lease that has ended"
        assert len(holders) == 1, f"{device.uuid}: whole and shared at once"


def _check_counts(state: State) -> None:
    live = [lease for lease in state.leases.values() if lease.state in LIVE]
    waiting = list(state.queue)
    assert state.live_leases == len(live)
    assert state.leases_by_uid == Counter(lease.uid for lease in live)
    uids = Counter(state.clients[waiter.conn].peer.uid for waiter in waiting)
    assert state.waiting_by_uid == uids
    holding = [client for client in state.clients.values() if client.requests]
    assert state.holding_clients == len(holding)
    assert state.holders_by_uid == Counter(client.peer.uid for client in holding)
    for client in state.clients.values():
        assert state.holders.get(client.holder.process) is client.holder
        for request in client.requests.values():
            if isinstance(request, Waiter):
                assert state.waiters.get(request.number) is request, "a wait nobody serves"
            else:
                assert request.state in HELD, "a request whose lease has ended"
    clients = Counter(client.holder.process for client in state.clients.values())
    for process, holder in state.holders.items():
        assert holder.clients == clients[process]


def _check_queue(state: State, now_ns: int) -> None:
    waiting = list(state.queue)
    assert {waiter.number: waiter for waiter in waiting} == state.waiters
    assert not waiting or not (state.safe_mode or state.stopping), "somebody waits for nothing"
    order = [(waiter.priority, waiter.number) for waiter in waiting]
    assert order == sorted(order), "the queue is out of order"
    due_ns = state.deadlines.next_ns()
    settled = due_ns is None or due_ns > now_ns
    taken = placement.NOBODY
    for priority in Priority:
        for waiter in state.queue.lane(priority):
            found = placement.place(state, waiter.ask, waiter.holder.process, now_ns, taken)
            assert not isinstance(found, placement.Plan), f"{waiter.queue_id} could be served"
            taken |= found.wanted
        # What is due and not told yet, as the age of a reading, is not taken into account yet.
        kept = taken == state.wanted[priority]
        assert kept or not settled, "GPUs are kept for those who wait for them"
