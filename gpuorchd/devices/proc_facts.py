"""What /proc says of one process: when it started, who its parents are, which unit it is in.

Read by the probe's child for the processes on a GPU and by the daemon for its peers; so it imports
next to nothing. Everything here is true only of the moment of reading: a number may by then belong
to another process, and the caller is the one who knows (a pidfd that is still alive, a start time
that still fits).
"""

from __future__ import annotations

import os
from typing import NamedTuple

# A file of /proc that is read here is far smaller; a cgroup path may be 4,096 bytes long.
READ_BYTES = 16_384
# Nobody's chain of parents is longer; a bound, because it is followed while it changes.
ANCESTORS_MAX = 64
# What systemd names its units by, and may therefore stand in a cgroup path. Slices are passed over.
UNIT_SUFFIXES = (".service", ".scope", ".mount", ".socket", ".swap")


class StatFacts(NamedTuple):
    """Fields of /proc/PID/stat: name, state (one letter), parent, start in ticks since boot."""

    comm: str
    state: str
    ppid: int
    start_ticks: int


def read_small(path: str) -> bytes | None:
    """Read a small file of /proc whole; None where it, or its process, is gone or hidden."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        return os.read(fd, READ_BYTES)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)


def parse_stat(text: bytes) -> StatFacts | None:
    """Read the text of a /proc/PID/stat; None where it is not one."""
    # The name is in parentheses and may hold parentheses and spaces itself: the last one ends it.
    opening, closing = text.find(b"("), text.rfind(b")")
    fields = text[closing + 2 :].split()
    # After the name: state, ppid, ... and the start time as field 22 of all, 20 of these.
    if opening < 0 or closing < opening or len(fields) < 20:
        return None
    try:
        ppid, start_ticks = int(fields[1]), int(fields[19])
    except ValueError:
        return None
    comm = text[opening + 1 : closing].decode("utf-8", "replace")
    return StatFacts(comm, fields[0].decode("ascii", "replace"), ppid, start_ticks)


def read_stat(pid: int) -> StatFacts | None:
    """Read /proc/PID/stat; None where the process is gone."""
    text = read_small(f"/proc/{pid}/stat")
    return None if text is None else parse_stat(text)


def parse_unit(cgroup: str) -> str | None:
    """Name the system unit in the text of a /proc/PID/cgroup: its first component below the slices.

    What is deeper says nothing, because whoever owns the unit can make it. None where no unit
    stands there (a container runtime's own group, the root, a path outside of our namespace).
    """
    chosen = ""
    for line in cgroup.splitlines():
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "name=systemd":
            # Where both hierarchies are there, this one is systemd's.
            chosen = path
            break
        if controllers == "":
            chosen = path
    for component in chosen.split("/"):
        # systemd puts "_" before a name that the kernel would take for a file of its own, such as
        # "memory.service".
        name = component.removeprefix("_")
        if name == "" or name.endswith(".slice"):
            continue
        return name if name.endswith(UNIT_SUFFIXES) else None
    return None


def read_unit(pid: int) -> str | None:
    """Name the system unit of a process; None where it has none or is gone."""
    text = read_small(f"/proc/{pid}/cgroup")
    return None if text is None else parse_unit(text.decode("utf-8", "replace"))


def service_of(unit: str | None) -> str | None:
    """Give the unit where it is a system service that can be one agent's own, else None.

    A session's scope holds whatever its user starts, and so does user@UID.service.
    """
    if unit is None or not unit.endswith(".service") or unit.startswith("user@"):
        return None
    return unit


def read_uid(pid: int) -> int | None:
    """Read a process's real uid; None where it is gone."""
    text = read_small(f"/proc/{pid}/status") or b""
    for line in text.splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[1])
    return None


class Family:
    """The processes of one moment, each read once, and who descends from whom."""

    __slots__ = ("_stats",)

    def __init__(self) -> None:
        self._stats: dict[int, StatFacts | None] = {}

    def stat(self, pid: int) -> StatFacts | None:
        """Read a process, or recall what was read."""
        if pid not in self._stats:
            self._stats[pid] = read_stat(pid)
        return self._stats[pid]

    def ancestors(self, pid: int) -> list[tuple[int, int]]:
        """List the living parents as (pid, start_ticks), nearest first, without pid 1."""
        chain: list[tuple[int, int]] = []
        child = self.stat(pid)
        while child is not None and child.ppid > 1 and len(chain) < ANCESTORS_MAX:
            parent = self.stat(child.ppid)
            # One that began after its child has been given the number of a parent that died.
            if parent is None or parent.start_ticks > child.start_ticks:
                break
            chain.append((child.ppid, parent.start_ticks))
            child = parent
        return chain
