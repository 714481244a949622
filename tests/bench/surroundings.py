"""Where a figure was taken, and the core that it was taken on."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def machine() -> dict[str, object]:
    """Describe this machine as far as a figure depends on it."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def machine_line() -> str:
    """Describe this machine in one line."""
    facts = machine()
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_mb']} MiB, "
        f"Linux {facts['kernel']}, Python {facts['python']}"
    )


@contextmanager
def pinned_to_one_core() -> Iterator[int]:
    """Let processes that are started inside run on one core only; give its number.

    Both ends on one core: with one end per core, waking the other core is most of the time, and
    a ratio between two programs means nothing.
    """
    before = os.sched_getaffinity(0)
    # The last: interrupts tend to be served by the first.
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def resident_kb(pid: int) -> int:
    """Return the resident memory of a process in KiB."""
    return int((_field(f"/proc/{pid}/status", "VmRSS") or "0 kB").split()[0])


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
