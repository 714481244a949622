"""Checks of the configuration: the env file, and the side HTTP port with whoever has it."""

from __future__ import annotations

import os
import re
import stat
from typing import Final

from libclient.cli.doctor.case import (
    LISTEN_AGAIN,
    METRICS_UNIT,
    PROGRAM_MISSING,
    SERVICE,
    Case,
    user_name,
)
from libclient.cli.doctor.findings import FAIL, OK, WARN, Finding, Findings, as_root
from libclient.cli.doctor.host import Listening
from libclient.cli.side_http import ask
from libclient.cli.text import safe
from libclient.ports import daemon_port

VARIABLE: Final = "GPU_ORCHESTRATOR_PORT"
HTTP_S: Final = 1.0


def env_file_check(case: Case) -> Findings:
    """The env file: there, kept from others, and what the daemon can be configured with."""
    path = case.env_file
    try:
        status = os.stat(case.host.path(path))
    except FileNotFoundError:
        level = FAIL if case.managed else OK
        mend = (as_root("make install"),) if case.managed else ()
        yield Finding("env file", level, f"{path} is not there", mend)
        status = None
    except OSError as fault:
        yield Finding("env file", WARN, f"{path}: {fault.strerror}")
        status = None
    if case.config is not None:
        # The daemon's program warns of the mode as well.
        for warning in case.config_warnings:
            yield _warned(case, warning)
        if status is not None and not case.config_warnings:
            yield Finding("env file", OK, f"{path} is valid")
        yield from _edited_check(case, status)
    elif case.config_fault == PROGRAM_MISSING:
        yield Finding("env file", OK, "not checked: the daemon's program is not on this host")
    elif "Permission denied" in case.config_fault:
        yield _unseen(case)
    else:
        yield Finding("env file", FAIL, safe(case.config_fault), _edit(case, case.config_fault))
    if case.config is None and status is not None:
        yield from _mode_check(path, status)


def _warned(case: Case, warning: str) -> Finding:
    """Turn a warning of the daemon's program into a finding."""
    found, chmod, rest = warning.partition("; chmod ")
    if chmod:
        return Finding("env file", WARN, safe(found), (as_root(f"chmod {rest}"),))
    if case.env_file in warning or not case.managed:
        return Finding("env file", WARN, safe(warning), _edit(case, warning))
    # It stands in the environment that the unit gives.
    mend = as_root(f"systemctl edit {SERVICE}   (Environment=)")
    return Finding("env file", WARN, safe(warning), (mend,))


def _unseen(case: Case) -> Finding:
    """Say what is known of a file that whoever asks may not read, as is right."""
    config = (case.answer("ready").get("checks") or {}).get("config") or {}
    if config.get("ok"):
        return Finding("env file", OK, f"{case.env_file} is closed to you, and in force as read")
    return Finding(
        "env file",
        WARN,
        f"user {user_name()} may not read {case.env_file}: what is in it was not checked",
        (as_root("gpuorch doctor"),),
    )


def _mode_check(path: str, status: os.stat_result) -> Findings:
    mode = stat.S_IMODE(status.st_mode)
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        yield Finding(
            "env file",
            WARN,
            f"{path} has mode {mode:04o}: others than root and the daemon reach it",
            (as_root(f"chmod 0640 {path}"),),
        )


def _edit(case: Case, said: str) -> tuple[str, ...]:
    match = re.search(rf"{re.escape(case.env_file)}:(\d+)", said)
    place = f"+{match[1]} " if match else ""
    reload = as_root(f"systemctl reload {SERVICE}" if case.managed else "kill -HUP of the daemon")
    return (as_root(f"${{EDITOR:-vi}} {place}{case.env_file}"), reload)


def _edited_check(case: Case, status: os.stat_result | None) -> Findings:
    """Whether the file is newer than what the daemon last read."""
    changed = case.service.get("StateChangeTimestamp", "").removeprefix("@")
    runs = case.service.get("ActiveState") == "active"
    # The service manager's time has whole seconds.
    if status is not None and runs and changed.isdigit() and status.st_mtime > int(changed) + 1:
        yield Finding(
            "env file",
            WARN,
            f"{case.env_file} was edited after the daemon had read it",
            (as_root(f"systemctl reload {SERVICE}"),),
        )


def port_check(case: Case) -> Findings:
    """The side HTTP port: the same everywhere, and the daemon's own."""
    configured = (case.config or {}).get("http_port")
    fallback = configured if isinstance(configured, int) else daemon_port()
    port = _served_port(case) or _socket_port(case) or fallback
    if port == 0:
        yield Finding("port", OK, f"no side HTTP port is wanted ({VARIABLE}=0)")
        return
    if case.managed and isinstance(configured, int) and configured != port:
        yield Finding(
            "port",
            FAIL,
            f"{VARIABLE} is {configured}, and {METRICS_UNIT} listens on {port}, which is used",
            _move(configured),
        )
    reached = ask(port, "/health", HTTP_S)
    if reached.status == 200 and "safe_mode" in reached.document:
        yield Finding("port", OK, f"127.0.0.1:{port} answers /health as gpuorchd")
    elif not reached.listening:
        yield from _silent_check(case, port)
    else:
        yield from _foreign_check(case, port, case.host.listening(port))


def _served_port(case: Case) -> int | None:
    """Return the port that the daemon itself says it answers on."""
    check = (case.answer("ready").get("checks") or {}).get("http") or {}
    match = re.search(r":(\d+)$", str(check.get("detail"))) if check.get("ok") else None
    return int(match[1]) if match else None


def _socket_port(case: Case) -> int | None:
    match = re.search(r":(\d+) \(Stream\)", case.host.unit(METRICS_UNIT).get("Listen", ""))
    return int(match[1]) if match else None


def _move(port: int) -> tuple[str, ...]:
    folder = f"/etc/systemd/system/{METRICS_UNIT}.d"
    lines = rf"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n"
    return (
        as_root(f"mkdir -p {folder}"),
        f"printf '{lines}' | " + as_root(f"tee {folder}/port.conf"),
        as_root("systemctl daemon-reload"),
        # The socket cannot be started while the service runs, which then brings it back.
        as_root(f"systemctl stop {METRICS_UNIT}"),
        as_root(LISTEN_AGAIN),
    )


def _silent_check(case: Case, port: int) -> Findings:
    mend: tuple[str, ...] = ()
    if case.managed:
        mend = (as_root(LISTEN_AGAIN),)
    elif not case.fault:
        mend = (f"start gpuorchd with --http-port {port}",)
    level = WARN if case.managed or not case.fault else OK
    yield Finding("port", level, f"nobody listens on 127.0.0.1:{port}", mend)


def _foreign_check(case: Case, port: int, holders: list[Listening]) -> Findings:
    holder = next((one for one in holders if one.pid is not None), None)
    if holder is not None and holder.pid in {1, case.daemon_pid}:
        yield Finding(
            "port",
            FAIL,
            f"127.0.0.1:{port} is the daemon's and gives no answer to /health",
            (as_root(f"journalctl -u {SERVICE} -n 50"),),
        )
        return
    who = f"process {holder.pid} ({safe(holder.command)})" if holder else "another process"
    find = () if holder else (as_root(f"ss -ltnp 'sport = :{port}'"),)
    end = (as_root(f"kill {holder.pid}"),) if holder else ()
    again = (as_root(LISTEN_AGAIN),) if case.managed else ()
    yield Finding("port", FAIL, f"127.0.0.1:{port} is in use by {who}", (*find, *end, *again))
