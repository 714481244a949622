"""What the service manager is told: readiness, status, progress, and descriptors to keep.

Owns the datagram socket to `$NOTIFY_SOCKET`. It never blocks: the manager may be slow, and a lease
must not wait for it. What was not taken is the caller's to send again, so `send` says whether it
was. Where no service manager wants to hear anything (`present` is False) all of it does nothing.

The variables are removed when they are read: a child process must not speak for the daemon.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import MutableMapping, Sequence

NS_PER_US = 1_000
US_PER_S = 1_000_000
# The kernel's own bound on descriptors in one message (SCM_MAX_FD).
FDS_MAX = 253
# A status is one line for a person; the service manager shows it whole.
STATUS_CHARS_MAX = 500
# sun_path holds 108 bytes; a path needs its NUL.
ADDRESS_BYTES_MAX = 107
WATCHDOG_DIGITS_MAX = 18


class Notifier:
    """The way to the service manager, read from `environ` once. Close it with `close`.

    Raises nothing for what the manager or the environment do; `problems` names variables that
    could not be used, one line each, for the log.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self.problems: list[str] = []
        self._address = _address(environ.pop("NOTIFY_SOCKET", ""), self.problems)
        # Seconds within which the manager wants to hear of progress, None where it does not.
        self.watchdog_period_s = _watchdog_period_s(
            environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", ""), self.problems
        )
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            )

    @property
    def present(self) -> bool:
        """Whether a service manager wants to hear of this process."""
        return self._socket is not None

    def send(self, text: str, fds: Sequence[int] = ()) -> bool:
        """Send assignments, one a line, with descriptors; say whether they were taken.

        False: no manager, a queue that is full, or a manager that is gone; nothing went out then.
        The descriptors stay the caller's. More than `FDS_MAX` are a `ValueError`.
        """
        if len(fds) > FDS_MAX:
            raise ValueError(
                f"{len(fds)} descriptors in one message; at most {FDS_MAX} are allowed"
            )
        if self._socket is None or self._address is None:
            return False
        carried = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            # A name that no kernel would take (a lone surrogate) must not raise here.
            self._socket.sendmsg([text.encode(errors="replace")], carried, 0, self._address)
        except OSError:
            return False
        return True

    def ready(self) -> bool:
        """Say that requests are answered, at the start or after a reload."""
        return self.send("READY=1")

    def status(self, text: str) -> bool:
        """Show one line to people. Line breaks become spaces: a status assigns nothing else."""
        line = " ".join(text.split())[:STATUS_CHARS_MAX]
        return self.send(f"STATUS={line}")

    def reloading(self) -> bool:
        """Say that configuration is being read anew; `ready` ends it."""
        return self.send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // NS_PER_US}")

    def stopping(self) -> bool:
        """Say that the daemon ends."""
        return self.send("STOPPING=1")

    def watchdog(self) -> bool:
        """Say that work goes on. The caller does so only where it does."""
        return self.send("WATCHDOG=1")

    def close(self) -> None:
        """Close the socket; `present` is False and nothing is sent afterwards."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _address(value: str, problems: list[str]) -> str | None:
    """Turn the variable into a socket address; a leading "@" stands for the abstract NUL."""
    if not value:
        return None
    if value[0] not in "/@" or len(value) < 2 or "\0" in value:
        problems.append(
            f"NOTIFY_SOCKET is {value!r}; allowed: an absolute path, or a name after @: not used"
        )
        return None
    if len(os.fsencode(value)) > ADDRESS_BYTES_MAX:
        problems.append(
            f"NOTIFY_SOCKET has {len(os.fsencode(value))} bytes; at most {ADDRESS_BYTES_MAX} fit "
            "in a socket address: not used"
        )
        return None
    return "\0" + value[1:] if value[0] == "@" else value


def _watchdog_period_s(value: str, pid: str, problems: list[str]) -> float | None:
    """Read the watchdog's variables; another process's (by pid) are not for us."""
    if not value or (pid and pid != str(os.getpid())):
        return None
    fits = value.isascii() and value.isdecimal() and len(value) <= WATCHDOG_DIGITS_MAX
    if not fits or int(value) == 0:
        problems.append(
            f"WATCHDOG_USEC is {value!r}; allowed: a whole number of microseconds above 0: not used"
        )
        return None
    return int(value) / US_PER_S
