"""What stands in an exchange for a connection that was lost: waiting there is looking for another.

The thread that leads finds it where it would read, so that no request pays for asking whether there
is a connection.
"""

from __future__ import annotations

import select
from contextlib import AbstractContextManager
from threading import Event as Flag
from time import monotonic
from typing import Protocol

from libclient.errors import NO_DAEMON, Unavailable
from libclient.session import Session


class Seeker(Protocol):
    """An exchange without a connection, as this knows it."""

    session: Session

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """What guards all of it."""

    def close_stale(self) -> None:
        """Give up the descriptors of connections that were lost."""

    def led_in_vain(self) -> bool:
        """Whether the one who leads has nothing to wait for."""

    def seek(self, *, eagerly: bool) -> None:
        """Try to connect anew."""


class AbsentLink:
    """Has the methods of a `Link`, and no descriptor."""

    def __init__(self, seeker: Seeker) -> None:
        self._seeker = seeker
        # Set when it is to be looked at again: there is a connection, or no use for one.
        self._stirred = Flag()

    def fileno(self) -> int:
        """Return -1: there is none."""
        return -1

    def send(self, data: bytes, flags: int = 0) -> int:
        """Take nothing."""
        raise BlockingIOError

    def recv(self, size: int, flags: int = 0) -> bytes | None:
        """Look for the daemon. None: there is nothing to wait for. Called by who leads."""
        with self._seeker.lock:
            # The one who leads is here, so nobody waits there any more.
            self._seeker.close_stale()
            if self._seeker.led_in_vain():
                return None
            self._seeker.seek(eagerly=False)
        raise BlockingIOError

    def wait(self, deadline_s: float, event: int = select.POLLIN) -> None:
        """Wait until it is time to look again. Raises Unavailable once the time is over."""
        now_s, away = monotonic(), self._seeker.session.away
        if now_s >= deadline_s:
            fault = None if away is None else away.fault
            raise Unavailable(
                "the daemon went away" if fault is None else fault.detail,
                NO_DAEMON if fault is None else fault.reason,
            )
        due_s = deadline_s if away is None else min(deadline_s, away.due_s)
        if event == select.POLLIN:
            self._stirred.wait(max(0.0, due_s - now_s))
            # Whoever sets it from now on is seen by the look that follows.
            self._stirred.clear()

    def shut(self) -> None:
        """Wake the thread that waits here."""
        self._stirred.set()

    def close(self) -> None:
        """There is nothing to give up."""
