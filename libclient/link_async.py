"""A connection on an asyncio loop: a session, its socket, its handlers and its renewals.

Reads and writes its own non-blocking socket as the loop reports it ready, so it works on any
selector loop. Used by the tasks of one loop; no thread is involved.
"""

from __future__ import annotations

import asyncio
import os
import weakref

from libclient.drive_sync import READ_BYTES
from libclient.session import Session
from libclient.where import connecting, new_socket

# Every link of this process, so that a forked child can close its copies.
_OPEN: weakref.WeakSet[AsyncLink] = weakref.WeakSet()


class AsyncLink:
    """One connection. Owns its descriptor until `close`."""

    def __init__(self) -> None:
        self.session = Session()
        # Set in a forked child, for good.
        self.forked = False
        self.sock = new_socket()
        self.loop = asyncio.get_running_loop()
        self._writing = False
        self._renewal: asyncio.TimerHandle | None = None
        _OPEN.add(self)

    async def connect(self, path: str, deadline_s: float) -> None:
        """Connect by a point of `time.monotonic`. Raises Unavailable, with the socket closed."""
        try:
            for pause_s in connecting(self.sock, path, deadline_s):
                await asyncio.sleep(pause_s)
        except BaseException:
            self.sock.close()
            raise
        self.loop.add_reader(self.sock.fileno(), self._on_readable)

    def flush(self) -> None:
        """Send what can be sent now, the rest when the socket takes more."""
        session = self.session
        try:
            while session.outgoing and not self.forked:
                session.outgoing = session.outgoing[self.sock.send(session.outgoing) :]
        except BlockingIOError:
            self.loop.add_writer(self.sock.fileno(), self.flush)
            self._writing = True
            return
        except OSError:
            # What the daemon said last may still be there: the reader finds the end after it.
            session.outgoing = b""
        if self._writing and not self.forked:
            self._writing = False
            self.loop.remove_writer(self.sock.fileno())

    def close(self) -> None:
        """End the session and let go of the socket. Idempotent."""
        if not self.forked:
            self.session.close()
            self._follow_up()

    def _on_readable(self) -> None:
        try:
            data = self.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.session.feed(data, self.loop.time())
        self.flush()
        self._follow_up()

    def _follow_up(self) -> None:
        """Do what the session's news ask for."""
        session = self.session
        for handler, event in session.notices:
            # By the loop, so that a handler that fails is reported and harms nobody.
            self.loop.call_soon(handler, event)
        session.notices.clear()
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None
        if session.renew_at is not None:
            self._renewal = self.loop.call_at(session.renew_at, self._renew)
        if session.ended is not None and not session.sealed and self.sock.fileno() >= 0:
            self.loop.remove_reader(self.sock.fileno())
            self.loop.remove_writer(self.sock.fileno())
            self.sock.close()

    def _renew(self) -> None:
        self.session.renew_due(self.loop.time())
        self.flush()
        self._follow_up()

    def leave_in_child(self) -> None:
        """In a forked child: close this copy of the descriptor, and touch nothing else."""
        self.forked = True
        self.sock.close()


def _leave_all_in_child() -> None:
    for link in list(_OPEN):
        link.leave_in_child()
    _OPEN.clear()


os.register_at_fork(after_in_child=_leave_all_in_child)
