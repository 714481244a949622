"""What the host shows: files of the kernel, units of the service manager, programs' answers.

Everything is read below `root`, so that a test can show a host of its own. What cannot be read is
None: the doctor says so and looks at the next thing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

# systemctl and gpuorchd --check-config answer within tenths of a second.
PROGRAM_S: Final = 5.0
PROPERTIES: Final = (
    "LoadState,ActiveState,SubState,Result,UnitFileState,NeedDaemonReload,NRestarts,MainPID,"
    "StatusText,ExecStart,Environment,User,Group,Listen,FileDescriptorStoreMax,"
    "NFileDescriptorStore,LimitNOFILE,FragmentPath,StateChangeTimestamp"
)


class Ran(NamedTuple):
    """How a program ended. `code` None: it could not be started, or not within its time."""

    code: int | None
    output: str
    errors: str


class Listening(NamedTuple):
    """A TCP socket that listens, and who has it, as far as that may be seen."""

    address: str
    pid: int | None
    command: str


class Host:
    """The host as it is now. Each unit is asked for once."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._units: dict[str, Mapping[str, str]] = {}

    def path(self, name: str) -> Path:
        """Return where a path of the host lies."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """Return the text of a file, None where it cannot be read."""
        try:
            return self.path(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    @property
    def systemd_runs(self) -> bool:
        """Whether systemd is the service manager, and can be asked."""
        return self.path("/run/systemd/system").is_dir() and bool(shutil.which("systemctl"))

    def unit(self, name: str) -> Mapping[str, str]:
        """Return the properties of a unit; empty where nobody can be asked."""
        if name not in self._units:
            self._units[name] = self._show(name) if self.systemd_runs else {}
        return self._units[name]

    def _show(self, name: str) -> Mapping[str, str]:
        done = run(["systemctl", "show", "--timestamp=unix", "-p", PROPERTIES, name])
        if done.code != 0:
            return {}
        pairs = (line.partition("=") for line in done.output.splitlines())
        shown: dict[str, str] = {}
        for key, _, value in pairs:
            # A socket has one line for each place where it listens.
            shown[key] = f"{shown[key]}\n{value}" if key in shown else value
        return shown

    def listening(self, port: int) -> list[Listening]:
        """Return who listens on a TCP port of this host's own network."""
        found = []
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in (self.read(table) or "").splitlines()[1:]:
                words = line.split()
                address, _, number = words[1].rpartition(":")
                if words[3] == LISTENS and int(number, 16) == port:
                    pid = self._holder(words[9])
                    found.append(Listening(_address(address), pid, self.command(pid)))
        return found

    def _holder(self, inode: str) -> int | None:
        """Return a process that has this socket; of other users' processes only root sees it."""
        link = f"socket:[{inode}]"
        for entry in sorted(self.path("/proc").glob("[0-9]*/fd/*")):
            try:
                if os.readlink(entry) == link:
                    return int(entry.parts[-3])
            except OSError:
                continue
        return None

    def command(self, pid: int | None) -> str:
        """Return a process's command line, empty where it cannot be seen."""
        line = self.read(f"/proc/{pid}/cmdline") if pid else None
        return " ".join((line or "").split("\0")).strip()[:80]

    def limit(self, pid: int, name: str) -> tuple[str, str] | None:
        """Return the soft and hard limit of a process by its name in /proc/PID/limits."""
        for line in (self.read(f"/proc/{pid}/limits") or "").splitlines():
            if line.startswith(name):
                soft, hard, *_ = line.removeprefix(name).split()
                return soft, hard
        return None


# The state of a listening socket in /proc/net/tcp.
LISTENS: Final = "0A"


def _address(text: str) -> str:
    """Turn the kernel's hexadecimal address into the usual writing."""
    if len(text) == 8:
        return socket.inet_ntoa(struct.pack("=I", int(text, 16)))
    words = [int(text[at : at + 8], 16) for at in range(0, 32, 8)]
    return socket.inet_ntop(socket.AF_INET6, struct.pack("=4I", *words))


def run(words: Sequence[str], environ: Mapping[str, str] | None = None) -> Ran:
    """Run a program to its end. Raises nothing for what it does."""
    try:
        done = subprocess.run(
            words,
            env=None if environ is None else {**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PROGRAM_S,
        )
    except OSError as fault:
        return Ran(None, "", f"{words[0]}: {fault.strerror}")
    except subprocess.TimeoutExpired:
        return Ran(None, "", f"{words[0]} did not answer within {PROGRAM_S:g} s")
    return Ran(done.returncode, done.stdout, done.stderr)


def command_of(unit: Mapping[str, str]) -> list[str]:
    """Return the command line of a service as its unit has it, empty where it has none."""
    match = re.search(r"argv\[\]=(.*?) ; ", unit.get("ExecStart", ""))
    return match[1].split() if match else []


def environment_of(unit: Mapping[str, str]) -> dict[str, str]:
    """Return what the unit sets in the environment of its service."""
    try:
        words = shlex.split(unit.get("Environment", ""))
    except ValueError:
        return {}
    return {name: value for name, sep, value in (word.partition("=") for word in words) if sep}
