"""The connection of an exchange, and the next one when it is lost.

Owns the links: the one in use, or in its place one that looks for the daemon, and those that are
over but may still be waited at. Who reads them, and when, is the exchange's business.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from time import monotonic

from libclient import resume
from libclient.absent_link import AbsentLink
from libclient.drive_sync import Link
from libclient.errors import NO_DAEMON, TIMEOUT, Unavailable
from libclient.keeper import KEEPER, Kept
from libclient.session import Session
from libclient.tickets import Ticket
from libclient.turns import ParentsLock, nothing

# What the keeper raises when the process is short of descriptors or threads, or was interrupted.
UNKEPT = (OSError, RuntimeError, Unavailable)


class Carrier(Kept):
    """A session and the link that carries it now. What begins with `_` is the exchange's too."""

    def __init__(self, path: str, deadline_s: float) -> None:
        """Connect. Raises Unavailable."""
        self.session = Session()
        # Set in a forked child, for good.
        self.forked = False
        self._path = path
        self._lock: Lock | ParentsLock = Lock()
        self._leader: Ticket | None = None
        # How the keeper is told to watch this connection for one event, or not to.
        self._arm: Callable[[], None] = nothing
        self._disarm: Callable[[], None] = nothing
        self._adopted = False
        self._watched = False
        # Links that are over, whose descriptors go as soon as nobody can be waiting there.
        self._stale: list[Link] = []
        self._install(Link(path, deadline_s))

    @property
    def closed(self) -> bool:
        """Whether there is no connection, and nothing held that would bring it back unasked."""
        return self.forked or (self.fileno() < 0 and not self.session.leases)

    def fileno(self) -> int:
        """Return the descriptor, -1 while there is none."""
        return self._link.fileno()

    def seek(self, *, eagerly: bool) -> None:
        """Try to connect anew; for one who is not eager, if it is time. Called with the lock."""
        session, now_s = self.session, monotonic()
        if (away := session.away) is None or not (eagerly or now_s >= away.due_s):
            return
        try:
            link = Link(self._path, 0.0)
        except Unavailable as fault:
            away.missed(fault, now_s)
            return
        absent = self._link
        self._install(link)
        resume.rejoin(session, now_s)
        self._flush()
        # Whoever leads waits there.
        absent.shut()

    def led_in_vain(self) -> bool:
        """Whether the one who leads has nothing to wait for. Called with the lock."""
        return self._leader is None or self._leader.done or self.session.ended is not None

    def close_stale(self) -> None:
        """Give up the descriptors that nobody can be waiting at. Called with the lock."""
        while self._stale:
            self._stale.pop().close()

    @property
    def lock(self) -> Lock | ParentsLock:
        """What guards all of it."""
        return self._lock

    def _install(self, link: Link | AbsentLink) -> None:
        # Whether it takes nothing any more, and what it brought is still to be read.
        self._broken = False
        self._link = link
        # By the exchange, straight away: these are on the path of every lease.
        self._recv = link.recv
        self._send = link.send

    def _let_go(self) -> None:
        """Let go of a connection that is over, or of looking for one. Called with the lock."""
        link = self._link
        if isinstance(link, AbsentLink):
            link.shut()
            return
        if self._adopted:
            KEEPER.disown(link.fileno())
            self._arm = self._disarm = nothing
            self._adopted = self._watched = False
        self._stale.append(link)
        self._install(AbsentLink(self))
        if self._leader is None:
            self.close_stale()
        else:
            link.shut()

    def _adopt(self) -> None:
        """Have the keeper know this connection. Called with the lock."""
        self._arm, self._disarm = KEEPER.adopt(self, self.fileno())
        self._adopted = True

    def _await_room(self) -> None:
        """Have the keeper send what the socket does not take now. Called with the lock."""
        if self._broken or self.session.away is not None:
            # Whoever reads finds the end; or whoever connects sends it.
            return
        if not self._adopted:
            self._adopt()
        KEEPER.await_room(self.fileno(), reading=self._watched)

    def _on_unkept(self, fault: BaseException) -> None:
        """End it all, as nobody would hear of its leases. Called with the lock.

        Raises Unavailable, unless the connection only holds.
        """
        session = self.session
        if session.sealed:
            return
        reason = fault.reason if isinstance(fault, Unavailable) else NO_DAEMON
        session.end(f"nothing can watch the connection: {fault}", reason)
        # They have nobody to call them.
        session.notices = []
        self._let_go()
        raise Unavailable(f"nothing can watch the connection: {fault}", reason)

    def _too_late(self) -> Unavailable:
        """Return what a caller is told whose time is over."""
        away = self.session.away
        if away is not None:
            return Unavailable(away.fault.detail, away.fault.reason)
        return Unavailable("no answer from the daemon in time", TIMEOUT)

    def _flush(self) -> None:
        """Send what can be sent now. Called with the lock."""
        raise NotImplementedError

    def leave_in_child(self) -> None:
        """In a forked child: close this copy of the descriptor, and touch nothing else."""
        self.forked = True
        self._lock = ParentsLock()
        self.close_stale()
        self._link.close()
