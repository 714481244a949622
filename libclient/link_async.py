"""A connection on an asyncio loop: a session, its socket, its handlers and its renewals.

Reads and writes its own non-blocking socket as the loop reports it ready, so it works on any
selector loop. A connection that is lost is made anew by a timer of the loop, and the session goes
on. Used by the tasks of one loop; no thread is involved.
"""

from __future__ import annotations

import asyncio
import os
import socket
import weakref

from libclient import resume
from libclient.drive_sync import READ_BYTES
from libclient.errors import TIMEOUT, Unavailable
from libclient.session import Session
from libclient.where import connecting, new_socket

# Every link of this process, so that a forked child can close its copies.
_OPEN: weakref.WeakSet[AsyncLink] = weakref.WeakSet()


class AsyncLink:
    """One connection after the other. Owns the descriptor until `close`."""

    def __init__(self, path: str) -> None:
        self.session = Session()
        # Set in a forked child, for good.
        self.forked = False
        self.sock = new_socket()
        self.loop = asyncio.get_running_loop()
        self._path = path
        self._writing = False
        self._renewal: asyncio.TimerHandle | None = None
        # The next look for a daemon that went away.
        self._look: asyncio.TimerHandle | None = None
        _OPEN.add(self)

    @property
    def closed(self) -> bool:
        """Whether there is no connection, and nothing held that would bring it back unasked."""
        return self.forked or (self.sock.fileno() < 0 and not self.session.leases)

    async def connect(self, deadline_s: float) -> None:
        """Connect by a point of `time.monotonic`. Raises Unavailable, with the socket closed."""
        try:
            for pause_s in connecting(self.sock, self._path, deadline_s):
                await asyncio.sleep(pause_s)
            self.loop.add_reader(self.sock.fileno(), self._on_readable)
        except OSError as fault:
            self.sock.close()
            raise Unavailable(f"nothing can watch the connection: {fault.strerror}") from None
        except BaseException:
            self.sock.close()
            raise

    def begin(self) -> None:
        """Let a conversation that is over, not for good, begin anew."""
        self.session.begin_anew(self.loop.time())

    def flush(self) -> None:
        """Send what can be sent now, the rest when the socket takes more, or there is one."""
        session = self.session
        if session.away is not None:
            if session.outgoing:
                self._seek()
            return
        try:
            while session.outgoing and not self.forked:
                session.outgoing = session.outgoing[self.sock.send(session.outgoing) :]
        except BlockingIOError:
            self.loop.add_writer(self.sock.fileno(), self.flush)
            self._writing = True
            return
        except OSError:
            # What the daemon said last may still be there: the reader finds the end after it, and
            # that a request was not sent.
            self._shut()
        if self._writing and not self.forked:
            self._writing = False
            self.loop.remove_writer(self.sock.fileno())

    def too_late(self) -> Unavailable:
        """Return what a caller is told whose time is over."""
        away = self.session.away
        if away is not None:
            return Unavailable(away.fault.detail, away.fault.reason)
        return Unavailable("no answer from the daemon in time", TIMEOUT)

    @property
    def hopeless(self) -> bool:
        """Whether no daemon has been there for longer than a restart takes."""
        away = self.session.away
        return away is not None and away.is_long(self.loop.time())

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
        self._follow_up()
        if self.session.away is None:
            self.flush()

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
        if session.away is not None or (session.ended is not None and not session.sealed):
            self._let_go()
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if session.away is not None and session.has_to_go_on:
            self._look = self.loop.call_at(session.away.due_s, self._seek)

    def _renew(self) -> None:
        self.session.renew_due(self.loop.time())
        self.flush()
        self._follow_up()

    def _seek(self) -> None:
        """Try to connect anew."""
        session, now_s = self.session, self.loop.time()
        if session.away is None or self.forked or not session.has_to_go_on:
            return
        sock: socket.socket | None = None
        try:
            sock = new_socket()
            for _ in connecting(sock, self._path, 0.0):
                # A full backlog is a try that failed.
                break
            self.loop.add_reader(sock.fileno(), self._on_readable)
        except (Unavailable, OSError) as fault:
            if sock is not None:
                sock.close()
            missed = fault if isinstance(fault, Unavailable) else Unavailable(str(fault))
            session.away.missed(missed, now_s)
        else:
            self.sock = sock
            resume.rejoin(session, now_s)
            self.flush()
        self._follow_up()

    def _shut(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other end was quicker.
            pass

    def _let_go(self) -> None:
        if self.sock.fileno() >= 0:
            self._writing = False
            self.loop.remove_reader(self.sock.fileno())
            self.loop.remove_writer(self.sock.fileno())
            self.sock.close()

    def leave_in_child(self) -> None:
        """In a forked child: close this copy of the descriptor, and touch nothing else."""
        self.forked = True
        self.sock.close()


def _leave_all_in_child() -> None:
    for link in list(_OPEN):
        link.leave_in_child()
    _OPEN.clear()


os.register_at_fork(after_in_child=_leave_all_in_child)
