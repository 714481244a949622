"""Checks of what runs the daemon: its units, descriptor store, limits, and the caller's cgroup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from libclient.cli.doctor.case import LISTEN_AGAIN, METRICS_UNIT, SERVICE, SOCKET_UNIT, Case
from libclient.cli.doctor.devices import DRIVER_UNIT
from libclient.cli.doctor.findings import FAIL, OK, WARN, Finding, Findings, as_root
from libclient.cli.doctor.host import environment_of
from libclient.cli.naming import service_name
from libclient.cli.text import safe

STORE_VARIABLE: Final = "GPUORCH_DESCRIPTOR_STORE"
# Beyond this share of its bound a store is worth a word.
STORE_NEARLY_FULL: Final = 0.9
# systemd counts restarts since the last clean start; some happen at upgrades.
RESTARTS_MANY: Final = 3


def units_check(case: Case) -> Findings:
    """The units: installed, loaded as they are on disk, and running."""
    if not case.host.systemd_runs:
        yield Finding("units", OK, "systemd does not run here: no unit is looked at")
        return
    if not case.managed:
        state = case.service.get("LoadState") or "not to be asked for"
        yield Finding(
            "units",
            WARN,
            f"{SERVICE} is {safe(state)}: the daemon is not a service of this host",
            ("make install", as_root("systemctl daemon-reload")),
        )
        return
    for name in (SOCKET_UNIT, METRICS_UNIT, SERVICE, DRIVER_UNIT):
        yield from _unit_check(name, case.host.unit(name))


def _unit_check(name: str, unit: Mapping[str, str]) -> Findings:
    state, result = unit.get("ActiveState", "unknown"), unit.get("Result", "")
    if unit.get("LoadState") != "loaded":
        yield Finding("units", FAIL, f"{name} is {unit.get('LoadState')}", ("make install",))
        return
    if unit.get("NeedDaemonReload") == "yes":
        yield Finding(
            "units",
            WARN,
            f"{name} was changed on disk and not read since",
            (as_root("systemctl daemon-reload"), as_root(f"systemctl restart {name}")),
        )
    if state == "failed":
        yield Finding(
            "units",
            FAIL,
            f"{name} failed ({result})",
            (
                as_root(f"journalctl -u {name} -n 50"),
                as_root(f"systemctl reset-failed {name}"),
                _start_again(name),
            ),
        )
    elif state == "active":
        yield from _active(name, unit)
    elif name.endswith(".socket"):
        yield Finding("units", FAIL, f"{name} is {state}", (_start_again(name),))
    elif name == SERVICE:
        yield Finding("units", OK, f"{name} is {state}: the first client starts it")
    else:
        yield Finding("units", OK, f"{name} is {state}")


def _start_again(name: str) -> str:
    return as_root(LISTEN_AGAIN if name.endswith(".socket") else f"systemctl start {name}")


def _active(name: str, unit: Mapping[str, str]) -> Findings:
    boot = unit.get("UnitFileState", "")
    status = unit.get("StatusText", "")
    shown = f"{name} is active, {boot or 'not enabled'}"
    if status:
        shown += f": {safe(status)}"
    if boot == "disabled" and name != SERVICE:
        yield Finding(
            "units", WARN, f"{shown}; gone at the next boot", (as_root(f"systemctl enable {name}"),)
        )
    else:
        yield Finding("units", OK, shown)
    restarts = unit.get("NRestarts", "0")
    if restarts.isdigit() and int(restarts) > RESTARTS_MANY:
        yield Finding(
            "units",
            WARN,
            f"{name} was restarted {restarts} times after it had failed",
            (as_root(f"journalctl -u {name} -p warning -n 50"),),
        )


def store_check(case: Case) -> Findings:
    """The descriptor store: how many connections outlive the daemon's own end."""
    if not case.managed:
        yield Finding("store", OK, "no descriptor store: after a restart clients have to reattach")
        return
    unit = case.service
    most, used = unit.get("FileDescriptorStoreMax", "0"), unit.get("NFileDescriptorStore", "0")
    told = environment_of(unit).get(STORE_VARIABLE) or str(
        (case.config or {}).get("descriptor_store") or ""
    )
    if not (most.isdigit() and used.isdigit()):
        yield Finding("store", WARN, "systemd does not say how many descriptors it keeps")
    elif most == "0":
        yield Finding(
            "store",
            WARN,
            "FileDescriptorStoreMax= is 0: after a restart clients have to reattach",
            (f"set FileDescriptorStoreMax= and {STORE_VARIABLE} to the same number",),
        )
    elif told and told != most:
        yield Finding(
            "store",
            FAIL,
            f"systemd keeps {most} descriptors and drops the rest in silence, and the daemon was "
            f"told {safe(told)} ({STORE_VARIABLE})",
            (as_root(f"systemctl edit {SERVICE}   (give both the same number)"),),
        )
    elif int(used) >= STORE_NEARLY_FULL * int(most):
        yield Finding(
            "store",
            WARN,
            f"{used} of {most} descriptors are stored: soon new leases are refused (limit)",
            ("gpuorch leases", as_root(f"systemctl edit {SERVICE}   (raise both numbers)")),
        )
    else:
        yield Finding("store", OK, f"{used} of {most} connections stored, to outlive a restart")


def limits_check(case: Case) -> Findings:
    """Open files: enough for the bounds that are configured."""
    pid, config = case.daemon_pid, case.config
    if pid is None:
        yield Finding("limits", OK, "not looked at: no daemon runs")
        return
    limit = case.host.limit(pid, "Max open files")
    if limit is None:
        yield Finding("limits", WARN, f"the limits of process {pid} cannot be read")
        return
    soft, hard = limit
    if config is None:
        yield Finding("limits", OK, f"{soft} open files allowed (hard limit {hard})")
        return
    connections, processes = int(config["max_connections"]), int(config["max_processes"])
    needed = connections + processes
    bounds = f"{connections} connections and {processes} processes"
    if hard.isdigit() and int(hard) <= needed:
        yield Finding(
            "limits",
            FAIL,
            f"the hard limit of open files is {hard}, less than {bounds} take: the daemon has "
            "lowered its bounds",
            (
                as_root(f"systemctl edit {SERVICE}   (LimitNOFILE={2 * needed})"),
                as_root(f"systemctl restart {SERVICE}"),
            )
            if case.managed
            else (f"ulimit -Hn {2 * needed}   (before gpuorchd is started)",),
        )
    else:
        yield Finding("limits", OK, f"{soft} open files (hard limit {hard}) hold {bounds}")


def cgroup_check(case: Case) -> Findings:
    """The caller's cgroup: which system unit the policy takes it for."""
    text = case.host.read("/proc/self/cgroup")
    if text is None:
        yield Finding("cgroup", WARN, "/proc/self/cgroup cannot be read")
        return
    name = service_name(text)
    path = next((line[3:] for line in text.splitlines() if line.startswith("0::")), "")
    if not path:
        yield Finding(
            "cgroup",
            WARN,
            "there is no unified cgroup hierarchy here: rules by unit match systemd's own",
        )
    elif name:
        yield Finding("cgroup", OK, f"this process counts as {safe(name)}.service ({safe(path)})")
    else:
        yield Finding(
            "cgroup", OK, f"this process is in no system service ({safe(path)}): no rule by unit"
        )
