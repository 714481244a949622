"""A blocking connection: bytes in and out of one Unix socket, each step against a deadline.

Deadlines are points of `time.monotonic`, so that all steps of an operation share one budget. The
first milliseconds of a wait are spent in the read itself, which saves a system call for nearly
every answer; what takes longer is waited for in `poll`, which keeps to its deadline whatever
signals arrive meanwhile.
"""

from __future__ import annotations

import select
import socket
from struct import pack
from time import monotonic, sleep

from libclient.errors import TIMEOUT, Unavailable
from libclient.where import connecting, new_socket

READ_BYTES = 65_536
# More than most answers take; too short for a timer's signals to start it again and again.
_FIRST_WAIT_US = 5_000
NOW = socket.MSG_DONTWAIT


class Link:
    """One connection. Owns its descriptor until `close`."""

    def __init__(self, path: str, deadline_s: float) -> None:
        """Connect to `path`. Raises Unavailable."""
        self.sock = new_socket()
        try:
            for pause_s in connecting(self.sock, path, deadline_s):
                sleep(pause_s)
            self.sock.setblocking(True)
            first_wait = pack("ll", 0, _FIRST_WAIT_US)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, first_wait)
        except BaseException:
            self.sock.close()
            raise
        # Straight to the socket: these are on the path of every lease. `send` takes what fits, with
        # NOW; `recv` waits for a moment, or with NOW not at all. Both raise BlockingIOError, or
        # another OSError where the connection is dead.
        self.send = self.sock.send
        self.recv = self.sock.recv

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self.sock.fileno()

    def wait(self, deadline_s: float, event: int = select.POLLIN) -> None:
        """Wait until more can be read (or, for POLLOUT, sent). Raises Unavailable if it cannot."""
        fd = self.sock.fileno()
        if fd < 0:
            # Lost, and let go by another thread, between the caller's look and this one.
            return
        (poll := select.poll()).register(fd, event)
        if not poll.poll(max(0.0, deadline_s - monotonic()) * 1e3):
            raise Unavailable("no answer from the daemon in time", TIMEOUT)

    def shut(self) -> None:
        """End the connection for everyone who has it open; a thread that waits here wakes."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other end was quicker.
            pass

    def close(self) -> None:
        """Give up the descriptor. Whoever inherited it keeps the connection."""
        self.sock.close()
