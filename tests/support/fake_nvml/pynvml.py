"""A stand-in for pynvml, to be put in front on the PYTHONPATH of a probe or of a whole daemon.

It answers from a JSON file (`FAKE_NVML_SCRIPT`) that is read anew with every sample, so a test can
change what the cards show while a probe runs; `tests.support.fake_cards` writes it. Keys, all
optional:

    devices    list of {uuid, name, total, reserved, used, free, processes, graphics, errors,
               utilization, temperature, power, later_free}
    errors     {function: code}: these calls fail
    hang       function that never returns
    die        function in which the process ends

`later_free` is what the memory shows as free when it is asked again within one sample. Every
process that imports this file says so by a line with its pid in the file `FAKE_NVML_MARKER`, and
one that hangs in a call by a line in its namesake with the suffix `.hanging`.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_FUNCTION_NOT_FOUND = 13
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25
NVML_ERROR_UNKNOWN = 999
NVML_TEMPERATURE_GPU = 0
nvmlMemory_v2 = 0x02000028  # noqa: N816  # the binding's own name

WORDS = {
    NVML_ERROR_NOT_SUPPORTED: "Not Supported",
    NVML_ERROR_DRIVER_NOT_LOADED: "Driver Not Loaded",
    NVML_ERROR_LIBRARY_NOT_FOUND: "NVML Shared Library Not Found",
    NVML_ERROR_GPU_IS_LOST: "GPU is lost",
}


class NVMLError(Exception):
    """An error of the driver; `value` is its code."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return WORDS.get(self.value, f"Error {self.value}")


class _Script:
    def __init__(self) -> None:
        self.content: dict[str, Any] = {}
        # How often each card's memory was asked for in this sample.
        self.asked: dict[int, int] = {}

    def read(self) -> None:
        self.content = json.loads(Path(os.environ["FAKE_NVML_SCRIPT"]).read_text())
        self.asked.clear()


_script = _Script()
_initialised = False


def _leave_mark(suffix: str) -> None:
    marker = os.environ.get("FAKE_NVML_MARKER")
    if marker is not None:
        with Path(marker).with_suffix(suffix).open("a") as file:
            file.write(f"{os.getpid()}\n")


def _enter(function: str, card: dict[str, Any] | None = None) -> None:
    """Do what the script has for a call: hang, end, fail or nothing."""
    content = _script.content
    if content.get("hang") == function:
        _leave_mark(".hanging")
        while True:
            signal.pause()
    if content.get("die") == function:
        os.kill(os.getpid(), signal.SIGKILL)
    for errors in (content.get("errors", {}), (card or {}).get("errors", {})):
        if function in errors:
            raise NVMLError(errors[function])
    if function != "nvmlInit" and not _initialised:
        raise NVMLError(NVML_ERROR_UNINITIALIZED)


def _card(function: str, handle: int) -> dict[str, Any]:
    card: dict[str, Any] = _script.content["devices"][handle]
    _enter(function, card)
    return card


def nvmlInit() -> None:  # noqa: N802  # the binding's own name
    global _initialised
    _script.read()
    _enter("nvmlInit")
    _initialised = True


def nvmlDeviceGetCount() -> int:  # noqa: N802  # the binding's own name
    _script.read()
    _enter("nvmlDeviceGetCount")
    return len(_script.content.get("devices", []))


def nvmlDeviceGetHandleByIndex(index: int) -> int:  # noqa: N802  # the binding's own name
    _card("nvmlDeviceGetHandleByIndex", index)
    return index


def nvmlDeviceGetUUID(handle: int) -> str:  # noqa: N802  # the binding's own name
    return str(_card("nvmlDeviceGetUUID", handle)["uuid"])


def nvmlDeviceGetName(handle: int) -> str:  # noqa: N802  # the binding's own name
    return str(_card("nvmlDeviceGetName", handle).get("name", "Fake GPU"))


def nvmlDeviceGetMemoryInfo(handle: int, version: int | None = None) -> Any:  # noqa: N802  # the same
    card = _card("nvmlDeviceGetMemoryInfo" + ("_v2" if version else ""), handle)
    total, used, reserved = card["total"], card.get("used", 0), card.get("reserved", 0)
    free = card.get("free", total - used - reserved)
    asked = _script.asked[handle] = _script.asked.get(handle, 0) + 1
    if asked > 1:
        free = card.get("later_free", free)
    if version:
        return SimpleNamespace(total=total, reserved=reserved, free=free, used=used)
    return SimpleNamespace(total=total, free=free, used=total - free)


def _listed(function: str, handle: int, key: str) -> list[Any]:
    entries = _card(function, handle).get(key, [])
    return [SimpleNamespace(pid=entry["pid"], usedGpuMemory=entry["used"]) for entry in entries]


def nvmlDeviceGetComputeRunningProcesses_v2(handle: int) -> list[Any]:  # noqa: N802  # the same
    return _listed("nvmlDeviceGetComputeRunningProcesses_v2", handle, "processes")


def nvmlDeviceGetComputeRunningProcesses_v3(handle: int) -> list[Any]:  # noqa: N802  # the same
    return _listed("nvmlDeviceGetComputeRunningProcesses_v3", handle, "processes")


def nvmlDeviceGetGraphicsRunningProcesses_v2(handle: int) -> list[Any]:  # noqa: N802  # the same
    return _listed("nvmlDeviceGetGraphicsRunningProcesses_v2", handle, "graphics")


def nvmlDeviceGetGraphicsRunningProcesses_v3(handle: int) -> list[Any]:  # noqa: N802  # the same
    return _listed("nvmlDeviceGetGraphicsRunningProcesses_v3", handle, "graphics")


def nvmlDeviceGetMPSComputeRunningProcesses_v2(handle: int) -> list[Any]:  # noqa: N802  # the same
    return _listed("nvmlDeviceGetMPSComputeRunningProcesses_v2", handle, "mps")


def nvmlDeviceGetMPSComputeRunningProcesses_v3(handle: int) -> list[Any]:  # noqa: N802  # the same
    return _listed("nvmlDeviceGetMPSComputeRunningProcesses_v3", handle, "mps")


def nvmlDeviceGetUtilizationRates(handle: int) -> Any:  # noqa: N802  # the same
    gpu, memory = _card("nvmlDeviceGetUtilizationRates", handle).get("utilization", [37, 12])
    return SimpleNamespace(gpu=gpu, memory=memory)


def nvmlDeviceGetTemperature(handle: int, sensor: int) -> int:  # noqa: N802  # the same
    assert sensor == NVML_TEMPERATURE_GPU
    return int(_card("nvmlDeviceGetTemperature", handle).get("temperature", 41))


def nvmlDeviceGetPowerUsage(handle: int) -> int:  # noqa: N802  # the same
    return int(_card("nvmlDeviceGetPowerUsage", handle).get("power", 71_500))


_leave_mark(".imported")
