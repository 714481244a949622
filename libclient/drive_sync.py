"""A blocking connection: bytes in and out of one Unix socket, each step against a deadline.

Deadlines are points of `time.monotonic`, so that all steps of an operation share one budget. The
descriptor does not block by itself: whoever waits does so in `poll`, which keeps to its deadline
whatever signals arrive meanwhile.
"""

from __future__ import annotations

import select
import socket
from time import monotonic, sleep

from libclient.errors import TIMEOUT, Unavailable
from libclient.where import connecting, new_socket

READ_BYTES = 65_536


class Link:
    """One connection. Owns its descriptor until `close`."""

    __slots__ = ("_poll", "_recv", "_send", "sock")

    def __init__(self, path: str, deadline_s: float) -> None:
        """Connect to `path`. Raises Unavailable."""
        self.sock = new_socket()
        try:
            for pause_s in connecting(self.sock, path, deadline_s):
                sleep(pause_s)
        except BaseException:
            self.sock.close()
            raise
        self._send = self.sock.send
        self._recv = self.sock.recv
        (poll := select.poll()).register(self.sock, select.POLLIN)
        self._poll = poll.poll

    def send(self, data: bytes) -> int:
        """Send what the kernel takes now; return the number of bytes, -1 for a dead connection."""
        try:
            return self._send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return -1

    def receive(self, deadline_s: float) -> bytes:
        """Wait for bytes; none are the end of input. Raises Unavailable at the deadline."""
        while self._poll(max(0.0, deadline_s - monotonic()) * 1e3):
            if (data := self.receive_now()) is not None:
                return data
        raise Unavailable("no answer from the daemon in time", TIMEOUT)

    def receive_now(self) -> bytes | None:
        """Return the bytes that are there, None where there are none; a dead connection ends."""
        try:
            return self._recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def wait_writable(self, deadline_s: float) -> None:
        """Wait until more can be sent. Raises Unavailable at the deadline."""
        (poll := select.poll()).register(self.sock, select.POLLOUT)
        if not poll.poll(max(0.0, deadline_s - monotonic()) * 1e3):
            raise Unavailable("the daemon takes no more requests", TIMEOUT)

    def shut(self) -> None:
        """End the connection for everyone who has it open; a thread in `receive` wakes."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other end was quicker.
            pass

    def close(self) -> None:
        """Give up the descriptor. Whoever inherited it keeps the connection."""
        self.sock.close()
