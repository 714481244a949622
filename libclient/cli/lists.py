"""How GPUs, leases and waiting requests look as tables, for `status`, `leases` and `queue`.

A value that the daemon could not read is shown as `?`, never as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from time import time
from typing import Any

from libclient.cli.screen import Screen
from libclient.cli.tables import Cell, Column, Row, Segment, bar
from libclient.cli.text import Paint, safe
from libclient.sizes import format_duration, format_memory

Entry = Mapping[str, Any]

# Marks differ by themselves: a bar can be read without colours.
MARKS = {"leased": ("█", "#"), "draining": ("▓", "="), "unleased": ("▒", "~"), "free": ("·", ".")}
STYLES = {"leased": "green", "draining": "yellow", "unleased": "magenta", "free": "dim"}
WORDS = {"unleased": "outside leases"}
BAR_WIDTH = 32
NARROW_BAR_WIDTH = 16
# From here on a terminal has room for the long bar.
WIDE = 110

STATE_STYLES = {
    "ok": "green",
    "active": "green",
    "revoking": "yellow",
    "draining": "yellow",
    "detached": "yellow",
    "cordoned": "yellow",
    "unhealthy": "bold red",
    "unknown": "red",
}
PRIORITY_STYLES = {"critical": "bold", "background": "dim"}

GPU_COLUMNS = (
    Column("GPU", right=True),
    Column("NAME", least=16, rank=1),
    Column("STATE"),
    Column("MEMORY"),
    Column("LEASED", right=True),
    Column("DRAINING", right=True, rank=5),
    Column("OUTSIDE", right=True, rank=4),
    Column("FREE", right=True),
    Column("TOTAL", right=True, rank=3),
    Column("UTIL", right=True, rank=6),
    Column("TEMP", right=True, rank=7),
)
LEASE_COLUMNS = (
    Column("AGENT", least=10),
    Column("GPU", right=True),
    Column("MEMORY", right=True),
    Column("USED", right=True, rank=3),
    Column("STATE"),
    Column("PRIORITY", rank=4),
    Column("HELD", right=True, rank=1),
    Column("PID", right=True),
    Column("USER", least=6, rank=6),
    Column("LEASE", rank=5),
    Column("PURPOSE", least=8, rank=7),
)
QUEUE_COLUMNS = (
    Column("PLACE", right=True),
    Column("AGENT", least=10),
    Column("MEMORY", right=True),
    Column("GPUS", right=True, rank=2),
    Column("PRIORITY", rank=1),
    Column("WAITED", right=True),
    Column("ETA", right=True),
    Column("ID", rank=3),
)


def memory_parts(gpu: Entry) -> dict[str, int] | None:
    """Return what a GPU's memory goes to, in MiB; None where that is not known.

    `free` is what leases could still have: less than the driver's figure, because what is leased
    and not yet used is nobody else's either.
    """
    total = gpu.get("memory_total_mb")
    parts = {name: gpu.get(f"memory_{name}_mb") for name in ("leased", "draining", "unleased")}
    if not isinstance(total, int) or not all(isinstance(v, int) for v in parts.values()):
        return None
    known = {name: int(value or 0) for name, value in parts.items()}
    free = max(0, total - sum(known.values()))
    # The driver keeps something for itself, too.
    seen = gpu.get("memory_free_mb")
    return {**known, "free": min(free, seen) if isinstance(seen, int) else free}


def memory_bar(gpu: Entry, width: int, paint: Paint, unicode: bool) -> Cell:
    """Return a GPU's memory as a bar: leased, draining, outside leases, free."""
    parts = memory_parts(gpu)
    if parts is None:
        return Cell("?" * 3, "red")
    mark = 0 if unicode else 1
    segments = [Segment(parts[name], MARKS[name][mark], STYLES[name]) for name in MARKS]
    return bar(segments, width, paint)


def legend(paint: Paint, unicode: bool) -> str:
    """Return what the marks of the bars mean."""
    mark = 0 if unicode else 1
    return "  ".join(
        f"{paint(MARKS[name][mark], STYLES[name])} {WORDS.get(name, name)}" for name in MARKS
    )


def gpu_rows(gpus: Sequence[Entry], screen: Screen) -> list[Row]:
    """Return one row a GPU, for `GPU_COLUMNS`."""
    width = BAR_WIDTH if (screen.width or WIDE) >= WIDE else NARROW_BAR_WIDTH
    return [
        [
            Cell(safe(gpu.get("index"))),
            # Every card here is theirs; what tells them apart comes after it.
            Cell(safe(gpu.get("name")).removeprefix("NVIDIA ")),
            state_cell(gpu.get("state")),
            memory_bar(gpu, width, screen.paint, screen.unicode),
            *(Cell(format_memory((memory_parts(gpu) or {}).get(name))) for name in MARKS),
            Cell(format_memory(gpu.get("memory_total_mb"))),
            Cell(_with_unit(gpu.get("utilization_gpu_pct"), "%")),
            Cell(_with_unit(gpu.get("temperature_c"), " C")),
        ]
        for gpu in gpus
    ]


def lease_rows(allocations: Sequence[Entry]) -> list[Row]:
    """Return one row a lease, for `LEASE_COLUMNS`."""
    now = time()
    return [
        [
            Cell(safe(lease.get("agent")), "bold"),
            Cell(gpu_numbers(lease)),
            Cell(format_memory(lease_memory(lease))),
            Cell(format_memory(lease.get("used_mb"))),
            state_cell(lease.get("state")),
            Cell(safe(lease.get("priority")), PRIORITY_STYLES.get(lease.get("priority") or "", "")),
            Cell(age(held_s(lease, now))),
            Cell(safe(lease.get("pid"))),
            Cell(safe(user_name(lease.get("uid")))),
            Cell(safe(lease.get("lease_id")), "dim"),
            Cell(safe(lease.get("purpose") or "")),
        ]
        for lease in allocations
    ]


def queue_rows(waiting: Sequence[Entry]) -> list[Row]:
    """Return one row a waiting request, for `QUEUE_COLUMNS`."""
    return [
        [
            Cell(safe(request.get("position"))),
            Cell(safe(request.get("agent")), "bold"),
            Cell("whole GPU" if request.get("exclusive") else format_memory(_asked_mb(request))),
            Cell(safe(request.get("gpus", "?"))),
            Cell(
                safe(request.get("priority")),
                PRIORITY_STYLES.get(request.get("priority") or "", ""),
            ),
            Cell(age(request.get("waited_s"))),
            Cell(age(request.get("eta_s"))),
            Cell(safe(request.get("queue_id")), "dim"),
        ]
        for request in waiting
    ]


def state_cell(state: object) -> Cell:
    """Return a state in its colour."""
    word = safe(state)
    return Cell(word, STATE_STYLES.get(word, ""))


def gpu_numbers(lease: Entry) -> str:
    """Return the indices of a lease's GPUs, such as `0,1`."""
    return ",".join(safe(gpu.get("index")) for gpu in lease.get("gpus") or ())


def lease_memory(lease: Entry) -> int | None:
    """Return MiB over all of a lease's GPUs; None where one is not known."""
    amounts = [gpu.get("memory_mb") for gpu in lease.get("gpus") or ()]
    return sum(amounts) if all(isinstance(amount, int) for amount in amounts) else None


def held_s(lease: Entry, now: float) -> float | None:
    """Return for how long a lease has been held."""
    since = lease.get("timestamp")
    return max(0.0, now - since) if isinstance(since, int | float) else None


def age(seconds: float | None) -> str:
    """Return a time in whole seconds: what changes faster cannot be read in a table."""
    return format_duration(None if seconds is None else float(int(seconds)))


@cache
def user_name(uid: object) -> str:
    """Return the name of a user of this host, else the number."""
    from pwd import getpwuid

    try:
        return getpwuid(uid).pw_name if isinstance(uid, int) else "?"
    except (KeyError, OverflowError):
        return str(uid)


def _asked_mb(request: Entry) -> int | None:
    for name in ("memory_mb", "min_memory_mb"):
        if isinstance(request.get(name), int):
            return int(request[name])
    return None


def _with_unit(value: object, unit: str) -> str:
    return "?" if not isinstance(value, int | float) else f"{round(value)}{unit}"
