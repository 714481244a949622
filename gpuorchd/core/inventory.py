"""Which GPUs there are: found, gone, found again.

A GPU that is gone keeps its leases until they end; it is forgotten once nothing is booked on it.
Cordons are kept by uuid and hold again when the GPU comes back.
"""

from __future__ import annotations

from gpuorchd.core import drain
from gpuorchd.core.effects import Announce, Effect, TakeReading
from gpuorchd.core.model import Device, DeviceFacts
from gpuorchd.core.state import State


def found(state: State, facts: tuple[DeviceFacts, ...], out: list[Effect]) -> None:
    """Take over the list of GPUs that are present now."""
    state.probing = False
    state.unavailable = None if facts else "this host has no GPU"
    before = {device.uuid for device in state.order}
    now = {fact.uuid for fact in facts}
    for device in tuple(state.devices.values()):
        if device.announced and device.uuid not in now:
            _vanish(state, device, out)
    for fact in facts:
        device = state.devices.setdefault(fact.uuid, Device(fact))
        if device.facts != fact or fact.uuid not in before:
            device.facts = fact
            state.changed_devices.add(fact.uuid)
        device.present = True
        # Less than is promised already: nothing more is, until enough of it is back.
        device.over_mb = max(0, device.claim_mb + device.draining_mb - device.capacity_mb)
        device.cordon = state.cordons.get(fact.uuid)
        if not device.announced:
            device.announced = True
            fields = {"gpu": fact.uuid, "index": fact.index, "memory_total_mb": fact.total_mb}
            out.append(Announce("gpu.appeared", fields))
    _put_in_order(state)
    if any(fact.drain_ns is None for fact in facts):
        out.append(TakeReading())


def lost(state: State, reason: str, now_ns: int, out: list[Effect]) -> None:
    """Take note that no GPU can be used any more."""
    state.probing = False
    state.unavailable = reason
    for device in tuple(state.devices.values()):
        if device.announced:
            _vanish(state, device, out)
    _put_in_order(state)
    drain.driver_closed(state, now_ns, out)


def _vanish(state: State, device: Device, out: list[Effect]) -> None:
    device.present = device.announced = False
    device.reading = None
    out.append(Announce("gpu.vanished", {"gpu": device.uuid, "index": device.index}))
    if not device.parts:
        del state.devices[device.uuid]
        state.changed_devices.add(device.uuid)


def _put_in_order(state: State) -> None:
    present = [device for device in state.devices.values() if device.present]
    state.order = tuple(sorted(present, key=lambda device: device.facts.index))
    state.unsettled = state.upheaval = True
