"""When a request may be served, by what holders said they need: an estimate, never a promise.

Only leases that gave `expected_s` are counted on. Where those do not make enough room, nothing is
said: no estimate is better than one made up.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpuorchd.core import ledger
from gpuorchd.core.model import Device, ProcessKey
from gpuorchd.core.state import State

# More leases than this on one GPU make the estimate cost more than it is worth.
LEASES_MAX = 256


def eta_ns(
    state: State,
    process: ProcessKey,
    memory_mb: int,
    whole: bool,
    devices: Sequence[Device],
    gpus: int,
    now_ns: int,
) -> int | None:
    """Estimate in how many nanoseconds `gpus` of `devices` have room, None where unknown."""
    moments = []
    for device in devices:
        moment = _device_ns(state, process, memory_mb, whole, device, now_ns)
        if moment is not None:
            moments.append(moment)
    if len(moments) < gpus:
        return None
    moments.sort()
    return max(0, moments[gpus - 1] - now_ns)


def _device_ns(
    state: State, process: ProcessKey, memory_mb: int, whole: bool, device: Device, now_ns: int
) -> int | None:
    if len(device.parts) > LEASES_MAX:
        return None
    left = len(device.parts)
    room_mb = ledger.room(state, device, process).mb
    if room_mb >= memory_mb and not (whole and left):
        return now_ns
    ends = []
    for lease_id, part in device.parts.items():
        lease = state.leases[lease_id]
        if lease.ended_ns:
            ends.append((now_ns, part.claim_mb))
        elif lease.ask.expected_ns is not None:
            ends.append((lease.granted_ns + lease.ask.expected_ns, part.claim_mb))
    for end_ns, claim_mb in sorted(ends):
        room_mb += claim_mb
        left -= 1
        if room_mb >= memory_mb and not (whole and left):
            return end_ns
    return None
