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
    LABEL_NAME_CHARS,
    LABEL_VALUE_CHARS,
    LABELS_MAX,
    MEMORY_MB_MAX,
    PRIORITIES,
    PURPOSE_CHARS,
    WAIT_S_MAX,
)

# Of the contract's text, what names a GPU; an index has to fit the wire's integers.
UUID_CHARS = 256
INDEX_MAX = 2**63 - 1


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
    # What is left out, as most is, costs one comparison: this is on the path of every lease.
    if memory is not None:
        small = type(memory) is int and 0 <= memory <= MEMORY_MB_MAX
        fields["min_memory_mb"] = memory if small else parse_memory(memory)
    if gpus != 1 or type(gpus) is not int:
        if type(gpus) is not int or not 0 < gpus <= GPUS_MAX:
            raise ValueError(f"gpus {gpus!r:.80} is not a number from 1 to {GPUS_MAX}")
        fields["gpus"] = gpus
    if wait_s or type(wait_s) is not int:
        seconds = _seconds("wait_s", wait_s)
        if not 0 <= seconds <= WAIT_S_MAX:
            raise ValueError(f"wait_s {seconds!r} is not from 0 to {WAIT_S_MAX} seconds")
        if seconds:
            fields["wait_s"] = seconds
    if priority is not None:
        if priority not in PRIORITIES:
            raise ValueError(f"priority {priority!r:.80} is none of {', '.join(PRIORITIES)}")
        fields["priority"] = priority
    if exclusive is not False:
        fields["exclusive"] = _true("exclusive", exclusive)
    if preemptible is not False:
        fields["preemptible"] = _true("preemptible", preemptible)
    if expected_s is not None:
        fields["expected_s"] = _seconds("expected_s", expected_s)
        if expected_s <= 0:
            raise ValueError(f"expected_s {expected_s!r} is not above 0")
    if devices is not None:
        fields["devices"] = _devices(devices)
    if purpose is not None:
        fields["purpose"] = _text("purpose", purpose, PURPOSE_CHARS)
    if labels is not None and (held := _labels(labels)):
        fields["labels"] = held
    return fields


def _true(name: str, value: bool) -> bool:
    if value is not True:
        raise TypeError(f"{name} has to be True or False, not {value!r:.80}")
    return True


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} has to be a number of seconds, not {value!r:.80}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError(f"{name} {seconds!r} is not finite")
    return seconds


def _text(name: str, value: str, most: int) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} has to be a string, not {value!r:.80}")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} characters, at most {most} allowed")
    if not value.isprintable():
        raise ValueError(f"{name} {value!r:.80} has a character that is not printable")
    return value


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels has to be strings by name, not {labels!r:.80}")
    if len(labels) > LABELS_MAX:
        raise ValueError(f"labels holds {len(labels)} labels, at most {LABELS_MAX} allowed")
    return {
        _text("the name of a label", name, LABEL_NAME_CHARS): _text(
            f"label {name}", value, LABEL_VALUE_CHARS
        )
        for name, value in labels.items()
    }


def _devices(devices: Sequence[str | int]) -> list[str | int]:
    if isinstance(devices, str):
        raise TypeError(f"devices has to be a list of uuids or indices, not {devices!r:.80}")
    wanted = list(devices)
    if not 0 < len(wanted) <= DEVICES_MAX:
        raise ValueError(f"devices names {len(wanted)} GPUs, 1 to {DEVICES_MAX} allowed")
    for device in wanted:
        if isinstance(device, bool) or not isinstance(device, str | int):
            raise TypeError(f"a device is a uuid or an index, not {device!r:.80}")
        if isinstance(device, str):
            if not 0 < len(device) <= UUID_CHARS or not device.isprintable():
                raise ValueError(f"device {device!r:.80} is no uuid: 1 to {UUID_CHARS} characters")
        elif not 0 <= device <= INDEX_MAX:
            raise ValueError(f"a device's index is from 0 to {INDEX_MAX}")
    return wanted
