"""The driver as the probe sees it: which calls a reading takes, in which order, and what may fail.

Runs in the probe's child only, where a call may hang for good. Values leave as the driver gave
them. What admission needs (memory and processes) fails the reading of that GPU when it fails; what
is for people is each guarded alone and becomes None. One GPU that fails does not fail the others.

The memory is read before and after the list of processes and the smaller free counts: a process
that allocates in between is then either in the list or not in the free memory, never in neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from gpuorchd.devices.proc_facts import Family, read_unit, service_of

# More calls than a sample makes; a bound for what waits to be told.
CALLS_MAX = 4_096
MILLIWATTS = 1_000


class InitFailed(Exception):
    """The driver cannot be used at all. `str()` is its own word for why."""


class Gpu(NamedTuple):
    """A GPU as the driver knows it; the handle stays good while the driver is initialised."""

    handle: Any
    uuid: str
    name: str


class Driver:
    """NVML, through the module that binds it. Every method may block for ever."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        # By the driver's count.
        self._gpus: dict[int, Gpu] = {}
        self._memory_version: int | None = getattr(nvml, "nvmlMemory_v2", None)
        self._started = False
        self.calls: list[tuple[str, int, int]] = []

    def start(self) -> None:
        """Initialise the driver, once. Raises `InitFailed`."""
        if self._started:
            return
        try:
            self._call("init", self._nvml.nvmlInit)
        except self._nvml.NVMLError as error:
            raise InitFailed(str(error)) from error
        self._started = True

    def sample(self, telemetry: bool) -> list[dict[str, object]]:
        """Read every GPU; one that cannot be read has a `failure` in place of values."""
        nvml = self._nvml
        try:
            count = self._call("count", nvml.nvmlDeviceGetCount)
        except nvml.NVMLError as error:
            raise InitFailed(str(error)) from error
        family = Family()
        return [self._sample_one(index, family, telemetry) for index in range(count)]

    def _sample_one(self, index: int, family: Family, telemetry: bool) -> dict[str, object]:
        nvml = self._nvml
        sampled: dict[str, object] = {"index": index}
        try:
            gpu = self._gpu(index)
            sampled |= {"uuid": gpu.uuid, "name": gpu.name}
            before = self._memory(gpu.handle)
            processes = self._processes(gpu.handle, family)
            after = self._memory(gpu.handle)
        except nvml.NVMLError as error:
            known = self._gpus.get(index)
            if known is not None:
                sampled |= {"uuid": known.uuid, "name": known.name}
            return sampled | {"failure": str(error)}
        total, reserved, free, used = min(before, after, key=lambda memory: memory[2])
        sampled |= {"total": total, "reserved": reserved, "free": free, "used": used}
        sampled["processes"] = processes
        if telemetry:
            sampled["telemetry"] = self._telemetry(gpu.handle)
        return sampled

    def _gpu(self, index: int) -> Gpu:
        gpu = self._gpus.get(index)
        if gpu is None:
            nvml = self._nvml
            handle = self._call("handle", nvml.nvmlDeviceGetHandleByIndex, index)
            uuid = _text(self._call("uuid", nvml.nvmlDeviceGetUUID, handle))
            name = _text(self._call("name", nvml.nvmlDeviceGetName, handle))
            gpu = self._gpus[index] = Gpu(handle, uuid, name)
        return gpu

    def _memory(self, handle: Any) -> tuple[int, int, int, int]:
        """Read total, reserved, free and used, in bytes."""
        nvml = self._nvml
        if self._memory_version is not None:
            try:
                memory = self._call(
                    "memory", nvml.nvmlDeviceGetMemoryInfo, handle, self._memory_version
                )
                return memory.total, memory.reserved, memory.free, memory.used
            except nvml.NVMLError as error:
                if error.value not in self._not_there():
                    raise
                # An older driver: it counts what it keeps for itself as used.
                self._memory_version = None
        memory = self._call("memory", nvml.nvmlDeviceGetMemoryInfo, handle)
        return memory.total, 0, memory.free, memory.used

    def _processes(self, handle: Any, family: Family) -> list[dict[str, object]]:
        listed = self._list("compute_processes", "nvmlDeviceGetComputeRunningProcesses", handle)
        for label, function in (
            ("graphics_processes", "nvmlDeviceGetGraphicsRunningProcesses"),
            ("mps_processes", "nvmlDeviceGetMPSComputeRunningProcesses"),
        ):
            try:
                listed += self._list(label, function, handle)
            except self._nvml.NVMLError as error:
                # A card without a display, or a driver without MPS, has no such processes.
                if error.value not in self._not_there():
                    raise
        used: dict[int, int | None] = {}
        for process in listed:
            # A process that computes and draws stands in two lists with the same bytes.
            known = used.get(process.pid)
            now = process.usedGpuMemory
            used[process.pid] = now if known is None else max(known, now or 0)
        # One that began after the list was made has only the number of one that is gone.
        latest_ticks = _ticks_now()
        return [_describe(pid, used[pid], family, latest_ticks) for pid in used]

    def _list(self, label: str, function: str, handle: Any) -> list[Any]:
        # By their versioned names: the plain ones hide an older driver's answer behind another
        # exception.
        try:
            return list(self._call(label, getattr(self._nvml, function + "_v3"), handle))
        except self._nvml.NVMLError as error:
            if error.value != self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
        return list(self._call(label, getattr(self._nvml, function + "_v2"), handle))

    def _telemetry(self, handle: Any) -> list[float | None]:
        nvml = self._nvml
        rates = self._optional("utilization", nvml.nvmlDeviceGetUtilizationRates, handle)
        temperature = self._optional(
            "temperature", nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
        )
        milliwatts = self._optional("power", nvml.nvmlDeviceGetPowerUsage, handle)
        return [
            None if rates is None else rates.gpu,
            None if rates is None else rates.memory,
            temperature,
            None if milliwatts is None else milliwatts / MILLIWATTS,
        ]

    def _optional(self, label: str, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return self._call(label, function, *arguments)
        except self._nvml.NVMLError:
            # Not supported on this card, or not now: an unknown value, and no more than that.
            return None

    def _call(self, label: str, function: Callable[..., Any], *arguments: object) -> Any:
        failed = 1
        started_ns = time.perf_counter_ns()
        try:
            answer = function(*arguments)
            failed = 0
            return answer
        finally:
            if len(self.calls) < CALLS_MAX:
                self.calls.append((label, time.perf_counter_ns() - started_ns, failed))

    def _not_there(self) -> tuple[int, ...]:
        """Codes by which a driver says that it has no such call, on this card or at all."""
        nvml = self._nvml
        return (
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        )


def _describe(pid: int, used: int | None, family: Family, latest_ticks: int) -> dict[str, object]:
    stat = family.stat(pid) if pid > 0 else None
    if stat is None or stat.start_ticks > latest_ticks:
        return {"pid": pid, "start_ticks": 0, "used": used}
    return {
        "pid": pid,
        "start_ticks": stat.start_ticks,
        "used": used,
        "ancestors": family.ancestors(pid),
        "unit": service_of(read_unit(pid)),
    }


def _ticks_now() -> int:
    """Give the time as /proc counts the starts of processes: ticks since boot, 100 a second."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 10_000_000


def _text(value: object) -> str:
    """Older bindings answer in bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
