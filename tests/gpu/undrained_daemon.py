"""The daemon with its draining switched off: it grants again at the end of a connection.

For one test alone, which has to see it fail: it shows that the test of the hand-over can. What a
lease held is free at once, and what the driver reads counts for nothing.
"""

from __future__ import annotations

import sys

from gpuorchd import __main__ as daemon
from gpuorchd.core import drain, ledger
from gpuorchd.core.effects import Effect
from gpuorchd.core.model import Device, Lease, ProcessKey
from gpuorchd.core.state import State


def _free_at_once(state: State, lease: Lease, now_ns: int, out: list[Effect]) -> None:
    for part in lease.parts:
        ledger.begin_drain(lease, part)
        ledger.give_back(lease, part, part.claim_mb)
    drain.finish_if_empty(state, lease, now_ns, out)


def _ledger_room(state: State, device: Device, process: ProcessKey) -> ledger.Room:
    free_mb = device.capacity_mb - device.claim_mb - device.draining_mb
    return ledger.Room(free_mb, free_mb, free_mb)


if __name__ == "__main__":
    drain.begin = _free_at_once
    ledger.room = _ledger_room
    sys.exit(daemon.main())
