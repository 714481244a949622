"""What a scrape has to look at one by one: leases and GPUs, in slices.

Records belong to the core and may be read only in the turn that shows them, so a slice keeps
names and looks each record up anew. Sums over many leases are therefore as of a few turns, not of
one instant.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

from gpuorchd.core.ledger import unleased_mb
from gpuorchd.core.model import Device, Lease, LeaseState
from gpuorchd.core.state import State

# Records looked at before the loop gets its turn: some tenths of a millisecond.
SLICE_LEASES = 250
STATES = (
    LeaseState.ACTIVE,
    LeaseState.REVOKING,
    LeaseState.DETACHED,
    LeaseState.DRAINING,
)


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """One GPU's memory in MiB; None where there is no fresh reading."""

    uuid: str
    index: int
    total_mb: int
    used_mb: int | None
    leased_mb: int
    draining_mb: int
    unleased_mb: int | None


@dataclass(slots=True)
class Survey:
    """Sums over all leases, and each GPU's memory."""

    by_state: dict[str, int] = field(default_factory=dict)
    leased_mb_by_agent: dict[str, int] = field(default_factory=dict)
    withheld_mb: int = 0
    gpus: list[GpuMemory] = field(default_factory=list)


async def take_survey(state: State, now_ns: int) -> Survey:
    """Look at every lease and GPU, yielding to the loop between slices."""
    survey = Survey()
    by_state: Counter[LeaseState] = Counter()
    # The names alone, at once: about ten nanoseconds each.
    names = iter(tuple(state.leases))
    while part := tuple(islice(names, SLICE_LEASES)):
        for name in part:
            _add_lease(survey, by_state, state.leases.get(name))
        await asyncio.sleep(0)
    survey.by_state = {entry.value: by_state[entry] for entry in STATES}
    for uuid in [device.uuid for device in state.order]:
        device = state.devices.get(uuid)
        if device is not None:
            survey.gpus.append(_memory(state, device, now_ns))
        await asyncio.sleep(0)
    return survey


def _add_lease(survey: Survey, by_state: Counter[LeaseState], lease: Lease | None) -> None:
    if lease is None:
        return
    by_state[lease.state] += 1
    claim_mb = sum(part.claim_mb for part in lease.parts)
    if lease.state is not LeaseState.DRAINING:
        agent = lease.ask.agent
        sums = survey.leased_mb_by_agent
        sums[agent] = sums.get(agent, 0) + claim_mb
    elif lease.withheld:
        survey.withheld_mb += claim_mb


def _memory(state: State, device: Device, now_ns: int) -> GpuMemory:
    used_mb: int | None = None
    outside_mb: int | None = None
    if device.facts.drain_ns is not None:
        # A simulated lease uses all of its bytes, and nothing else uses any.
        used_mb = device.claim_mb + device.draining_mb
        outside_mb = 0
    elif device.reading is not None and device.failure is None:
        age_ns = now_ns - device.reading_ns
        if age_ns <= state.settings.reading_max_age_ns:
            used_mb = device.reading.used_mb
            outside_mb = unleased_mb(device)
    return GpuMemory(
        uuid=device.uuid,
        index=device.index,
        total_mb=device.facts.total_mb,
        used_mb=used_mb,
        leased_mb=device.claim_mb,
        draining_mb=device.draining_mb,
        unleased_mb=outside_mb,
    )
