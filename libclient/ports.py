"""The port map: which program of the host answers on which port, read from `ports.txt`.

That file is the only place where the numbers stand. The daemon's default, `gpuorch doctor`, the
health and start-up scripts and everything that `make install` renders read it from here.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

FILE: Final = Path(__file__).with_name("ports.txt")

DAEMON: Final = "daemon"
AGENT: Final = "agent"
SERVICE: Final = "service"
KINDS: Final = (DAEMON, AGENT, SERVICE)
PORT_MAX: Final = 65_535


class PortMapError(ValueError):
    """A port map that cannot be. `str()` is one line: which line, and what is allowed."""


class Entry(NamedTuple):
    """One program: its name (that of its unit `justnews@NAME`), port, kind and purpose."""

    name: str
    port: int
    kind: str
    purpose: str


def parse(text: str) -> tuple[Entry, ...]:
    """Read a port map. Raises `PortMapError` for a line that cannot be, and for anything twice."""
    entries: list[Entry] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            entries.append(_entry(number, line))
    for what, values in (
        ("name", [entry.name for entry in entries]),
        ("port", [str(entry.port) for entry in entries]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise PortMapError(f"{what} {', '.join(twice)} stands in the port map more than once")
    daemons = [entry.name for entry in entries if entry.kind == DAEMON]
    if len(daemons) != 1:
        raise PortMapError(f"the port map has {len(daemons)} entries of kind daemon; it needs one")
    return tuple(entries)


def _entry(number: int, line: str) -> Entry:
    words = line.split(maxsplit=3)
    if len(words) != 4:
        raise PortMapError(f"line {number} of the port map is not: name port kind purpose")
    name, port, kind, purpose = words
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise PortMapError(f"line {number}: name {name!r}; allowed: a-z, 0-9 and _")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= PORT_MAX:
        raise PortMapError(f"line {number}: port {port!r}; allowed: 1 to {PORT_MAX}")
    if kind not in KINDS:
        raise PortMapError(f"line {number}: kind {kind!r}; allowed: {', '.join(KINDS)}")
    return Entry(name, int(port), kind, purpose.strip())


def with_daemon_port(text: str, port: int) -> str:
    """Return a port map in which the daemon has another port, all else as it is.

    Raises `PortMapError` where that port is another program's, or no port.
    """
    old = daemon(parse(text))
    lines = [
        re.sub(rf"(\s){old.port}\b", rf"\g<1>{port}", line, count=1)
        if line.split()[:2] == [old.name, str(old.port)]
        else line
        for line in text.splitlines()
    ]
    changed = "\n".join(lines) + "\n"
    parse(changed)
    return changed


def daemon(entries: tuple[Entry, ...]) -> Entry:
    """Return the entry of this project's daemon."""
    return next(entry for entry in entries if entry.kind == DAEMON)


@cache
def port_map() -> tuple[Entry, ...]:
    """Return the map of this installation, in the order of the file."""
    return parse(FILE.read_text(encoding="utf-8"))


def daemon_port() -> int:
    """Return the daemon's side HTTP port: its default, and where clients look for it."""
    return daemon(port_map()).port
