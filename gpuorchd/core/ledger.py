"""Who has how much of which GPU: the only place where claims change.

Every sum that admission needs is kept as claims change, so that asking costs the same however
many leases there are. Per GPU and holder (a process over all its connections) three figures are
kept: what its live leases claim, what its draining leases still keep, and what the newest reading
shows it to use. From these: `unmet_mb`, the bytes that are promised and not yet in use, which
have to stay free.

What can be had is the smaller of two views, so that nothing is counted twice and nothing is
missed: the ledger's (capacity less all claims) and the driver's (free memory less what is
promised and not yet used). A holder's own residue, bytes that it kept beyond its live leases, is
its to lease again: only while it lives, and only what no other process can be using still.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gpuorchd.core.model import (
    Device,
    Holder,
    Holding,
    Lease,
    LeaseState,
    Part,
    ProcessKey,
    ProcessUse,
    Reading,
)
from gpuorchd.core.state import State

NOTHING = Holding()


class Room(NamedTuple):
    """What one holder could lease on one GPU, by both views. MiB."""

    ledger_mb: int
    driver_mb: int
    # The figure that counts: the smaller of the two, and never less than nothing.
    mb: int


def room(state: State, device: Device, process: ProcessKey) -> Room:
    """Compute what the holder `process` could lease on `device` now.

    The reading has to be fresh: the caller has checked that. Nothing is reserved by asking.
    """
    ledger_mb = device.capacity_mb - device.claim_mb - device.draining_mb
    if device.facts.drain_ns is not None:
        return Room(ledger_mb, ledger_mb, ledger_mb)
    holder = state.holders.get(process)
    own = device.holdings.get(process)
    if own is None:
        own = NOTHING if holder else Holding(used_mb=use_of(state, device, process))
    assert device.reading is not None, "room on a GPU that was never read"
    used_mb = own.used_mb or 0
    free_mb = device.reading.free_mb - (device.unmet_mb - own.unmet_mb)
    residue_mb = residue(device, holder) if own.draining_mb else 0
    # A process may lease what it holds already even where others' promises leave nothing free.
    ledger_mb += residue_mb
    driver_mb = max(0, free_mb) + used_mb - own.claim_mb - (own.draining_mb - residue_mb)
    return Room(ledger_mb, driver_mb, max(0, min(ledger_mb, driver_mb)))


def residue(device: Device, holder: Holder | None) -> int:
    """Sum what a holder may lease again of its own draining leases on `device`."""
    if holder is None:
        return 0
    return sum(
        part.claim_mb for _, part in _residues(holder) if part.device.facts.uuid == device.uuid
    )


def _residues(holder: Holder) -> Iterator[tuple[Lease, Part]]:
    """The draining parts that nobody but their holder itself can be using."""
    if not holder.alive:
        # What a dead process used may be in use until a reading, or its last process, says no.
        return
    for lease in holder.leases.values():
        if lease.state is LeaseState.DRAINING and not lease.others:
            for part in lease.parts:
                if part.claim_mb:
                    yield lease, part


def strays_mb(state: State, device: Device, process: ProcessKey) -> int | None:
    """Sum what processes other than `process` use on `device` that have no lease there.

    None where the driver does not say how much one of them uses.
    """
    if device.reading is None:
        return 0
    total = 0
    services = services_in(state, device, device.reading)
    for use in device.reading.processes:
        holder = owner(state, device, use, services)
        if use.process == process:
            continue
        if holder is not None and (holder.process == process or claims(device, holder.process)):
            continue
        if use.used_mb is None:
            return None
        total += use.used_mb
    return total


def is_untold(device: Device) -> bool:
    """Whether the newest reading shows a process and not what it uses."""
    reading = device.reading
    return reading is not None and any(use.used_mb is None for use in reading.processes)


def claims(device: Device, process: ProcessKey) -> bool:
    """Whether a process has a lease on `device`, be it one that drains."""
    holding = device.holdings.get(process)
    return holding is not None and (holding.claim_mb or holding.draining_mb) > 0


def adopts(device: Device, holder: Holder) -> bool:
    """Whether a first lease of `holder` on `device` makes what strangers used there a lease's."""
    if claims(device, holder.process):
        return False
    if holder.process in device.holdings:
        return True
    unit, reading = holder.unit, device.reading
    return (
        unit is not None
        and reading is not None
        and any(use.unit == unit for use in reading.processes)
    )


def reachable_mb(device: Device, process: ProcessKey) -> int:
    """Compute what `process` could have on `device` if all leases there ended.

    The memory of who has a lease there counts as back then, all of it; a stranger's does not.
    """
    if device.reading is None:
        return device.capacity_mb
    total = device.reading.free_mb
    for key, holding in device.holdings.items():
        if key == process or holding.claim_mb or holding.draining_mb:
            if holding.used_mb is None:
                return device.capacity_mb
            total += holding.used_mb
    return min(total, device.capacity_mb)


def unleased_mb(device: Device) -> int | None:
    """Memory in use outside any lease, None where there is no reading to tell."""
    if device.facts.drain_ns is not None:
        return 0
    if device.reading is None:
        return None
    leased = 0
    for holding in device.holdings.values():
        leased += min(holding.used_mb or 0, holding.claim_mb + holding.draining_mb)
    return max(0, device.reading.used_mb - leased)


# The agents that are alone in their system services, as far as they hold leases on one GPU.
Services = dict[str, Holder]


def owner(
    state: State, device: Device, use: ProcessUse, services: Services | None = None
) -> Holder | None:
    """Find whose use this is: its own, that of the lease it was seen in, or an ancestor's.

    One that was seen in a lease stays with it when it connects itself, until it has a lease of its
    own there. A process of a system service counts to the one agent that holds leases in that
    service; `services` is that for a whole reading, where many are asked about.
    """
    holder = state.holders.get(use.process)
    if holder is not None and claims(device, use.process):
        return holder
    seen = state.watched.get(use.process)
    if seen:
        here = next((lease for name, lease in seen.items() if name in device.parts), None)
        if here is not None:
            return here.holder
        if holder is None:
            return next(iter(seen.values())).holder
    if holder is None and use.process in device.ended:
        return state.holders.get(device.ended[use.process])
    return holder or ancestor(state, device, use, services)


def ancestor(
    state: State, device: Device, use: ProcessUse, services: Services | None = None
) -> Holder | None:
    """Find the holder that a process descends from, or shares a system service with, alone.

    None for a holder's own main process.
    """
    holders = state.holders
    if use.process in holders:
        return None
    for parent in use.ancestors:
        holder = holders.get(parent)
        if holder is not None:
            return holder
    if use.unit is None:
        return None
    if services is None:
        services = sole_agents(state, device)
    return services.get(use.unit)


def services_in(state: State, device: Device, reading: Reading) -> Services:
    """Find who is alone in a service, where a reading shows any process of one."""
    if any(use.unit is not None for use in reading.processes):
        return sole_agents(state, device)
    return {}


def sole_agents(state: State, device: Device) -> Services:
    """Find the holder of each system service in which one agent alone holds leases, some here.

    Of several, the one with the oldest lease here, so that it does not depend on who came first.
    """
    found: dict[str, Lease] = {}
    agents: dict[str, str | None] = {}
    for lease in state.leases.values():
        unit = lease.holder.unit
        if unit is None:
            continue
        agent = lease.ask.agent
        if agents.setdefault(unit, agent) != agent:
            # More than one: nobody can tell whose its processes are.
            agents[unit] = None
        if lease.lease_id in device.parts and (
            unit not in found or lease.number < found[unit].number
        ):
            found[unit] = lease
    return {unit: lease.holder for unit, lease in found.items() if agents[unit] is not None}


def use_of(state: State, device: Device, process: ProcessKey) -> int:
    """What a process that holds nothing yet is seen to use, with its descendants."""
    if device.reading is None:
        return 0
    total = 0
    services = services_in(state, device, device.reading)
    for use in device.reading.processes:
        if use.process == process or (
            process in use.ancestors and owner(state, device, use, services) is None
        ):
            total += use.used_mb or 0
    return total


def take(lease: Lease, part: Part) -> list[Lease]:
    """Book a granted part: its claim, and what counts against the agent's cap.

    Bytes of the holder's own draining leases go over into the new claim; the leases that gave some
    are returned.
    """
    device = part.device
    gave: list[Lease] = []
    if device.facts.drain_ns is None:
        gave = _absorb(lease.holder, device, part.claim_mb)
    holding = device.holdings.get(lease.holder.process)
    if holding is None:
        holding = device.holdings[lease.holder.process] = Holding()
    unmet_mb = holding.unmet_mb
    holding.claim_mb += part.claim_mb
    device.claim_mb += part.claim_mb
    device.unmet_mb += holding.unmet_mb - unmet_mb
    device.parts[lease.lease_id] = part
    agent = lease.ask.agent
    device.charges[agent] = device.charges.get(agent, 0) + part.charge_mb
    return gave


def rebook(lease: Lease, part: Part, *, whole: bool) -> None:
    """Book a part of a recorded lease as it stood: claimed, draining, or back already."""
    if not part.claim_mb:
        return
    device = part.device
    process = lease.holder.process
    holding = device.holdings.get(process)
    if holding is None:
        holding = device.holdings[process] = Holding()
    unmet_mb = holding.unmet_mb
    if lease.state is LeaseState.DRAINING:
        holding.draining_mb += part.claim_mb
        device.draining_mb += part.claim_mb
    else:
        holding.claim_mb += part.claim_mb
        device.claim_mb += part.claim_mb
        agent = lease.ask.agent
        device.charges[agent] = device.charges.get(agent, 0) + part.charge_mb
    device.unmet_mb += holding.unmet_mb - unmet_mb
    device.parts[lease.lease_id] = part
    if whole:
        device.exclusive = lease.lease_id


def begin_drain(lease: Lease, part: Part) -> None:
    """Move a part's bytes from claimed to draining; the agent's cap is free of it at once.

    So is the rest of a GPU that was taken whole: what is not back yet is kept like any bytes.
    """
    device = part.device
    if device.exclusive == lease.lease_id:
        device.exclusive = None
    holding = device.holdings[lease.holder.process]
    holding.claim_mb -= part.claim_mb
    holding.draining_mb += part.claim_mb
    device.claim_mb -= part.claim_mb
    device.draining_mb += part.claim_mb
    agent = lease.ask.agent
    charge_mb = device.charges[agent] - part.charge_mb
    if charge_mb:
        device.charges[agent] = charge_mb
    else:
        del device.charges[agent]


def give_back(lease: Lease, part: Part, amount_mb: int) -> None:
    """Free `amount_mb` of a draining part."""
    device = part.device
    holding = device.holdings[lease.holder.process]
    unmet_mb = holding.unmet_mb
    part.claim_mb -= amount_mb
    holding.draining_mb -= amount_mb
    device.draining_mb -= amount_mb
    device.unmet_mb += holding.unmet_mb - unmet_mb
    if part.claim_mb == 0:
        device.parts.pop(lease.lease_id, None)
        _tidy(device, lease.holder.process, holding)


def set_use(device: Device, process: ProcessKey, used_mb: int | None) -> None:
    """Note what the newest reading attributes to a holder."""
    holding = device.holdings.get(process)
    if holding is None:
        if used_mb == 0:
            return
        holding = device.holdings[process] = Holding()
    unmet_mb = holding.unmet_mb
    holding.used_mb = used_mb
    device.unmet_mb += holding.unmet_mb - unmet_mb
    _tidy(device, process, holding)


def move_use(device: Device, use: ProcessUse, giver: Holder | None, taker: Holder) -> None:
    """Attribute what a process uses to another holder."""
    if giver is not None:
        giving = device.holdings.get(giver.process, NOTHING).used_mb
        if giving is not None and use.used_mb is not None:
            set_use(device, giver.process, max(0, giving - use.used_mb))
    so_far_mb = device.holdings.get(taker.process, NOTHING).used_mb
    unknown = so_far_mb is None or use.used_mb is None
    set_use(device, taker.process, None if unknown else (so_far_mb or 0) + (use.used_mb or 0))


def forget(device: Device, process: ProcessKey) -> bool:
    """Drop a holder's figures: it holds nothing and has no connection left. Say if it had any."""
    holding = device.holdings.pop(process, None)
    assert holding is None or not (holding.claim_mb or holding.draining_mb), "forgot a live holding"
    return holding is not None


def _tidy(device: Device, process: ProcessKey, holding: Holding) -> None:
    # What is not known is not nothing: it stays.
    if not (holding.claim_mb or holding.draining_mb) and holding.used_mb == 0:
        del device.holdings[process]


def _absorb(holder: Holder, device: Device, amount_mb: int) -> list[Lease]:
    holding = device.holdings.get(holder.process)
    gave: list[Lease] = []
    if holding is None or not holding.draining_mb:
        return gave
    for old, part in _residues(holder):
        if part.device is device and amount_mb:
            moved_mb = min(part.claim_mb, amount_mb)
            give_back(old, part, moved_mb)
            amount_mb -= moved_mb
            gave.append(old)
    return gave
