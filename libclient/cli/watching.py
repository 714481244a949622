"""`events`: what happens, one line an event, as it happens."""

from __future__ import annotations

from collections.abc import Mapping
from time import localtime, monotonic, sleep, strftime
from typing import Any

from libclient.cli import exits
from libclient.cli.invocation import Invocation
from libclient.cli.screen import Screen, complain
from libclient.cli.text import Paint, safe
from libclient.errors import TIMEOUT, RequestError, Unavailable, may_pass
from libclient.sizes import format_duration, format_memory
from libclient.wire.vocabulary import EVENTS_LOST

# What every event has; it is said by the line itself.
ENVELOPE = ("event", "seq", "time", "subscription")
FOREVER_S = 1_000_000.0
# A daemon that restarts is back within tenths of a second.
RETRY_S = 0.2

STYLES = {
    "lease.granted": "green",
    "lease.denied": "red",
    "lease.revoking": "yellow",
    "lease.revoked": "yellow",
    "lease.expired": "yellow",
    "lease.withheld": "bold red",
    "lease.over_limit": "bold red",
    "gpu.unhealthy": "bold red",
    "gpu.vanished": "bold red",
    "gpu.recovered": "green",
    "daemon.safe_mode": "bold yellow",
    "daemon.stopping": "bold yellow",
    EVENTS_LOST: "bold red",
}


def events(invocation: Invocation) -> int:
    """Print events until there were enough, the time is over, or Ctrl-C."""
    args = invocation.args
    end_s = monotonic() + (FOREVER_S if args.span is None else args.span)
    left = args.count
    missing = False
    while monotonic() < end_s and left != 0:
        invocation.restart_budget()
        try:
            stream = invocation.client().events(args.topic)
            if missing:
                complain("the daemon is back")
            missing = False
            while left != 0:
                _print(stream.next(max(0.0, end_s - monotonic())), invocation.screen)
                left = None if left is None else left - 1
        except (Unavailable, RequestError) as fault:
            if getattr(fault, "reason", None) == TIMEOUT and monotonic() >= end_s:
                break
            if not args.follow or not may_pass(fault):
                raise
            if not missing:
                complain(f"{fault}; waiting for it")
            missing = True
            sleep(max(0.0, min(RETRY_S, end_s - monotonic())))
    return exits.OK


def _print(event: Mapping[str, Any], screen: Screen) -> None:
    if screen.json:
        screen.record(event)
        return
    screen.line(event_line(event, screen.paint))
    screen.flush()


def event_line(event: Mapping[str, Any], paint: Paint) -> str:
    """Return an event as one line: time, name, and its fields in words."""
    name = safe(event.get("event"))
    time = event.get("time")
    when = strftime("%H:%M:%S", localtime(time)) if isinstance(time, int | float) else " " * 8
    fields = " ".join(
        f"{paint(safe(field) + '=', 'dim')}{show_field(field, value)}"
        for field, value in event.items()
        if field not in ENVELOPE and value is not None
    )
    shown = paint(name.ljust(16), STYLES.get(name, "bold"))
    return f"{paint(when, 'dim')} {shown} {fields}".rstrip()


def show_field(field: str, value: object) -> str:
    """Return a field's value by its unit: sizes and times as people write them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if field.endswith("_mb"):
            return format_memory(round(value)).replace(" ", "")
        if field.endswith("_s"):
            return format_duration(value)
    if isinstance(value, list):
        return ",".join(_short(entry) for entry in value) or "-"
    if isinstance(value, str) and (not value or " " in value):
        return f"'{safe(value)}'"
    return safe(value)


def _short(entry: object) -> str:
    """Return one entry of a list; a GPU by its index and memory."""
    if isinstance(entry, dict) and "index" in entry:
        memory = entry.get("memory_mb")
        amount = f":{format_memory(memory).replace(' ', '')}" if isinstance(memory, int) else ""
        return f"{safe(entry['index'])}{amount}"
    return safe(entry)
