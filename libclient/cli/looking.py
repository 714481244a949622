"""`status`, `leases` and `queue`: what is there, once."""

from __future__ import annotations

from typing import Any

from libclient.cli import exits
from libclient.cli.invocation import Invocation
from libclient.cli.lists import (
    GPU_COLUMNS,
    LEASE_COLUMNS,
    QUEUE_COLUMNS,
    gpu_rows,
    lease_rows,
    legend,
    queue_rows,
)
from libclient.cli.screen import Screen
from libclient.cli.tables import Cell, flow
from libclient.cli.text import counted, plain, safe
from libclient.sizes import format_duration

# `status` fits on a screen; `leases` and `queue` show everything.
HOLDERS_SHOWN = 20
WAITING_SHOWN = 10


def status(invocation: Invocation) -> int:
    """Show the daemon, its GPUs, who holds what and who waits."""
    seen = look(invocation)
    screen = invocation.screen
    if screen.json:
        screen.document(seen)
        return exits.OK
    show_daemon(screen, seen)
    info, allocations, waiting = seen["gpu_info"], seen["allocations"], seen["waiting"]
    screen.line()
    if info.get("gpus"):
        screen.table(GPU_COLUMNS, gpu_rows(info["gpus"], screen))
        screen.line(legend(screen.paint, screen.unicode))
    else:
        screen.line(safe(info.get("message") or "no GPU"))
    screen.line()
    if allocations:
        screen.table(LEASE_COLUMNS, lease_rows(allocations[:HOLDERS_SHOWN]))
        _more(screen, len(allocations) - HOLDERS_SHOWN, "lease", "gpuorch leases")
    else:
        screen.line("nobody holds a lease")
    screen.line()
    if waiting:
        screen.table(QUEUE_COLUMNS, queue_rows(waiting[:WAITING_SHOWN]))
        _more(screen, len(waiting) - WAITING_SHOWN, "request", "gpuorch queue")
    else:
        screen.line("nobody waits")
    return exits.OK


def leases(invocation: Invocation) -> int:
    """List every lease."""
    found = invocation.pages("allocations", "allocations")
    if invocation.screen.json:
        invocation.screen.document({"allocations": found})
    elif found:
        invocation.screen.table(LEASE_COLUMNS, lease_rows(found))
    else:
        invocation.screen.line("nobody holds a lease")
    return exits.OK


def queue(invocation: Invocation) -> int:
    """List every waiting request."""
    found = invocation.pages("queue", "waiting")
    if invocation.screen.json:
        invocation.screen.document({"waiting": found})
    elif found:
        invocation.screen.table(QUEUE_COLUMNS, queue_rows(found))
    else:
        invocation.screen.line("nobody waits")
    return exits.OK


def look(invocation: Invocation) -> dict[str, Any]:
    """Ask for everything that `status` shows. Raises Unavailable or RequestError."""
    return {
        "daemon": {**invocation.call("hello"), "socket": invocation.client().path},
        "ready": invocation.call("ready"),
        "gpu_info": invocation.call("gpu_info"),
        "allocations": invocation.pages("allocations", "allocations"),
        "waiting": invocation.pages("queue", "waiting"),
    }


def show_daemon(screen: Screen, seen: dict[str, Any]) -> None:
    """Write the head of `status`: SAFE_MODE before all else, then the daemon and its checks."""
    for line in daemon_lines(screen, seen, screen.width):
        screen.line(line)


def daemon_lines(screen: Screen, seen: dict[str, Any], width: int | None) -> list[str]:
    """Return the lines of the head of `status`, fitted to a width where there is one."""
    daemon, ready, info = seen["daemon"], seen["ready"], seen["gpu_info"]
    sampled_s = info.get("sampled_s")
    parts = [
        Cell(f"gpuorchd {safe(daemon.get('version'))}", "bold"),
        Cell("ready", "green") if ready.get("ready") else Cell("not ready", "bold red"),
        Cell(safe(daemon.get("socket"))),
        Cell(counted(len(info.get("gpus") or ()), "GPU")),
    ]
    if info.get("mps_enabled"):
        parts.append(Cell("MPS"))
    if isinstance(sampled_s, int | float):
        parts.append(Cell(f"read {format_duration(round(sampled_s, 1))} ago"))
    lines = []
    if daemon.get("safe_mode"):
        text = "SAFE_MODE is on: no GPU is touched, no lease is granted"
        lines += _sentence(screen, text, "bold red", width)
    lines += flow(parts, width, screen.paint, screen.ellipsis)
    for text in failed_checks(ready):
        less = None if width is None else width - 2
        lines += [f"  {line}" for line in _sentence(screen, text, "red", less)]
    return lines


def _sentence(screen: Screen, text: str, style: str, width: int | None) -> list[str]:
    words = [Cell(word) for word in text.split(" ")]
    lines = flow(words, width, plain, screen.ellipsis, gap=" ")
    return [screen.paint(line, style) for line in lines]


def failed_checks(ready: dict[str, Any]) -> list[str]:
    """Return the checks of a `ready` answer that failed, one line each."""
    checks = ready.get("checks") or {}
    return [
        f"{safe(name)}: {safe(check.get('detail') or 'failed')}"
        for name, check in checks.items()
        if isinstance(check, dict) and not check.get("ok")
    ]


def _more(screen: Screen, count: int, noun: str, command: str) -> None:
    if count > 0:
        screen.line(screen.paint(f"and {counted(count, noun)} more: {command}", "dim"))
