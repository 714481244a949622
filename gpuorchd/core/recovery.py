"""Going on where an earlier daemon was: its state from the rows, its clients where they are.

A connection that is still there goes on as if nothing had been. One that was lost although its
process may live leaves its leases detached: they keep their bytes, and their owner may reattach
them from a new connection until the grace is over or its process ends. All other connections have
ended, and their leases drain like any others. Requests whose answer may be lost can come again:
they are answered as they were the first time and done no second time.
"""

from __future__ import annotations

from gpuorchd.core import drain, leases, ledger
from gpuorchd.core.effects import (
    Answer,
    AnswerDenial,
    AnswerError,
    AnswerGrant,
    AnswerPolicy,
    Effect,
    TakeReading,
    WatchProcess,
)
from gpuorchd.core.events import ReattachAsked, RequestRepeated, Restored, Settled
from gpuorchd.core.model import (
    Client,
    Code,
    Denial,
    Device,
    DeviceFacts,
    Holder,
    Lease,
    LeaseId,
    LeaseState,
    Note,
    Part,
    Peer,
    Priority,
    ProcessKey,
    Reason,
    Refusal,
    RequestId,
    Waiter,
)
from gpuorchd.core.rows import ClientRow, LeaseRow, OutcomeRow, PartRow, WaiterRow
from gpuorchd.core.state import State


def rebuild(state: State, event: Restored, now_ns: int, out: list[Effect]) -> None:
    """Put the recorded state together, as if every connection were still there.

    GPUs count as absent until they are found again. Every lease with a time limit gets the grace
    at least, because nobody could renew it meanwhile.
    """
    kept = event.kept
    for row in kept.devices:
        facts = DeviceFacts(*row)
        cordon = state.cordons.get(facts.uuid)
        state.devices[facts.uuid] = Device(facts, present=False, cordon=cordon)
        state.changed_devices.add(facts.uuid)
    for client in kept.clients:
        _rebuild_client(state, client, out)
    for lease in kept.leases:
        _rebuild_lease(state, lease, now_ns + event.grace_ns, out)
    for waiter in kept.waiters:
        _rebuild_waiter(state, waiter)
    for outcome in kept.outcomes:
        _recall(state, outcome)
    if event.settled is not None:
        _recall_settled(state, event.settled)
    state.granted_total, state.queued_total, state.expired_total = kept.totals
    state.unsettled = state.upheaval = True
    if any(lease.state is LeaseState.DRAINING for lease in state.leases.values()):
        out.append(TakeReading())


def fates(state: State, event: Restored) -> tuple[list[Client], list[Client]]:
    """Tell the connections that are gone for good from those whose owners may come back."""
    ended: list[Client] = []
    lost: list[Client] = []
    for client in state.clients.values():
        if client.conn not in event.attached:
            (lost if client.conn in event.lost else ended).append(client)
    return ended, lost


def detach(state: State, client: Client, due_ns: int) -> None:
    """Let the leases of a lost connection wait for their owner until `due_ns`."""
    for request in tuple(client.requests.values()):
        assert isinstance(request, Lease), "waits of a lost connection end before"
        request.state = LeaseState.DETACHED
        del client.requests[leases.request_key(request)]
        state.deadlines.set((leases.DETACH, request.lease_id), due_ns)
        state.changed_leases[request.number] = request
        leases.settle_holding(state, client)


def tell_owners(state: State, now_ns: int, out: list[Effect]) -> None:
    """Say again what an earlier daemon may not have got to say, and ask back what has to be.

    Nobody can tell whether the owner of a lease that is asked back has heard of it. And SAFE_MODE
    may be on since nobody was there to ask for anything.
    """
    for lease in tuple(state.leases.values()):
        if lease.state is LeaseState.DRAINING:
            continue
        due_ns = state.deadlines.due_ns((leases.REVOKE, lease.lease_id))
        if state.safe_mode:
            grace_ns = state.policy.safe_mode_grace_ns
            leases.ask_back(state, lease, Note.SAFE_MODE.value, grace_ns, now_ns, out)
        same = state.deadlines.due_ns((leases.REVOKE, lease.lease_id)) == due_ns
        if same and lease.state is LeaseState.REVOKING:
            leases.tell_revoking(state, lease, now_ns, out)


def detached_of(state: State, process: ProcessKey) -> list[Lease]:
    """List the detached leases of a process."""
    holder = state.holders.get(process)
    if holder is None:
        return []
    return [x for x in holder.leases.values() if x.state is LeaseState.DETACHED]


def reattach(state: State, event: ReattachAsked, now_ns: int, out: list[Effect]) -> None:
    """Give a detached lease back to its owner on the connection that asks."""
    client = state.clients[event.conn]
    by_digest = state.tokens.get(event.digest)
    lease = by_digest or state.tokens.get(event.token)
    if lease is not None and lease.expires_ns is not None and lease.expires_ns <= now_ns:
        leases.expire(state, lease, now_ns, out)
        lease = None
    if lease is None:
        message = "no lease with this token waits for its owner"
        refusal = Refusal(Code.UNKNOWN_TOKEN, message, "token")
    elif lease.state is not LeaseState.DETACHED:
        refusal = Refusal(Code.NOT_OWNER, "the lease is held by a connection", "token")
    elif lease.holder is not client.holder or lease.uid != client.peer.uid:
        refusal = Refusal(Code.NOT_OWNER, "the lease belongs to another process", "token")
    else:
        if by_digest is not None:
            del state.tokens[event.digest]
            lease.token = event.token
            state.tokens[event.token] = lease
        state.deadlines.drop((leases.DETACH, lease.lease_id))
        revoked = state.deadlines.due_ns((leases.REVOKE, lease.lease_id)) is not None
        lease.state = LeaseState.REVOKING if revoked else LeaseState.ACTIVE
        lease.conn = event.conn
        lease.request_id = event.request_id
        begin_holding(state, client)
        client.requests[leases.request_key(lease)] = lease
        state.changed_leases[lease.number] = lease
        out.append(AnswerGrant(lease))
        if revoked:
            leases.tell_revoking(state, lease, now_ns, out)
        return
    out.append(AnswerError(event.conn, event.request_id, refusal))


def repeat(state: State, event: RequestRepeated, out: list[Effect]) -> None:
    """Answer a request as it was answered before; one that still waits keeps its place."""
    client = state.clients[event.conn]
    assert client.repeats is not None, "a repeat on a connection that has none"
    state.unrepeated.discard((event.conn, event.request_id))
    answer = client.repeats.pop(event.request_id)
    if answer is not None:
        out.append(answer)
        return
    request = client.requests.get(event.request_id)
    if isinstance(request, Lease):
        out.append(AnswerGrant(request))


def hold_back(state: State, effects: list[Effect]) -> list[Effect]:
    """Keep the answers to requests that have not been asked again; return all other effects."""
    kept: list[Effect] = []
    for effect in effects:
        held = False
        if isinstance(effect, AnswerDenial | AnswerError):
            held = (effect.conn, effect.request_id) in state.unrepeated
            client = state.clients.get(effect.conn)
            if held and client is not None and client.repeats is not None:
                client.repeats[effect.request_id] = effect
        elif isinstance(effect, AnswerGrant):
            held = (effect.lease.conn, effect.lease.request_id) in state.unrepeated
        if not held:
            kept.append(effect)
    return kept


def forget(state: State, client: Client) -> None:
    """Await nothing more of a connection that has ended."""
    if client.repeats:
        for request_id in client.repeats:
            assert request_id is None or isinstance(request_id, int | str)
            state.unrepeated.discard((client.conn, request_id))


def begin_holding(state: State, client: Client) -> None:
    """Count a connection in that is about to hold or await its first lease."""
    if not client.requests:
        uid = client.peer.uid
        state.holding_clients += 1
        state.holders_by_uid[uid] = state.holders_by_uid.get(uid, 0) + 1


def _holder(state: State, process: ProcessKey, unit: str | None, out: list[Effect]) -> Holder:
    holder = state.holders.get(process)
    if holder is None:
        holder = state.holders[process] = Holder(process, unit, alive=True)
        out.append(WatchProcess(process))
    return holder


def _rebuild_client(state: State, row: ClientRow, out: list[Effect]) -> None:
    holder = _holder(state, row.process, row.unit, out)
    holder.clients += 1
    peer = Peer(row.process, row.uid, row.gid, row.unit)
    state.clients[row.conn] = Client(
        row.conn, peer, holder, sealed=row.sealed, signal=row.signal, seal_told=row.seal_told
    )
    state.clients[row.conn].repeats = {}
    state.changed_clients[row.conn] = state.clients[row.conn]


def _rebuild_lease(state: State, row: LeaseRow, least_ns: int, out: list[Effect]) -> None:
    parts = tuple(
        Part(_device(state, part), part.memory_mb, part.claim_mb, part.charge_mb)
        for part in row.parts
    )
    lease = Lease(
        LeaseId(row.lease_id),
        row.number,
        row.token,
        row.conn,
        row.request_id,
        row.ask,
        _holder(state, row.process, row.unit, out),
        row.uid,
        Priority(row.priority),
        parts,
        row.granted_ns,
        row.granted_unix_ns,
        row.waited_ns,
        None if row.expires_ns is None else max(row.expires_ns, least_ns),
        LeaseState(row.state),
        row.ended_ns,
        row.revoke_reason,
        row.withheld,
    )
    state.leases[lease.lease_id] = lease
    state.changed_leases[lease.number] = lease
    lease.holder.leases[lease.lease_id] = lease
    for part in parts:
        ledger.rebook(lease, part, whole=row.whole)
    for process in row.others:
        lease.others = lease.others or set()
        lease.others.add(process)
        if process not in state.watched:
            state.watched[process] = {}
            out.append(WatchProcess(process))
        state.watched[process][lease.lease_id] = lease
    if lease.state is LeaseState.DRAINING:
        _set_drain(state, lease)
    else:
        _set_live(state, lease, row.revoke_ns, least_ns)


def _device(state: State, part: PartRow) -> Device:
    device = state.devices.get(part.uuid)
    if device is None:
        assert not part.claim_mb, "bytes are booked on a GPU that was forgotten"
        # Only its name is still wanted.
        device = Device(DeviceFacts(part.uuid, part.place, "", 0), present=False)
    return device


def _set_live(state: State, lease: Lease, revoke_ns: int | None, detached_ns: int) -> None:
    state.tokens[lease.token] = lease
    state.live_leases += 1
    uid = lease.uid
    state.leases_by_uid[uid] = state.leases_by_uid.get(uid, 0) + 1
    if lease.expires_ns is not None:
        state.deadlines.set((leases.TTL, lease.lease_id), lease.expires_ns)
    if revoke_ns is not None:
        state.deadlines.set((leases.REVOKE, lease.lease_id), revoke_ns)
    if lease.state is LeaseState.DETACHED:
        # Its owner has not come back yet, and has the whole grace with this daemon again.
        state.deadlines.set((leases.DETACH, lease.lease_id), detached_ns)
        return
    client = state.clients[lease.conn]
    begin_holding(state, client)
    client.requests[leases.request_key(lease)] = lease
    _allow_repeat(client, lease.request_id, None)


def _set_drain(state: State, lease: Lease) -> None:
    timed_ns = [x.device.facts.drain_ns for x in lease.parts if x.claim_mb]
    longest_ns = max((x for x in timed_ns if x is not None), default=0)
    timeout_ns = state.policy.drain_timeout_ns
    if longest_ns:
        state.deadlines.set((drain.DRAINED, lease.lease_id), lease.ended_ns + longest_ns)
    if not lease.withheld and (None in timed_ns or longest_ns > timeout_ns):
        state.deadlines.set((drain.OVERDUE, lease.lease_id), lease.ended_ns + timeout_ns)


def _rebuild_waiter(state: State, row: WaiterRow) -> None:
    client = state.clients[row.conn]
    waiter = Waiter(
        row.number,
        row.token,
        row.conn,
        row.request_id,
        row.ask,
        client.holder,
        Priority(row.priority),
        row.queued_ns,
        row.deadline_ns,
    )
    begin_holding(state, client)
    client.requests[leases.request_key(waiter)] = waiter
    state.queue.add(waiter)
    state.waiters[waiter.number] = waiter
    state.changed_waiters[waiter.number] = waiter
    uid = client.peer.uid
    state.waiting_by_uid[uid] = state.waiting_by_uid.get(uid, 0) + 1
    state.deadlines.set((leases.WAIT, waiter.number), waiter.deadline_ns)
    if waiter.request_id is not None:
        _allow_repeat(client, waiter.request_id, None)
        state.unrepeated.add((client.conn, waiter.request_id))


def _recall(state: State, row: OutcomeRow) -> None:
    client = state.clients.get(row.conn)
    if client is None:
        return
    client.outcomes = max(client.outcomes, row.number + 1)
    _allow_repeat(client, row.request_id, _answer_of(row))


def _recall_settled(state: State, settled: Settled) -> None:
    client = state.clients.get(settled.conn)
    if client is None or settled.epoch != state.settings.epoch:
        return
    assert client.repeats is not None
    if settled.request_id not in client.repeats:
        if settled.answer is None:
            answer: Effect = AnswerPolicy(settled.conn, settled.request_id)
        else:
            answer = Answer(settled.conn, settled.request_id, settled.answer)
        client.repeats[settled.request_id] = answer


def _answer_of(row: OutcomeRow) -> Effect:
    said = row.said
    if row.kind == "answer":
        assert isinstance(said, dict)
        return Answer(row.conn, row.request_id, said)
    if row.kind == "policy":
        assert said is None or isinstance(said, str)
        return AnswerPolicy(row.conn, row.request_id, said)
    assert isinstance(said, list)
    agent, note, told, eta_ns, waited_ns = said
    reasons = tuple(Reason(index, Note(name), detail) for index, name, detail in told)
    denial = Denial(Note(note), reasons, final=True, eta_ns=eta_ns)
    return AnswerDenial(row.conn, row.request_id, agent, denial, waited_ns)


def _allow_repeat(client: Client, request_id: RequestId, answer: Effect | None) -> None:
    assert client.repeats is not None
    if request_id is not None:
        client.repeats[request_id] = answer
