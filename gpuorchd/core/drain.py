"""From the end of a lease to the return of its bytes, and the readings that prove it.

A draining lease keeps its bytes from others until there is proof: on a card that can be read, a
reading that started after the lease's end (it may free them in parts) or after the end of all of
its processes; where nothing can be read, the end of all of its processes alone; on a simulated
card, a set time. What a process keeps although its lease ended stays with it alone, and it may
lease it again. What is not back in time is reported and never handed out on hope.

Readings come in here too: they say what each holder uses, and which processes are a lease's.
"""

from __future__ import annotations

from gpuorchd.core import ledger
from gpuorchd.core.effects import (
    Announce,
    Effect,
    ForgetProcess,
    TakeReading,
    WatchProcess,
)
from gpuorchd.core.events import ReadingsTaken
from gpuorchd.core.model import (
    NS_PER_S,
    Client,
    ConnectionId,
    Device,
    Holder,
    Lease,
    LeaseState,
    Part,
    Peer,
    ProcessKey,
    Reading,
)
from gpuorchd.core.state import State

# Kinds of deadline: a simulated card's bytes are back; a drain takes too long.
DRAINED = "drained"
OVERDUE = "overdue"


def gpus(lease: Lease) -> list[dict[str, object]]:
    """The GPUs of a lease as events name them."""
    return [
        {"index": p.device.facts.index, "uuid": p.device.facts.uuid, "memory_mb": p.memory_mb}
        for p in lease.parts
    ]


def arrive(state: State, conn: ConnectionId, peer: Peer) -> None:
    """Note a connection that is about to ask, and the process behind it."""
    holder = state.holders.get(peer.process)
    if holder is None:
        holder = _take_in(state, peer)
    holder.clients += 1
    client = state.clients[conn] = Client(conn, peer, holder)
    state.changed_clients[conn] = client


def _take_in(state: State, peer: Peer) -> Holder:
    """Make a process a holder; what the newest readings show of it and its children is its own now.

    All else stays where the reading found it: who has died since is not looked for again.
    """
    moved = []
    for device in state.devices.values():
        for use in device.reading.processes if device.reading is not None else ():
            if peer.process == use.process or peer.process in use.ancestors:
                moved.append((device, use, ledger.owner(state, device, use)))
    holder = Holder(peer.process, peer.unit, peer.alive)
    state.holders[peer.process] = holder
    for device, use, before in moved:
        if ledger.owner(state, device, use) is holder:
            ledger.move_use(device, use, before, holder)
            state.unsettled = True
    return holder


def leave(state: State, client: Client, out: list[Effect]) -> None:
    """Forget a connection that has ended and holds nothing any more."""
    del state.clients[client.conn]
    state.changed_clients[client.conn] = client
    client.holder.clients -= 1
    _drop_holder(state, client.holder, out)


def begin(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    """Let the bytes of a lease that has just ended drain."""
    timed_ns = 0
    read = False
    for part in lease.parts:
        ledger.begin_drain(lease, part)
        drain_ns = part.device.facts.drain_ns
        if drain_ns is None:
            read = True
        elif drain_ns == 0:
            ledger.give_back(lease, part, part.claim_mb)
        else:
            timed_ns = drain_ns
    if not (read or timed_ns):
        _finish(state, lease, now_ns, out)
        return
    fields = {"lease_id": lease.lease_id, "agent": lease.ask.agent, "gpus": gpus(lease)}
    out.append(Announce("lease.draining", fields))
    timeout_ns = state.policy.drain_timeout_ns
    if timed_ns:
        state.deadlines.set((DRAINED, lease.lease_id), now_ns + timed_ns)
    if read or timed_ns > timeout_ns:
        state.deadlines.set((OVERDUE, lease.lease_id), now_ns + timeout_ns)
    if read:
        if not lease.gone_ns and not lease.holder.alive and not lease.others:
            lease.gone_ns = now_ns
        out.append(TakeReading())
        if lease.gone_ns:
            _settle_gone(state, lease, now_ns, out)


def timed_out(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    """Free the simulated parts of a lease: their time has come."""
    for part in lease.parts:
        if part.device.facts.drain_ns is not None and part.claim_mb:
            ledger.give_back(lease, part, part.claim_mb)
    state.unsettled = True
    state.changed_leases[lease.number] = lease
    finish_if_empty(state, lease, now_ns, out)


def overdue(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    """Report what has not come back in time.

    Where a reading shows it, it is from now on memory of a process outside any lease; where nothing
    can be read it stays withheld.
    """
    left = [part for part in lease.parts if part.claim_mb]
    lease.withheld = True
    state.changed_leases[lease.number] = lease
    pids = [lease.holder.process.pid] if lease.holder.alive else []
    pids += sorted(process.pid for process in lease.others or ())
    fields = {
        "lease_id": lease.lease_id,
        "agent": lease.ask.agent,
        "memory_mb": sum(part.claim_mb for part in left),
        "gpus": [
            {"index": p.device.index, "uuid": p.device.uuid, "memory_mb": p.claim_mb} for p in left
        ],
        "pids": pids,
    }
    out.append(Announce("lease.withheld", fields))
    for part in left:
        if _is_shown(state, lease, part, now_ns):
            ledger.give_back(lease, part, part.claim_mb)
        elif lease.gone_ns and part.device.facts.drain_ns is None:
            _free_unread(lease, part)
        state.unsettled = True
    if not any(part.claim_mb for part in lease.parts):
        state.deadlines.drop((DRAINED, lease.lease_id))
        _forget_lease(state, lease, out)


def process_ended(state: State, process: ProcessKey, now_ns: int, out: list[Effect]) -> None:
    """Take a dead process out of the leases it belonged to, and look at what it leaves."""
    touched = dict(state.watched.pop(process, {}))
    for lease in touched.values():
        if lease.others is not None:
            lease.others.discard(process)
            state.changed_leases[lease.number] = lease
        for part in lease.parts:
            part.device.ended[process] = lease.holder.process
    holder = state.holders.get(process)
    if holder is not None:
        holder.alive = False
        touched.update(holder.leases)
    read = False
    # What is left of a lease may be its holder's own now, to lease again.
    state.unsettled = state.unsettled or bool(touched)
    for lease in touched.values():
        if not lease.holder.alive and not lease.others:
            lease.gone_ns = now_ns
        if lease.state is LeaseState.DRAINING:
            read = True
            if lease.gone_ns:
                _settle_gone(state, lease, now_ns, out)
    if read:
        out.append(TakeReading())


def driver_closed(state: State, now_ns: int, out: list[Effect]) -> None:
    """Settle what no reading will settle any more: the leases whose processes are all gone."""
    for lease in tuple(state.leases.values()):
        if lease.state is LeaseState.DRAINING and lease.gone_ns:
            _settle_gone(state, lease, now_ns, out)


def take_readings(state: State, event: ReadingsTaken, now_ns: int, out: list[Effect]) -> None:
    """Use fresh readings: who uses what, and which draining bytes are back."""
    for uuid, reason in event.failures:
        device = state.devices.get(uuid)
        if device is not None:
            device.failure = reason
    touched: dict[str, Lease] = {}
    for reading in event.readings:
        device = state.devices.get(reading.uuid)
        if device is None or device.facts.drain_ns is not None:
            continue
        if device.reading is not None and event.started_ns < device.reading_ns:
            continue
        device.reading = reading
        device.ended.clear()
        device.reading_ns = event.started_ns
        device.failure = None
        _note_processes(state, device, reading, out)
        _attribute(state, device, reading)
        _free_drained(state, device, event.started_ns, touched)
    for lease in touched.values():
        state.changed_leases[lease.number] = lease
        finish_if_empty(state, lease, now_ns, out)
    state.unsettled = True


def _note_processes(state: State, device: Device, reading: Reading, out: list[Effect]) -> None:
    """Add the processes that a reading shows to the leases that they belong to."""
    services = ledger.services_in(state, device, reading)
    for use in reading.processes:
        holder = ledger.ancestor(state, device, use, services)
        if holder is None:
            continue
        seen = state.watched.get(use.process)
        for lease_id, lease in holder.leases.items():
            if lease_id not in device.parts or (seen is not None and lease_id in seen):
                continue
            if seen is None:
                seen = state.watched[use.process] = {}
                out.append(WatchProcess(use.process))
            seen[lease_id] = lease
            if lease.others is None:
                lease.others = set()
            lease.others.add(use.process)
            lease.gone_ns = 0
            state.changed_leases[lease.number] = lease


def _attribute(state: State, device: Device, reading: Reading) -> None:
    used: dict[ProcessKey, int | None] = dict.fromkeys(device.holdings, 0)
    services = ledger.services_in(state, device, reading)
    for use in reading.processes:
        holder = ledger.owner(state, device, use, services)
        if holder is None:
            continue
        so_far = used.get(holder.process, 0)
        unknown = so_far is None or use.used_mb is None
        used[holder.process] = None if unknown else (so_far or 0) + (use.used_mb or 0)
    for process, used_mb in used.items():
        ledger.set_use(device, process, used_mb)


def _free_drained(state: State, device: Device, started_ns: int, touched: dict[str, Lease]) -> None:
    """Free what a reading proves to be back on one GPU."""
    residues: dict[ProcessKey, int | None] = {}
    draining = [
        lease
        for lease in (state.leases[lease_id] for lease_id in device.parts)
        if lease.state is LeaseState.DRAINING
    ]
    for lease in draining:
        part = next(part for part in lease.parts if part.device is device)
        if lease.ended_ns > started_ns:
            continue
        process = lease.holder.process
        if lease.gone_ns and lease.gone_ns <= started_ns:
            keep_mb = 0
        else:
            if process not in residues:
                residues[process] = _residue_mb(device, process, draining, started_ns)
            residue_mb = residues[process]
            if residue_mb is None:
                continue
            keep_mb = min(part.claim_mb, residue_mb)
            residues[process] = residue_mb - keep_mb
        if lease.withheld:
            # It has been reported; what is left is now seen as its process's own.
            keep_mb = 0
        if keep_mb < part.claim_mb:
            ledger.give_back(lease, part, part.claim_mb - keep_mb)
            touched[lease.lease_id] = lease


def _residue_mb(
    device: Device, process: ProcessKey, draining: list[Lease], started_ns: int
) -> int | None:
    """What a holder uses beyond its live leases, and beyond those that ended after the reading."""
    holding = device.holdings[process]
    if holding.used_mb is None:
        return None
    later_mb = sum(
        part.claim_mb
        for lease in draining
        if lease.ended_ns > started_ns and lease.holder.process == process
        for part in lease.parts
        if part.device is device
    )
    return max(0, holding.used_mb - holding.claim_mb - later_mb)


def _settle_gone(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    """Free at once what no reading can prove, now that all of the lease's processes are gone."""
    freed = False
    for part in lease.parts:
        timed = part.device.facts.drain_ns is not None
        if part.claim_mb and not timed and not _readable(state, part.device, now_ns):
            _free_unread(lease, part)
            freed = True
    if freed:
        state.unsettled = True
        state.changed_leases[lease.number] = lease
        finish_if_empty(state, lease, now_ns, out)


def _free_unread(lease: Lease, part: Part) -> None:
    """Free bytes on the end of all processes alone; nothing is granted before the next reading."""
    device = part.device
    ledger.give_back(lease, part, part.claim_mb)
    if device.failure is None:
        device.failure = "not read since a lease's last process ended"


def _readable(state: State, device: Device, now_ns: int) -> bool:
    """Whether a fresh reading of this GPU can be expected."""
    if state.safe_mode or not device.present or device.failure is not None:
        return False
    return now_ns - device.reading_ns <= state.settings.reading_max_age_ns


def _is_shown(state: State, lease: Lease, part: Part, now_ns: int) -> bool:
    """Whether the newest reading counts these bytes as used, so that nobody else can get them."""
    device = part.device
    if device.facts.drain_ns is not None:
        return False
    holding = device.holdings[lease.holder.process]
    return (
        _readable(state, device, now_ns)
        and device.reading_ns >= lease.ended_ns
        and holding.used_mb is not None
    )


def finish_if_empty(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    """Forget a draining lease once it keeps nothing."""
    if lease.lease_id in state.leases and not any(part.claim_mb for part in lease.parts):
        state.deadlines.drop((DRAINED, lease.lease_id))
        state.deadlines.drop((OVERDUE, lease.lease_id))
        _finish(state, lease, now_ns, out)


def _finish(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    fields = {
        "lease_id": lease.lease_id,
        "agent": lease.ask.agent,
        "drain_s": (now_ns - lease.ended_ns) / NS_PER_S,
    }
    out.append(Announce("lease.drained", fields))
    _forget_lease(state, lease, out)


def _forget_lease(state: State, lease: Lease, out: list[Effect]) -> None:
    lease.state = LeaseState.FREED
    state.changed_leases[lease.number] = lease
    del state.leases[lease.lease_id]
    del lease.holder.leases[lease.lease_id]
    for process in lease.others or ():
        leases = state.watched.get(process)
        if leases is not None and leases.pop(lease.lease_id, None) is not None and not leases:
            del state.watched[process]
            if process not in state.holders:
                out.append(ForgetProcess(process))
    lease.others = None
    for part in lease.parts:
        device = part.device
        # A card that came back has a record of its own by now, which stays.
        if not device.present and not device.parts and state.devices.get(device.uuid) is device:
            del state.devices[device.uuid]
            state.changed_devices.add(device.uuid)
    _drop_holder(state, lease.holder, out)


def _drop_holder(state: State, holder: Holder, out: list[Effect]) -> None:
    if holder.clients or holder.leases:
        return
    del state.holders[holder.process]
    for device in state.devices.values():
        if ledger.forget(device, holder.process):
            state.unsettled = True
    if holder.process not in state.watched:
        out.append(ForgetProcess(holder.process))
