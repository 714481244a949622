"""What the probe says, checked before anything is believed.

The probe speaks to a driver that may be failing, and drivers in trouble have answered with numbers
that cannot be. So every answer is decoded into types with bounds, each GPU's values are held
against each other, and what does not fit makes that reading a failed one: unknown, never a guess.
An answer that breaks the form itself makes the whole sample fail.

Bytes become MiB here: what is in use is rounded up, what is free or there at all down.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from gpuorchd.core.model import DeviceFacts, DeviceUuid, ProcessKey, ProcessUse, Reading
from gpuorchd.devices.probe_wire import CALLS
from gpuorchd.devices.telemetry import Telemetry

MIB = 1024 * 1024
# More than any GPU or host has, and less than what a broken counter shows.
MEMORY_MAX_BYTES = 16 * 1024 * 1024 * MIB
PID_MAX = 2**22
GPUS_MAX = 64
# Bounds of what can be believed of a card: beyond them the value is unknown.
PERCENT_MAX = 100
TEMPERATURE_MIN_C = -60
TEMPERATURE_MAX_C = 200
POWER_MAX_W = 10_000

Bytes = Annotated[int, Meta(ge=0, le=MEMORY_MAX_BYTES)]
Pid = Annotated[int, Meta(ge=0, le=PID_MAX)]
Ticks = Annotated[int, Meta(ge=0, le=2**62)]
ShortText = Annotated[str, Meta(max_length=256)]
LongText = Annotated[str, Meta(max_length=4_096)]
Uuid = Annotated[str, Meta(pattern=r"^[!-~]{1,96}$")]


class SaidProcess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One process of one GPU. A `start_ticks` of 0: it was gone before it could be read."""

    pid: Pid
    start_ticks: Ticks
    used: Bytes | None
    ancestors: Annotated[tuple[tuple[Pid, Ticks], ...], Meta(max_length=64)] = ()
    unit: ShortText | None = None


class SaidDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU. With `failure` the values are missing, and so may be its name."""

    index: Annotated[int, Meta(ge=0, lt=GPUS_MAX)]
    uuid: Uuid | None = None
    name: ShortText = ""
    failure: LongText | None = None
    total: Bytes = 0
    reserved: Bytes = 0
    free: Bytes = 0
    used: Bytes = 0
    processes: Annotated[tuple[SaidProcess, ...], Meta(max_length=4_096)] = ()
    telemetry: tuple[float | None, float | None, float | None, float | None] | None = None


class SaidSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer. With `init_error` the driver could not be used at all."""

    n: int
    calls: Annotated[
        tuple[tuple[ShortText, Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0, le=1)]], ...],
        Meta(max_length=4_096),
    ]
    devices: Annotated[tuple[SaidDevice, ...], Meta(max_length=GPUS_MAX)] = ()
    init_error: LongText | None = None


class Sample(NamedTuple):
    """A checked answer.

    `facts` are the GPUs that were read, `failures` those that could not be and why; `nameless` are
    failures of GPUs that did not even say their uuid.
    """

    init_error: str | None
    facts: tuple[DeviceFacts, ...]
    readings: tuple[Reading, ...]
    failures: tuple[tuple[DeviceUuid, str], ...]
    nameless: tuple[str, ...]
    telemetry: dict[DeviceUuid, Telemetry]
    calls: tuple[tuple[str, int, int], ...]


class BadAnswer(Exception):
    """The probe's answer cannot be believed as a whole. `str()` says what is wrong with it."""


_decoder = msgspec.json.Decoder(SaidSample)


def read_answer(payload: bytes, number: int) -> Sample:
    """Decode and judge the answer to request `number`. Raises `BadAnswer`."""
    try:
        said = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadAnswer(f"the probe's answer is malformed: {error}") from error
    if said.n != number:
        raise BadAnswer(f"the probe answered request {said.n} in place of {number}")
    unknown = {label for label, _, _ in said.calls} - CALLS
    if unknown:
        raise BadAnswer(f"the probe timed calls that nobody knows: {sorted(unknown)}")
    uuids = [device.uuid for device in said.devices if device.uuid is not None]
    indices = {device.index for device in said.devices}
    if len(set(uuids)) != len(uuids) or len(indices) != len(said.devices):
        raise BadAnswer("the probe named one GPU twice")
    return _judge(said)


def _judge(said: SaidSample) -> Sample:
    facts: list[DeviceFacts] = []
    readings: list[Reading] = []
    failures: list[tuple[DeviceUuid, str]] = []
    nameless: list[str] = []
    telemetry: dict[DeviceUuid, Telemetry] = {}
    for device in said.devices:
        if device.uuid is None:
            nameless.append(f"GPU {device.index}: {device.failure or 'no uuid'}")
            continue
        uuid = DeviceUuid(device.uuid)
        fault = device.failure if device.failure is not None else _fault(device)
        if fault is not None:
            failures.append((uuid, fault))
            continue
        facts.append(_facts(device, uuid))
        readings.append(_reading(device, uuid))
        if device.telemetry is not None:
            telemetry[uuid] = _telemetry(*device.telemetry)
    return Sample(
        init_error=said.init_error,
        facts=tuple(facts),
        readings=tuple(readings),
        failures=tuple(failures),
        nameless=tuple(nameless),
        telemetry=telemetry,
        calls=said.calls,
    )


def _fault(device: SaidDevice) -> str | None:
    """Say what cannot be about a reading, None where all of it can."""
    total = device.total
    if total < MIB:
        return f"the driver shows {total} bytes in all"
    for value, word in (device.reserved, "reserved"), (device.free, "free"), (device.used, "used"):
        if value > total:
            return f"the driver shows {value} bytes {word} of {total}"
    if device.free + device.used > total:
        return f"the driver shows {device.free} bytes free and {device.used} used of {total}"
    pids = set()
    for process in device.processes:
        if process.used is not None and process.used > total:
            return f"the driver shows {process.used} bytes used by pid {process.pid} of {total}"
        pids.add(process.pid)
    if len(pids) != len(device.processes):
        return "the driver lists a process twice"
    return None


def _facts(device: SaidDevice, uuid: DeviceUuid) -> DeviceFacts:
    name = "".join(letter if letter.isprintable() else "?" for letter in device.name)
    return DeviceFacts(
        uuid=uuid,
        index=device.index,
        name=name or "unnamed GPU",
        total_mb=device.total // MIB,
        reserved_mb=_up(device.reserved),
    )


def _reading(device: SaidDevice, uuid: DeviceUuid) -> Reading:
    return Reading(
        uuid=uuid,
        free_mb=device.free // MIB,
        used_mb=_up(device.used),
        processes=tuple(_process(process) for process in device.processes),
    )


def _process(process: SaidProcess) -> ProcessUse:
    return ProcessUse(
        process=ProcessKey(process.pid, process.start_ticks),
        used_mb=None if process.used is None else _up(process.used),
        ancestors=tuple(ProcessKey(pid, ticks) for pid, ticks in process.ancestors),
        unit=process.unit,
    )


def _telemetry(
    gpu_pct: float | None,
    memory_pct: float | None,
    temperature_c: float | None,
    power_w: float | None,
) -> Telemetry:
    return Telemetry(
        utilization_gpu_pct=_within(gpu_pct, 0, PERCENT_MAX),
        memory_utilization_pct=_within(memory_pct, 0, PERCENT_MAX),
        temperature_c=_within(temperature_c, TEMPERATURE_MIN_C, TEMPERATURE_MAX_C),
        power_draw_w=_within(power_w, 0, POWER_MAX_W),
    )


def _within(value: float | None, least: float, most: float) -> float | None:
    return value if value is not None and least <= value <= most else None


def _up(size_bytes: int) -> int:
    return -(-size_bytes // MIB)
