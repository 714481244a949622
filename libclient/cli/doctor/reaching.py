"""Checks of the way to the daemon: its socket, who may open it, and whether it answers."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
from typing import Final

from libclient.cli.doctor.case import (
    LISTEN_AGAIN,
    METRICS_UNIT,
    SERVICE,
    SOCKET_UNIT,
    Case,
    listener_pid,
    user_name,
)
from libclient.cli.doctor.findings import FAIL, OK, WARN, Finding, Findings, as_root
from libclient.cli.text import safe
from libclient.version import VERSION

# What the units of this project call the group whose members may open the socket.
GROUP: Final = "justnews"


def socket_check(case: Case) -> Findings:
    """The socket's file: there, a socket, whose, and whether somebody listens."""
    path = case.socket_path
    try:
        status = os.stat(path)
    except FileNotFoundError:
        yield Finding("socket", FAIL, f"{path} is not there: nobody can ask", _start(case))
        return
    except PermissionError:
        yield Finding("socket", FAIL, f"the folder of {path} is closed to user {user_name()}")
        return
    if not stat.S_ISSOCK(status.st_mode):
        yield Finding(
            "socket",
            FAIL,
            f"{path} is no socket; something else was put in its place",
            (as_root(f"rm {path}"), *_start(case)),
        )
        return
    shown = f"{path}, {_owner(status)}, mode {stat.S_IMODE(status.st_mode):04o}"
    fault = connect_fault(path)
    if fault is None or fault == errno.EAGAIN:
        keeper = "systemd listens" if listener_pid(path) == 1 else "the daemon listens"
        yield Finding("socket", OK, f"{shown}; {keeper}")
    elif fault in (errno.EACCES, errno.EPERM):
        yield Finding("socket", FAIL, f"{shown}; user {user_name()} may not open it", _join(status))
    else:
        yield Finding(
            "socket", FAIL, f"{shown}; a file is left, and nobody listens on it", _start(case)
        )
    if status.st_mode & stat.S_IWOTH:
        yield Finding(
            "socket",
            WARN,
            "everyone on this host may take leases (mode of the socket)",
            (
                f"set SocketMode=0660 in {SOCKET_UNIT}"
                if case.managed
                else "set GPUORCH_SOCKET_MODE=0660",
            ),
        )


def connect_fault(path: str) -> int | None:
    """Return why the socket cannot be connected to, as an errno, None where it can."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except OSError as fault:
            return fault.errno or errno.EIO
    return None


def _owner(status: os.stat_result) -> str:
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    return f"{user}:{_group_name(status.st_gid)}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _start(case: Case) -> tuple[str, ...]:
    if case.managed:
        return (as_root(LISTEN_AGAIN),)
    return (f"gpuorchd --socket {case.socket_path}   (or make install, for the units)",)


def _join(status: os.stat_result) -> tuple[str, ...]:
    if not status.st_mode & stat.S_IWGRP:
        return (as_root("gpuorch doctor   (only the socket's owner may open it)"),)
    group = _group_name(status.st_gid)
    return (
        as_root(f"usermod -aG {group} {user_name()}"),
        f"newgrp {group}   (or log in again)",
    )


def group_check(case: Case) -> Findings:
    """Whoever asks: in the socket's group, and whether the kernel knows it already."""
    name = user_name()
    admin = case.answer("whoami").get("admin")
    rights = "" if admin is None else ("; an admin" if admin else "; no admin")
    if os.geteuid() == 0:
        yield Finding("group", OK, f"user {name} may open the socket whatever its group{rights}")
        return
    try:
        gid = os.stat(case.socket_path).st_gid
    except OSError:
        gid = None
    entry = _entry(gid)
    if entry is None:
        yield Finding("group", WARN, f"there is no group {GROUP} on this host", ("make install",))
        return
    listed = name in entry.gr_mem
    if entry.gr_gid in {os.getegid(), *os.getgroups()}:
        yield Finding("group", OK, f"user {name} is in the group {entry.gr_name}{rights}")
    elif not case.fault:
        # Its mode, or its owner, lets them in.
        yield Finding("group", OK, f"user {name} may open the socket without its group{rights}")
    elif listed:
        yield Finding(
            "group",
            FAIL,
            f"user {name} was added to the group {entry.gr_name} after this session began",
            (f"newgrp {entry.gr_name}   (or log in again)",),
        )
    else:
        yield Finding(
            "group",
            FAIL,
            f"user {name} is not in the group {entry.gr_name}, which may open the socket",
            (
                as_root(f"usermod -aG {entry.gr_name} {name}"),
                f"newgrp {entry.gr_name}   (or log in again)",
            ),
        )


def _entry(gid: int | None) -> grp.struct_group | None:
    try:
        return grp.getgrnam(GROUP) if gid is None else grp.getgrgid(gid)
    except KeyError:
        return None


def daemon_check(case: Case) -> Findings:
    """The daemon: answers, in which version, and whether SAFE_MODE keeps everyone off."""
    if "health" not in case.answers:
        reached = connect_fault(case.socket_path) is None
        mend = _look(case) if reached else ("mend the socket first, see above",)
        yield Finding("daemon", FAIL, safe(case.fault or "no answer"), mend)
        return
    version = str(case.answer("hello").get("version"))
    if version != VERSION:
        yield Finding(
            "daemon",
            WARN,
            f"gpuorchd {safe(version)} answers, and this is gpuorch {VERSION}",
            (as_root(f"systemctl restart {SERVICE}"),) if case.managed else (),
        )
    else:
        pid = f", pid {case.daemon_pid}" if case.daemon_pid else ""
        yield Finding("daemon", OK, f"gpuorchd {version} answers{pid}")
    if case.answer("health").get("safe_mode"):
        yield Finding(
            "daemon",
            WARN,
            "SAFE_MODE is on: no GPU is touched and no lease is granted",
            ("gpuorch policy set safe_mode=false   (as an admin)",),
        )


def _look(case: Case) -> tuple[str, ...]:
    if not case.managed:
        return ("look at the output of gpuorchd where it was started",)
    return (f"systemctl status {SERVICE}", as_root(f"journalctl -u {SERVICE} -n 50"))


# What mends a failed check of `ready`, by its name.
READY_MENDS: Final = {
    "config": ("mend the line that is named, then: systemctl reload gpuorchd",),
    "http": (f"systemctl status {METRICS_UNIT}",),
    "devices": ("nvidia-smi   (does the driver answer at all?)",),
    "nvml": ("set ENABLE_NVML=false, or install the driver's libnvidia-ml.so.1",),
    "mps": ("systemctl start nvidia-mps   (or set ENABLE_MPS=false)",),
    "settings": ("df -h /var/lib/gpuorchd; ls -ld /var/lib/gpuorchd",),
    "loop": ("top   (the host is short of CPU, or memory is being swapped)",),
}


def ready_check(case: Case) -> Findings:
    """Readiness: each check of the daemon's own that fails."""
    ready = case.answer("ready")
    if not ready:
        return
    checks = ready.get("checks") or {}
    failed = {name: check for name, check in checks.items() if not check.get("ok")}
    if not failed:
        yield Finding("ready", OK, f"all {len(checks)} checks of the daemon pass")
    for name, check in failed.items():
        yield Finding(
            "ready",
            FAIL,
            f"{safe(name)}: {safe(check.get('detail') or 'failed')}",
            READY_MENDS.get(name, ()),
        )
    waiting = str(checks.get("config", {}).get("detail", ""))
    if "config" not in failed and "waits for a restart" in waiting:
        yield Finding(
            "ready", WARN, f"config: {safe(waiting)}", (as_root(f"systemctl restart {SERVICE}"),)
        )
