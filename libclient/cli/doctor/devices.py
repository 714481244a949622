"""Checks of the GPUs: the kernel's driver, NVML as the daemon sees it, every card, and MPS.

Nothing here opens a device or loads NVIDIA's library: what is known comes from the daemon and from
the kernel's files.
"""

from __future__ import annotations

import os
import stat
from typing import Any, Final

from libclient.cli.doctor.case import SERVICE, Case
from libclient.cli.doctor.findings import FAIL, OK, WARN, Finding, Findings, as_root
from libclient.cli.doctor.host import Host
from libclient.cli.text import counted, safe

DRIVER_UNIT: Final = "gpuorchd-driver.service"
MPS_UNIT: Final = "nvidia-mps.service"
NVIDIA_VENDOR: Final = "0x10de"
# Classes of display controllers in PCI, with a screen and without.
DISPLAY_CLASS: Final = "0x03"
NODES: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm")


def driver_check(case: Case) -> Findings:
    """The kernel's side: a card, its module, its device nodes."""
    host = case.host
    cards = _cards(host)
    version = _version(host)
    if not cards and version is None:
        yield Finding("driver", OK, "no NVIDIA card on this host: agents work on the CPU")
        return
    load = as_root(
        f"systemctl restart {DRIVER_UNIT}"
        if host.unit(DRIVER_UNIT).get("LoadState") == "loaded"
        else "modprobe nvidia && modprobe nvidia-uvm"
    )
    if version is None:
        found = f"{counted(len(cards), 'NVIDIA card')}, and the kernel module is not loaded"
        yield Finding("driver", FAIL, found, (load, "dmesg | grep -i nvidia   (where it fails)"))
        return
    missing = [node for node in NODES if not host.path(node).exists()]
    if not any(host.path("/dev").glob("nvidia[0-9]*")):
        missing.append("/dev/nvidia0")
    if missing:
        yield Finding(
            "driver",
            FAIL,
            f"driver {version} is loaded, and {', '.join(missing)} is not there",
            # The nodes that a service may open are looked up when it starts.
            (load, as_root(f"systemctl restart {SERVICE}")),
        )
        return
    yield Finding(
        "driver", OK, f"driver {version}, {counted(len(cards), 'card')}, device nodes there"
    )
    yield from _node_check(case)


def _cards(host: Host) -> list[str]:
    found = []
    for device in sorted(host.path("/sys/bus/pci/devices").glob("*")):
        vendor = host.read(f"/sys/bus/pci/devices/{device.name}/vendor") or ""
        kind = host.read(f"/sys/bus/pci/devices/{device.name}/class") or ""
        if vendor.strip() == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASS):
            found.append(device.name)
    return found


def _version(host: Host) -> str | None:
    text = host.read("/proc/driver/nvidia/version")
    if text is None:
        return None
    words = text.splitlines()[0].split() if text else []
    numbers = [word for word in words if word[:1].isdigit() and "." in word]
    return numbers[0] if numbers else "of unknown version"


def _node_check(case: Case) -> Findings:
    user = case.service.get("User") or "the daemon's user"
    for node in NODES:
        try:
            status = os.stat(case.host.path(node))
        except OSError:
            continue
        if status.st_mode & (stat.S_IROTH | stat.S_IWOTH) != stat.S_IROTH | stat.S_IWOTH:
            yield Finding(
                "driver",
                WARN,
                f"{node} is not open to everyone (mode {stat.S_IMODE(status.st_mode):04o}, gid "
                f"{status.st_gid}): the daemon and the agents have to be in that group",
                (as_root(f"usermod -aG {status.st_gid} {user}"),),
            )
            return


def nvml_check(case: Case) -> Findings:
    """NVML as the daemon sees it, and every card."""
    info = case.answer("gpu_info")
    if not info:
        return
    if case.answer("health").get("safe_mode"):
        yield Finding("nvml", OK, "not looked at: SAFE_MODE is on")
        return
    gpus = info.get("gpus") or []
    fault = info.get("nvml_init_error")
    if fault and _version(case.host) is not None:
        yield Finding("nvml", FAIL, f"NVML does not start: {safe(fault)}", _nvml_mend(str(fault)))
    elif fault:
        yield Finding("nvml", OK, f"no NVML, and no driver for it: {safe(fault)}")
    elif info.get("nvml_supported"):
        yield Finding("nvml", OK, f"NVML answers{_age(info)}")
    elif gpus:
        yield Finding("nvml", OK, "cards are simulated: NVML is not asked")
    else:
        yield Finding("nvml", WARN, f"no GPU: {safe(info.get('message') or 'none was found')}")
    for gpu in gpus:
        yield from _gpu_check(gpu)


def _age(info: Any) -> str:
    sampled_s = info.get("sampled_s")
    return f", read {sampled_s:.1f} s ago" if isinstance(sampled_s, int | float) else ""


def _nvml_mend(fault: str) -> tuple[str, ...]:
    if "mismatch" in fault.lower():
        return ("the driver was upgraded under a loaded module: reboot",)
    return ("nvidia-smi   (says the same where the library is broken)",)


def _gpu_check(gpu: Any) -> Findings:
    name = f"GPU {gpu.get('index')} ({safe(gpu.get('name'))})"
    match gpu.get("state"):
        case "ok":
            yield Finding("gpu", OK, f"{name}: {gpu.get('memory_free_mb')} MiB free")
        case "cordoned":
            yield Finding(
                "gpu",
                WARN,
                f"{name} is cordoned: nothing more is granted on it",
                (f"gpuorch uncordon {gpu.get('index')}",),
            )
        case state:
            yield Finding(
                "gpu",
                FAIL,
                f"{name} is {safe(state)}: it cannot be read, and nothing is granted on it",
                (f"nvidia-smi -i {gpu.get('index')}", "dmesg | grep -i -e nvrm -e xid"),
            )


def mps_check(case: Case) -> Findings:
    """CUDA MPS: wanted, started, and seen by the daemon."""
    seen = case.answer("gpu_info").get("mps") or {}
    unit = case.host.unit(MPS_UNIT)
    runs = unit.get("ActiveState") == "active"
    wanted = (case.config or {}).get("enable_mps")
    folder = str(seen.get("pipe_dir") or (case.config or {}).get("mps_pipe_directory") or "")
    if seen.get("enabled"):
        yield Finding("mps", OK, f"the control process answers in {safe(folder)}")
    elif runs and case.answers and wanted is not False:
        yield Finding(
            "mps",
            FAIL,
            f"{MPS_UNIT} runs and the daemon does not see it: {safe(folder)} was made anew",
            (
                as_root("systemd-tmpfiles --create"),
                as_root(f"systemctl restart {MPS_UNIT} {SERVICE}"),
            ),
        )
    elif unit.get("ActiveState") == "failed":
        yield Finding(
            "mps",
            FAIL,
            f"{MPS_UNIT} failed ({unit.get('Result')})",
            (as_root(f"journalctl -u {MPS_UNIT} -n 20"), as_root(f"systemctl restart {MPS_UNIT}")),
        )
    elif wanted is True:
        yield Finding(
            "mps",
            FAIL,
            "ENABLE_MPS is true, and no control process runs",
            (as_root(f"systemctl start {MPS_UNIT}"),),
        )
    else:
        yield Finding("mps", OK, "off, and not wanted (ENABLE_MPS)")
