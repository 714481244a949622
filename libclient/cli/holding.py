"""One lease for a process that is about to become another program.

Asks, waits and seals with the session of the client library and a socket, in the one thread there
is: a program that is replaced must not have another thread at work. The descriptor of a granted
lease is the lease; whoever inherits it holds it. A daemon that goes away while there is none yet is
looked for, and asked again, for as long as the wait lasts.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any

from libclient.absence import REFUSALS_MAX, REFUSED_S, Absence
from libclient.decision import Decision, Event
from libclient.errors import NO_DAEMON, TIMEOUT, RequestError, Unavailable
from libclient.session import Session
from libclient.tickets import Ticket
from libclient.where import connecting, new_socket
from libclient.wire.vocabulary import SHUTTING_DOWN

# 0, 1 and 2 are the command's standard streams, whether or not they are open now.
FIRST_FREE_FD = 3
READ_BYTES = 65_536
# How often a waiting person sees the time go on.
TICK_S = 1.0


class Holding:
    """A connection with at most one lease on it."""

    def __init__(self, path: str, timeout_s: float) -> None:
        """Connect. Raises Unavailable.

        `timeout_s` is for everything that the daemon is waited for, from here to the seal; a wait
        for memory that was asked for comes on top of it.
        """
        self._left_s = timeout_s
        self._path = path
        # Whether this connection's daemon has said anything.
        self._heard = False
        start_s = monotonic()
        self._connect(start_s + timeout_s)
        self._spend(start_s, 0.0)

    def _connect(self, deadline_s: float) -> None:
        self._session = Session(lasting=False)
        self._sock = new_socket()
        self._heard = False
        try:
            for pause_s in connecting(self._sock, self._path, deadline_s):
                sleep(pause_s)
        except BaseException:
            self._sock.close()
            raise

    def ask(
        self,
        fields: Mapping[str, Any],
        on_event: Callable[[Event], None],
        on_tick: Callable[[], None],
    ) -> Decision:
        """Ask for a lease and wait for the answer. Raises Unavailable or RequestError.

        `on_event` hears of the place in the queue, `on_tick` is called about once a second. Where
        the daemon goes away meanwhile, it is asked again with what is left of the `wait_s`.
        """
        wait_s = fields.get("wait_s", 0.0)
        end_s = monotonic() + wait_s
        # Connections in a row that soon were over, and those of them without a word.
        short, silent = 0, 0
        while True:
            decision = Decision(on_event)
            asked_s = monotonic()
            try:
                ticket = self._session.ask("lease", fields, decision)
                self._wait(ticket, wait_s, on_tick)
                return decision
            except (Unavailable, RequestError) as fault:
                short = short + 1 if monotonic() - asked_s < REFUSED_S else 0
                silent = silent + 1 if short and not self._heard else 0
                if not _went_away(fault) or silent >= REFUSALS_MAX or monotonic() >= end_s:
                    raise
                away = Absence(Unavailable(str(fault)), monotonic(), short)
                self._find_again(away, end_s, on_tick)
            wait_s = max(0.0, end_s - monotonic())
            fields = {**fields, "wait_s": wait_s}

    def _find_again(self, away: Absence, end_s: float, on_tick: Callable[[], None]) -> None:
        """Connect anew. Raises Unavailable once the wait is over."""
        self._sock.close()
        while True:
            sleep(max(0.0, min(away.due_s, end_s) - monotonic()))
            try:
                self._connect(monotonic())
                return
            except Unavailable as missed:
                if monotonic() >= end_s:
                    raise
                away.missed(missed, monotonic())
            on_tick()

    def seal(self, signal: str | None) -> None:
        """Let the connection only hold from now on. Raises Unavailable or RequestError.

        The lease may have ended meanwhile: its decision says so.
        """
        fields = {} if signal is None else {"signal": signal}
        self._wait(self._session.ask("seal", fields), 0.0, lambda: None)

    def hand_on(self) -> int:
        """Return the connection as a descriptor that is inherited; it is the lease from now on."""
        fd = self._sock.detach()
        if fd >= FIRST_FREE_FD:
            os.set_inheritable(fd, True)
            return fd
        # A standard stream is closed and the connection took its number: the command would read
        # from it, or write to it.
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_FREE_FD)
        os.close(fd)
        return moved

    def close(self) -> None:
        """End the connection: what waits is cancelled, what was granted is given back."""
        self._sock.close()

    def _wait(self, ticket: Ticket, wait_s: float, on_tick: Callable[[], None]) -> None:
        start_s = monotonic()
        deadline_s = start_s + self._left_s + wait_s
        session = self._session
        if self._left_s <= 0:
            raise Unavailable("no answer from the daemon in time", TIMEOUT)
        self._send(self._left_s)
        while not ticket.done:
            left_s = deadline_s - monotonic()
            if left_s <= 0:
                raise Unavailable("no answer from the daemon in time", TIMEOUT)
            data = self._receive(min(left_s, TICK_S))
            if data is None:
                on_tick()
                continue
            self._heard = self._heard or bool(data)
            session.feed(data, monotonic())
            notices, session.notices = session.notices, []
            for handler, event in notices:
                handler(event)
            if session.outgoing:
                # The daemon was restarted, and is to be told again what it was asked.
                self._send(max(0.0, deadline_s - monotonic()))
        self._spend(start_s, wait_s)
        ticket.result()

    def _spend(self, start_s: float, wait_s: float) -> None:
        """Take what was used since `start_s` off the budget, except the wait that was asked for."""
        self._left_s = max(0.0, self._left_s - max(0.0, monotonic() - start_s - wait_s))

    def _send(self, timeout_s: float) -> None:
        """Send what the session has to say. One that cannot is found out by the next read."""
        self._sock.settimeout(timeout_s)
        try:
            self._sock.sendall(self._session.outgoing)
        except TimeoutError:
            raise Unavailable("the daemon takes no more requests", TIMEOUT) from None
        except OSError:
            # The daemon is gone; what it said last is still there to be read, and may say why.
            pass
        self._session.outgoing = b""

    def _receive(self, timeout_s: float) -> bytes | None:
        """Return bytes, none at the end of input, None where none came in time."""
        self._sock.settimeout(timeout_s)
        try:
            return self._sock.recv(READ_BYTES)
        except TimeoutError:
            return None
        except OSError:
            return b""


def _went_away(fault: Unavailable | RequestError) -> bool:
    """Whether the daemon is gone, or says that it is about to be, and another may come."""
    if isinstance(fault, RequestError):
        return fault.code == SHUTTING_DOWN
    return fault.reason == NO_DAEMON
