"""What each lease uses of its bytes: no decision depends on it, people want to see it."""

from __future__ import annotations

from gpuorchd.core.model import Device, DeviceUuid, Holder, Lease, LeaseId, Part
from gpuorchd.core.placement import unreadable
from gpuorchd.core.state import State


class UsedByLease:
    """What each lease uses at one moment, by the newest readings; for those who look.

    A reading tells what a process uses on a GPU, not for which of its leases: with several, the
    older ones are filled first and the newest has what is left.
    """

    def __init__(self, state: State, now_ns: int) -> None:
        self._state = state
        self._now_ns = now_ns
        self._known: dict[tuple[DeviceUuid, int], dict[LeaseId, int] | None] = {}

    def of(self, lease: Lease) -> int | None:
        """Sum the use of one lease over its GPUs, None where a part of it is unknown."""
        total = 0
        for part in lease.parts:
            used_mb = self._part(lease, part)
            if used_mb is None:
                return None
            total += used_mb
        return total

    def _part(self, lease: Lease, part: Part) -> int | None:
        device = part.device
        if device.facts.drain_ns is not None:
            return part.claim_mb
        if unreadable(self._state, device, self._now_ns) is not None:
            return None
        key = (device.uuid, id(lease.holder))
        if key not in self._known:
            self._known[key] = _shared_out(device, lease.holder)
        shares = self._known[key]
        return None if shares is None else shares.get(lease.lease_id, 0)


def _shared_out(device: Device, holder: Holder) -> dict[LeaseId, int] | None:
    holding = device.holdings.get(holder.process)
    left_mb = 0 if holding is None else holding.used_mb
    if left_mb is None:
        return None
    shares: dict[LeaseId, int] = {}
    newest: LeaseId | None = None
    for lease in sorted(holder.leases.values(), key=lambda x: x.number):
        for part in lease.parts:
            if part.device is device and part.claim_mb:
                shares[lease.lease_id] = min(left_mb, part.claim_mb)
                left_mb -= shares[lease.lease_id]
                newest = lease.lease_id
    if newest is not None:
        shares[newest] += left_mb
    return shares
