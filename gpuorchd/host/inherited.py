"""The sockets that the service manager passed, each matched by its name and its type.

Owns the reading of `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`, once and before anything else
is opened. A descriptor's place says nothing: sockets come in the order of the units, stored ones
after them in any order. What has no known name, or not the type that goes with its name, is closed
and reported, so that it cannot keep a client or a port waiting for nobody.

    variables -> removed -> each descriptor: close-on-exec, name, type -> Inherited
"""

from __future__ import annotations

import os
import re
import resource
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass, field

# FileDescriptorName= of the two socket units.
LISTENER_NAME = "gpuorchd.socket"
METRICS_NAME = "gpuorchd-metrics.socket"
# A stored connection is named with its number in base 36, so that 1,000 names stay small: all of
# them travel in one environment string.
STORED_NAME = re.compile(r"[0-9a-z]{1,8}")
# The first descriptor that is passed.
FDS_START = 3
# The descriptor table of a process has no more digits than that.
COUNT_DIGITS_MAX = 9
# The last came with later versions of the service manager and says no more than the others.
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


@dataclass(slots=True)
class Inherited:
    """What was passed. Whoever takes a socket out closes it; `close` closes the rest.

    `listener`: a listening Unix stream socket. `metrics`: a listening IPv4 stream socket. `stored`:
    Unix stream connections by their name in the descriptor store; their peer may be dead by now.
    `problems`: what was not taken, one line each, for the log. `passed`: how many descriptors came,
    those not taken included.
    """

    listener: socket.socket | None = None
    metrics: socket.socket | None = None
    stored: dict[str, socket.socket] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    passed: int = 0

    def close(self) -> None:
        """Close every socket that is still here."""
        for sock in (self.listener, self.metrics, *self.stored.values()):
            if sock is not None:
                sock.close()
        self.listener = self.metrics = None
        self.stored.clear()


def take_inherited(environ: MutableMapping[str, str], first: int = FDS_START) -> Inherited:
    """Take over what was passed to this process and remove the variables.

    Call it once, before anything is opened. Raises nothing: what cannot be used is closed and
    named in `problems`. `first` is where the descriptors begin.
    """
    pid, count, names, _ = (environ.pop(name, "") for name in VARIABLES)
    inherited = Inherited()
    # Variables for another process reach us where a parent did not remove them: the numbers may
    # be any files of ours.
    if pid != str(os.getpid()):
        return inherited
    number = _count(count, first, inherited.problems)
    labels = names.split(":") if names else []
    if len(labels) != number:
        if number:
            inherited.problems.append(
                f"LISTEN_FDNAMES names {len(labels)} descriptors of {number} that were passed: "
                "all of them are closed"
            )
        # Names that are not known match nothing.
        labels = [""] * number
    inherited.passed = number
    for fd, name in enumerate(labels, first):
        _take(fd, name, inherited)
    return inherited


def _count(value: str, first: int, problems: list[str]) -> int:
    bound = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - first
    digits = value.isascii() and value.isdecimal() and len(value) <= COUNT_DIGITS_MAX
    if digits and int(value) <= bound:
        return int(value)
    if value:
        problems.append(
            f"LISTEN_FDS is {value!r}; allowed: a whole number from 0 to {bound}: nothing is taken"
        )
    return 0


def _take(fd: int, name: str, inherited: Inherited) -> None:
    try:
        # A child process must not keep a client's connection open.
        os.set_inheritable(fd, False)
    except OSError as error:
        inherited.problems.append(f"descriptor {fd} ({name!r}) is not there: {error.strerror}")
        return
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        inherited.problems.append(f"descriptor {fd} ({name!r}) is no socket: {error.strerror}")
        os.close(fd)
        return
    wrong = _place(sock, name, inherited)
    if wrong is not None:
        inherited.problems.append(f"descriptor {fd} ({name!r}) {wrong}: closed")
        sock.close()


def _place(sock: socket.socket, name: str, inherited: Inherited) -> str | None:
    """Put a socket where it belongs, or say what is wrong with it."""
    if name == LISTENER_NAME:
        if not _listens(sock, socket.AF_UNIX):
            return "is not a listening Unix stream socket"
        if inherited.listener is not None:
            return "comes a second time"
        inherited.listener = sock
    elif name == METRICS_NAME:
        if not _listens(sock, socket.AF_INET):
            return "is not a listening IPv4 stream socket"
        if inherited.metrics is not None:
            return "comes a second time"
        inherited.metrics = sock
    elif STORED_NAME.fullmatch(name):
        if not _is_connection(sock):
            return "is not a connected Unix stream socket"
        if name in inherited.stored:
            return "comes a second time"
        inherited.stored[name] = sock
    else:
        return "has a name that nobody here gave"
    return None


def _listens(sock: socket.socket, family: int) -> bool:
    if sock.family != family or sock.type != socket.SOCK_STREAM:
        return False
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is_connection(sock: socket.socket) -> bool:
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        return False
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
