"""What a caller may ask of a lease, checked before anything is sent.

A wrong value is a bug of the calling program, so it raises here, at once, whether or not a daemon
is there. Only what was said goes on the wire; the daemon's defaults stay the daemon's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from libclient.sizes import parse_memory
from libclient.wire.vocabulary import (
    AGENT_CHARS,
    DEVICES_MAX,
    GPUS_MAX,
    MEMORY_MB_MAX,
    PRIORITIES,
    WAIT_S_MAX,
)


class LeaseOptions(TypedDict, total=False):
    """What else may be asked of a lease; what is left out is as on the wire.

    gpus: how many. exclusive: whole GPUs. priority: critical, normal or background. devices: uuids
    or indices to choose from. preemptible: may be taken back for others. expected_s: how long it
    will take, seconds. purpose, labels: for people.
    """

    gpus: int
    exclusive: bool
    priority: str | None
    devices: Sequence[str | int] | None
    preemptible: bool
    expected_s: float | None
    purpose: str | None
    labels: Mapping[str, str] | None


def lease_fields(
    agent: str,
    memory: str | float | None = None,
    wait_s: float = 0,
    *,
    gpus: int = 1,
    exclusive: bool = False,
    priority: str | None = None,
    devices: Sequence[str | int] | None = None,
    preemptible: bool = False,
    expected_s: float | None = None,
    purpose: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the fields of a `lease` or `explain` request. Raises ValueError or TypeError.

    `memory` is per GPU: `4GiB`, or MiB as a number; None leaves it to the policy.
    """
    if type(agent) is not str:
        raise TypeError(f"agent has to be a string, not {agent!r}")
    if not 0 < len(agent) <= AGENT_CHARS or not agent.isprintable():
        raise ValueError(f"agent {agent!r} is not 1 to {AGENT_CHARS} printable characters")
    fields: dict[str, Any] = {"agent": agent}
    if memory is not None:
        small = type(memory) is int and 0 <= memory <= MEMORY_MB_MAX
        fields["min_memory_mb"] = memory if small else parse_memory(memory)
    if gpus != 1:
        if type(gpus) is not int or not 0 < gpus <= GPUS_MAX:
            raise ValueError(f"gpus {gpus!r} is not a number from 1 to {GPUS_MAX}")
        fields["gpus"] = gpus
    if wait_s:
        fields["wait_s"] = _seconds("wait_s", wait_s)
        if not 0 <= wait_s <= WAIT_S_MAX:
            raise ValueError(f"wait_s {wait_s!r} is not from 0 to {WAIT_S_MAX} seconds")
    if priority is not None:
        if priority not in PRIORITIES:
            raise ValueError(f"priority {priority!r} is none of {', '.join(PRIORITIES)}")
        fields["priority"] = priority
    if exclusive:
        fields["exclusive"] = True
    if preemptible:
        fields["preemptible"] = True
    if expected_s is not None:
        fields["expected_s"] = _seconds("expected_s", expected_s)
        if expected_s <= 0:
            raise ValueError(f"expected_s {expected_s!r} is not above 0")
    if devices is not None:
        fields["devices"] = _devices(devices)
    if purpose is not None:
        fields["purpose"] = purpose
    if labels:
        fields["labels"] = dict(labels)
    return fields


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} has to be a number of seconds, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} {value!r} is not finite")
    return value


def _devices(devices: Sequence[str | int]) -> list[str | int]:
    if isinstance(devices, str):
        raise TypeError(f"devices has to be a list of uuids or indices, not {devices!r}")
    wanted = list(devices)
    if not 0 < len(wanted) <= DEVICES_MAX:
        raise ValueError(f"devices names {len(wanted)} GPUs, 1 to {DEVICES_MAX} allowed")
    return wanted
