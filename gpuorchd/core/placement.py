"""Where a request goes, or why it goes nowhere: the one decision behind `lease` and `explain`.

`place` looks and changes nothing. Each GPU either offers room or names the first obstacle; enough
room makes a `Plan`, else the obstacles make a `Denial` whose note is the first, in order of
precedence, that leaves fewer GPUs than were asked for. Among GPUs with room the fullest that
still fits is taken, so that whole GPUs stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gpuorchd.core import forecast, ledger
from gpuorchd.core.model import (
    Ask,
    Code,
    Denial,
    Device,
    DeviceUuid,
    Note,
    Peer,
    ProcessKey,
    Reason,
    Refusal,
)
from gpuorchd.core.state import State

# Obstacles in the order in which they decide what a denial is called.
RANKED = (
    Note.QUOTA,
    Note.CORDONED,
    Note.UNHEALTHY,
    Note.RESERVED,
    Note.INSUFFICIENT_MEMORY,
)
# What a request behind others waits for: memory. Every other obstacle reserves nothing.
MEMORY_NOTES = frozenset({Note.RESERVED, Note.INSUFFICIENT_MEMORY})

NOBODY: frozenset[DeviceUuid] = frozenset()


class Plan(NamedTuple):
    """The GPUs for a request, and per GPU what the lease may use and what counts to its cap."""

    devices: tuple[Device, ...]
    memory_mb: tuple[int, ...]
    charge_mb: tuple[int, ...]
    exclusive: bool


class Want(NamedTuple):
    """A request as policy reads it, for one holder at one moment."""

    agent: str
    process: ProcessKey
    memory_mb: int
    whole: bool
    # The card counts against its cap, not what was asked for: it chose to have all of it, where it
    # could have had less.
    charged_whole: bool
    cap_mb: int
    now_ns: int
    # Whether a denial says when room is to be expected, which costs more than to find it out.
    estimate: bool


class Offer(NamedTuple):
    """Room on one GPU: what the lease gets there, its charge, and how much room there is."""

    device: Device
    memory_mb: int
    charge_mb: int
    room_mb: int


class Obstacle(NamedTuple):
    """Why one GPU offers nothing.

    `never` is True where waiting cannot help. `foreign`: no end of a lease would, but that of a
    process outside the system; nobody is kept from the rest of the GPU for that.
    """

    device: Device
    note: Note
    detail: str
    never: bool = False
    foreign: bool = False


def refuse(state: State, peer: Peer, ask: Ask) -> Refusal | None:
    """Find what makes a request an error: a name that is not the peer's, a GPU not there."""
    refusal = bound_to_others(state, peer, ask)
    if refusal is not None:
        return refusal
    if ask.devices and state.order and not state.safe_mode:
        for name in ask.devices:
            if find(state, name) is None:
                return Refusal(Code.NOT_FOUND, f"no GPU {name!r} here; see gpu_info", "devices")
    return None


def bound_to_others(state: State, peer: Peer, ask: Ask) -> Refusal | None:
    """Refuse a name that policy keeps for others."""
    if state.policy.rule(ask.agent).admits(peer):
        return None
    unit = peer.unit or "none"
    return Refusal(
        Code.FORBIDDEN,
        f"agent {ask.agent!r} is bound to other users or units by policy"
        f" (this peer: uid {peer.uid}, system unit {unit})",
        "agent",
    )


def find(state: State, name: str | int) -> Device | None:
    """Find a present GPU by uuid or index."""
    for device in state.order:
        if name == device.facts.uuid or name == device.facts.index:
            return device
    return None


def place(
    state: State,
    ask: Ask,
    process: ProcessKey,
    now_ns: int,
    taken: frozenset[DeviceUuid] = NOBODY,
    *,
    estimate: bool = True,
) -> Plan | Denial:
    """Decide one request of a holder. Others have first claim to the GPUs in `taken`.

    Without `estimate` a denial has no `eta_ns`: for those who only ask whether.
    """
    policy = state.policy
    rule = policy.rule(ask.agent)
    hopeless = _host_obstacle(state, ask, gpu_allowed=rule.gpu)
    if hopeless is not None:
        return hopeless
    memory_mb = policy.asked_mb(rule, ask.memory_mb, exclusive=ask.exclusive)
    want = Want(
        ask.agent,
        process,
        memory_mb,
        ask.exclusive or not policy.allow_fractional_shares,
        ask.exclusive and policy.allow_fractional_shares,
        policy.cap_mb(rule),
        now_ns,
        estimate,
    )
    offers: list[Offer] = []
    obstacles: list[Obstacle] = []
    for device in _candidates(state, ask):
        found = _examine(state, device, want, taken)
        if isinstance(found, Offer):
            offers.append(found)
        else:
            obstacles.append(found)
    if len(offers) < ask.gpus:
        return _deny(state, ask, want, offers, obstacles)
    if len(offers) > ask.gpus:
        offers.sort(key=_tightness)
        del offers[ask.gpus :]
    return Plan(
        tuple(offer.device for offer in offers),
        tuple(offer.memory_mb for offer in offers),
        tuple(offer.charge_mb for offer in offers),
        want.whole,
    )


def shape(state: State, ask: Ask, process: ProcessKey) -> object:
    """Name what `place` looks at in a request besides its bytes, the same for requests alike.

    Of two requests with one shape, the one for more bytes gets no more, and keeps no other GPUs
    from those behind it. Who holds nothing and has no cap is like anybody else.
    """
    policy = state.policy
    rule = policy.rule(ask.agent)
    whole = ask.exclusive or not policy.allow_fractional_shares
    holds = any(
        process in device.holdings or (whole and ledger.is_untold(device)) for device in state.order
    )
    return (
        id(rule),
        ask.agent if policy.cap_mb(rule) else None,
        process if holds else None,
        # The default is one amount for all who name none.
        ask.memory_mb == 0,
        ask.gpus,
        ask.exclusive,
        ask.devices,
    )


def chosen(state: State, ask: Ask) -> frozenset[DeviceUuid]:
    """Name the present GPUs that a request chooses from."""
    return frozenset(device.facts.uuid for device in _candidates(state, ask))


def closed(state: State, now_ns: int) -> frozenset[DeviceUuid]:
    """Name the present GPUs whose state serves nobody, and that nobody keeps from others."""
    return frozenset(
        device.facts.uuid
        for device in state.order
        if device.cordon is not None or unreadable(state, device, now_ns) is not None
    )


def _tightness(offer: Offer) -> tuple[int, int]:
    return offer.room_mb, offer.device.facts.index


def _candidates(state: State, ask: Ask) -> Iterable[Device]:
    if not ask.devices:
        return state.order
    names = ask.devices
    return [
        device
        for device in state.order
        if device.facts.uuid in names or device.facts.index in names
    ]


def _host_obstacle(state: State, ask: Ask, *, gpu_allowed: bool) -> Denial | None:
    if state.safe_mode:
        return _for_host(Note.SAFE_MODE, "SAFE_MODE is on: no GPU is used on this host", final=True)
    if not state.order:
        if state.probing:
            return _for_host(Note.NO_GPU, "the GPUs are still being looked for", final=False)
        return _for_host(Note.NO_GPU, state.unavailable or "this host has no GPU", final=True)
    if not gpu_allowed:
        return _for_host(Note.POLICY, f"policy keeps agent {ask.agent!r} on the CPU", final=True)
    return None


def _for_host(note: Note, detail: str, *, final: bool) -> Denial:
    return Denial(note, (Reason(None, note, detail),), final)


def _examine(
    state: State, device: Device, want: Want, taken: frozenset[DeviceUuid]
) -> Offer | Obstacle:
    capacity_mb = device.capacity_mb
    if capacity_mb < want.memory_mb:
        detail = f"{want.memory_mb} MiB asked, the whole GPU has {capacity_mb} MiB"
        return Obstacle(device, Note.INSUFFICIENT_MEMORY, detail, never=True)
    charge_mb = capacity_mb if want.charged_whole else want.memory_mb
    if want.cap_mb:
        obstacle = _over_cap(device, want, charge_mb)
        if obstacle is not None:
            return obstacle
    if device.cordon is not None:
        return Obstacle(device, Note.CORDONED, f"cordoned: {device.cordon or 'no reason given'}")
    sick = unreadable(state, device, want.now_ns)
    if sick is not None:
        return Obstacle(device, Note.UNHEALTHY, sick)
    room = ledger.room(state, device, want.process)
    blocked: str | None = None
    foreign = False
    if want.whole:
        blocked, foreign = _not_whole(state, device, want)
        memory_mb = room.mb
    else:
        memory_mb = want.memory_mb
        if device.exclusive is not None:
            blocked = f"taken whole by lease {device.exclusive}"
    if blocked is None and (room.mb < want.memory_mb or room.mb < 1):
        blocked = _short(device, want, room)
    if blocked is not None:
        least_mb = max(1, want.memory_mb)
        foreign = foreign or ledger.reachable_mb(device, want.process) < least_mb
        return Obstacle(device, Note.INSUFFICIENT_MEMORY, blocked, foreign=foreign)
    if device.facts.uuid in taken:
        return Obstacle(device, Note.RESERVED, "kept for requests that wait ahead of this one")
    return Offer(device, memory_mb, charge_mb, room.mb)


def _over_cap(device: Device, want: Want, charge_mb: int) -> Obstacle | None:
    if charge_mb > want.cap_mb:
        detail = f"{charge_mb} MiB asked, agent {want.agent!r} may have {want.cap_mb} MiB on a GPU"
        return Obstacle(device, Note.QUOTA, detail, never=True)
    held_mb = device.charges.get(want.agent, 0)
    if held_mb + charge_mb > want.cap_mb:
        detail = (
            f"{charge_mb} MiB asked and {held_mb} MiB held,"
            f" agent {want.agent!r} may have {want.cap_mb} MiB on a GPU"
        )
        return Obstacle(device, Note.QUOTA, detail)
    return None


def unreadable(state: State, device: Device, now_ns: int) -> str | None:
    """Say why nothing is known of a GPU's memory right now, None where something is."""
    if device.facts.drain_ns is not None:
        return None
    if device.failure is not None:
        return f"could not be read: {device.failure}"
    if device.reading is None:
        return "not read yet"
    age_ns = now_ns - device.reading_ns
    if age_ns > state.settings.reading_max_age_ns:
        return f"no reading for {age_ns / 1e9:.1f} s"
    return None


def _not_whole(state: State, device: Device, want: Want) -> tuple[str | None, bool]:
    """Say what keeps a GPU from being taken whole, and whether it is nobody's lease."""
    limit_mb = state.policy.exclusive_stray_mb
    strays_mb = ledger.strays_mb(state, device, want.process)
    foreign = strays_mb is None or strays_mb > limit_mb
    reusable_mb = 0
    if device.facts.drain_ns is None and device.draining_mb:
        reusable_mb = ledger.residue(device, state.holders.get(want.process))
    if device.claim_mb + device.draining_mb - reusable_mb:
        held = f"{device.claim_mb} MiB leased and {device.draining_mb} MiB draining"
        return f"wanted whole, {held}", foreign
    if strays_mb is None:
        return "wanted whole, a process outside the system uses memory nobody can tell", True
    if foreign:
        used = f"processes outside the system use {strays_mb} MiB (allowed {limit_mb} MiB)"
        return f"wanted whole, {used}", True
    return None, False


def _short(device: Device, want: Want, room: ledger.Room) -> str:
    parts = [f"{want.memory_mb} MiB asked, {room.mb} MiB to be had of {device.capacity_mb} MiB"]
    parts.append(f"{device.claim_mb} MiB leased")
    if device.draining_mb:
        parts.append(f"{device.draining_mb} MiB draining")
    if room.driver_mb < room.ledger_mb:
        parts.append(f"{ledger.unleased_mb(device)} MiB used outside leases")
    return ", ".join(parts)


def _deny(
    state: State, ask: Ask, want: Want, offers: list[Offer], obstacles: list[Obstacle]
) -> Denial:
    reasons = tuple(Reason(o.device.index, o.note, o.detail) for o in obstacles)
    possible = [o for o in obstacles if not o.never]
    if len(offers) + len(possible) < ask.gpus:
        note = next(
            (o.note for o in obstacles if o.never and o.note is Note.QUOTA),
            Note.INSUFFICIENT_MEMORY,
        )
        if len(offers) + len(obstacles) < ask.gpus:
            note = Note.INSUFFICIENT_MEMORY
            count = len(offers) + len(obstacles)
            detail = f"{ask.gpus} GPUs asked, {count} there to choose from"
            reasons = (Reason(None, note, detail), *reasons)
        return Denial(note, reasons, final=True)
    remaining = len(offers) + len(possible)
    note = Note.INSUFFICIENT_MEMORY
    for ranked in RANKED:
        remaining -= sum(1 for o in possible if o.note is ranked)
        if remaining < ask.gpus:
            note = ranked
            break
    if note not in MEMORY_NOTES:
        return Denial(note, reasons, final=False)
    waited_for = [offer.device for offer in offers]
    waited_for += [o.device for o in possible if o.note in MEMORY_NOTES and not o.foreign]
    if len(waited_for) < ask.gpus:
        # The end of all leases would not do: nobody is kept from anything meanwhile.
        return Denial(note, reasons, final=False)
    wanted = frozenset(device.facts.uuid for device in waited_for)
    eta_ns = None
    if want.estimate and note is Note.INSUFFICIENT_MEMORY:
        eta_ns = forecast.eta_ns(
            state, want.process, want.memory_mb, want.whole, waited_for, ask.gpus, want.now_ns
        )
    return Denial(note, reasons, final=False, eta_ns=eta_ns, wanted=wanted)
