"""What of the state is recorded, as rows: all of it, or what one turn changed.

`changes` is called at the end of a turn and empties the notes of what changed. `everything` is the
whole table as it would stand if it were written anew; the two agree, which tests check after every
step. Nothing that can be found out again is recorded: readings, who lives, sums, positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpuorchd.core import leases, rows
from gpuorchd.core.effects import Answer, AnswerDenial, AnswerPolicy, Commit, Effect
from gpuorchd.core.model import (
    Client,
    DeviceFacts,
    Lease,
    LeaseState,
    Part,
    Token,
    Waiter,
)
from gpuorchd.core.rows import ClientRow, DeviceRow, LeaseRow, OutcomeRow, PartRow, WaiterRow
from gpuorchd.core.state import State

Key = tuple[str, int | str]
Rows = dict[Key, tuple[object, ...] | None]

ENDED = Token("")
OUTCOME_BITS = rows.OUTCOMES_KEPT.bit_length() - 1


def changes(state: State, effects: Iterable[Effect]) -> Commit | None:
    """Take what a turn changed and answered as rows; None where that is nothing."""
    found: Rows = {}
    if state.changed_leases:
        for number, lease in state.changed_leases.items():
            gone = lease.state is LeaseState.FREED
            found[rows.LEASE, number] = None if gone else lease_row(state, lease)
        state.changed_leases.clear()
    if state.changed_waiters:
        for number, waiter in state.changed_waiters.items():
            found[rows.WAITER, number] = waiter_row(waiter) if number in state.waiters else None
        state.changed_waiters.clear()
    if state.settings.keeps_answers:
        for effect in effects:
            kind = type(effect)
            if kind is Answer or kind is AnswerDenial or kind is AnswerPolicy:
                _add_outcome(state, effect, found)
    if state.changed_clients:
        for conn, client in state.changed_clients.items():
            there = conn in state.clients
            found[rows.CLIENT, conn] = client_row(client) if there else None
            if not there:
                found.update(_outcomes_gone(client))
        state.changed_clients.clear()
    if state.changed_devices:
        for uuid in state.changed_devices:
            device = state.devices.get(uuid)
            found[rows.DEVICE, uuid] = None if device is None else device_row(device.facts)
        state.changed_devices.clear()
    return Commit(found, totals(state)) if found else None


def everything(state: State) -> Rows:
    """All rows of the state but the outcomes: a table that is begun anew."""
    found: Rows = {}
    for device in state.devices.values():
        found[rows.DEVICE, device.uuid] = device_row(device.facts)
    for client in state.clients.values():
        found[rows.CLIENT, client.conn] = client_row(client)
    for lease in state.leases.values():
        found[rows.LEASE, lease.number] = lease_row(state, lease)
    for waiter in state.queue:
        found[rows.WAITER, waiter.number] = waiter_row(waiter)
    return found


def totals(state: State) -> tuple[int, int, int]:
    """The counts that have to go on where they were: leases, requests that waited, expiries."""
    return state.granted_total, state.queued_total, state.expired_total


def device_row(facts: DeviceFacts) -> DeviceRow:
    """Show a GPU."""
    return DeviceRow(
        facts.uuid, facts.index, facts.name, facts.total_mb, facts.reserved_mb, facts.drain_ns
    )


def client_row(client: Client) -> ClientRow:
    """Show a connection."""
    peer = client.peer
    return ClientRow(
        client.conn,
        peer.process,
        peer.uid,
        peer.gid,
        peer.unit,
        client.sealed,
        client.signal,
        client.seal_told,
    )


def lease_row(state: State, lease: Lease) -> LeaseRow:
    """Show a lease."""
    holder = lease.holder
    live = lease.state is not LeaseState.ACTIVE and lease.state is not LeaseState.DRAINING
    others = lease.others
    parts = lease.parts
    return LeaseRow(
        lease.number,
        lease.lease_id,
        # Nobody asks by it any more once the lease has ended.
        lease.token if lease.state is not LeaseState.DRAINING else ENDED,
        lease.conn,
        lease.request_id,
        lease.ask,
        holder.process,
        lease.uid,
        holder.unit,
        int(lease.priority),
        tuple([_part_row(part) for part in parts]),
        parts[0].device.exclusive == lease.lease_id if len(parts) == 1 else _whole(lease),
        lease.granted_ns,
        lease.granted_unix_ns,
        lease.waited_ns,
        lease.expires_ns,
        lease.state.value,
        lease.ended_ns,
        lease.revoke_reason,
        state.deadlines.due_ns((leases.REVOKE, lease.lease_id)) if live else None,
        lease.withheld,
        tuple(sorted(others)) if others else (),
    )


def _part_row(part: Part) -> PartRow:
    facts = part.device.facts
    return PartRow(facts.uuid, facts.index, part.memory_mb, part.claim_mb, part.charge_mb)


def _whole(lease: Lease) -> bool:
    return any(part.device.exclusive == lease.lease_id for part in lease.parts)


def waiter_row(waiter: Waiter) -> WaiterRow:
    """Show a request that waits."""
    return WaiterRow(
        waiter.number,
        waiter.token,
        waiter.conn,
        waiter.request_id,
        waiter.ask,
        int(waiter.priority),
        waiter.queued_ns,
        waiter.deadline_ns,
    )


def _add_outcome(state: State, effect: Effect, found: Rows) -> None:
    assert isinstance(effect, Answer | AnswerDenial | AnswerPolicy)
    request_id = effect.request_id
    client = state.clients.get(effect.conn)
    if request_id is None or client is None:
        return
    said: object
    if isinstance(effect, Answer):
        kind, said = "answer", dict(effect.fields)
    elif isinstance(effect, AnswerPolicy):
        kind, said = "policy", effect.note
    else:
        if not effect.waited_ns:
            # Nothing was done for it: to ask again is as good.
            return
        denial = effect.denial
        reasons = [[x.index, x.note.value, x.detail] for x in denial.reasons]
        kind = "denial"
        said = [effect.agent, denial.note.value, reasons, denial.eta_ns, effect.waited_ns]
    number = client.outcomes
    client.outcomes = number + 1
    place = client.conn << OUTCOME_BITS | (number & rows.OUTCOMES_KEPT - 1)
    found[rows.OUTCOME, place] = OutcomeRow(number, client.conn, request_id, kind, said)


def _outcomes_gone(client: Client) -> Iterator[tuple[Key, None]]:
    first = client.conn << OUTCOME_BITS
    for place in range(min(client.outcomes, rows.OUTCOMES_KEPT)):
        yield (rows.OUTCOME, first + place), None
