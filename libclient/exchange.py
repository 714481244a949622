"""One blocking connection, shared by the threads of a process.

A thread inside an operation reads for itself, so no hand-over is paid. Where several are inside one
at a time, the first leads: it reads for all, and wakes each whose answer has come. When it is done
it passes the lead to one that still waits, so a thread that waits an hour for memory holds nobody
up. With nobody inside, and something to be expected, the keeper's thread is told to watch.

A connection that is lost is made anew by whoever would read it: the one who leads, else the keeper
where leases wait to be reattached. Everyone's requests go on in the same session.

One lock guards the session and the lead; nobody waits for anything while holding it. A descriptor
is closed by the one who leads, or where nobody does: never under a thread that polls it.
"""

from __future__ import annotations

import os
import weakref
from select import POLLOUT
from threading import Lock
from time import monotonic
from typing import TypeVar

from libclient.carrier import UNKEPT, Carrier
from libclient.decision import Decision
from libclient.drive_sync import NOW, READ_BYTES
from libclient.errors import Unavailable
from libclient.keeper import KEEPER
from libclient.operations import Operation
from libclient.tickets import ANSWER_S, Ticket
from libclient.turns import interrupted, opener, take

T = TypeVar("T")

# How long the keeper waits for the lock. Nobody has it that long but a thread that a signal handler
# has interrupted, and other leases are to be renewed meanwhile.
_TURN_S = 0.1
# Every exchange of this process, so that a forked child can close its copies.
_OPEN: weakref.WeakSet[Exchange] = weakref.WeakSet()


class Exchange(Carrier):
    """A session, the link that carries it, and whose turn it is to read."""

    def __init__(self, path: str, deadline_s: float) -> None:
        """Connect. Raises Unavailable."""
        super().__init__(path, deadline_s)
        self._followers: list[Ticket] = []
        _OPEN.add(self)

    def by_token(self, token: str) -> Decision | None:
        """Return the lease of this connection that has this token."""
        taken: list[bool] = []
        try:
            take(self._lock, taken)
            return self.session.by_token(token)
        finally:
            if taken and taken[0]:
                self._lock.release()

    def run(self, operation: Operation[T], deadline_s: float) -> T:
        """Carry an operation out in this thread, until it is done or out of time.

        `deadline_s` is a point of `time.monotonic`.
        """
        ticket: Ticket | None = None
        session = self.session
        lock = self._lock
        if not lock.acquire(True, ANSWER_S):
            raise interrupted()
        try:
            try:
                if session.ended is not None:
                    session.begin_anew(monotonic())
                ticket = operation.send(None)
                ticket.deadline_s = deadline_s
                if self._leader is None and not ticket.done:
                    self._leader = ticket
                    if self._watched:
                        self._watched = False
                        self._disarm()
                if session.outgoing:
                    self._flush()
            finally:
                lock.release()
            if session.outgoing:
                self._send_rest(deadline_s)
            done = ticket.done
            while not done:
                if self._leader is ticket:
                    try:
                        data: bytes | None = self._recv(READ_BYTES)
                    except BlockingIOError:
                        self._link.wait(deadline_s)
                        continue
                    except OSError:
                        data = b""
                    now_s = monotonic()
                    with lock:
                        if session.feed(data, now_s):
                            self._follow_up()
                        done = ticket.done
                        if done:
                            self._pass_on()
                    if not done and now_s >= deadline_s:
                        # What comes for others, or in crumbs, buys no time.
                        raise self._too_late()
                else:
                    self._follow(ticket, deadline_s)
                    done = ticket.done
            operation.send(None)
        except StopIteration as end:
            value: T = end.value
            return value
        except BaseException as fault:
            # An interrupt too: what was asked for must be given back before the caller goes on.
            return self._give_up(operation, ticket, fault)
        raise AssertionError("an operation has one step")

    def _follow_up(self) -> None:
        """Do what follows from what was taken in, besides answers. Called with the lock."""
        session = self.session
        if not session.sealed and (session.away is not None or session.ended is not None):
            self._let_go()
        if session.outgoing:
            self._flush()
        try:
            if session.outgoing:
                self._await_room()
            if session.renew_at is not None:
                # Here, and not only when all have left: a thread may stay for as long as it waits.
                if not self._adopted:
                    self._adopt()
                KEEPER.expect(session.renew_at)
            if session.notices:
                KEEPER.call(session.notices)
                session.notices = []
        except UNKEPT as fault:
            self._on_unkept(fault)

    def _pass_on(self) -> None:
        """Give the lead away: to one that waits, else to the keeper. Called with the lock."""
        for follower in self._followers:
            if not follower.done:
                self._leader = follower
                if follower.wake is not None:
                    follower.wake()
                return
        self._leader = None
        self.close_stale()
        session = self.session
        try:
            if session.away is not None:
                if session.leases:
                    KEEPER.await_return(self, session.away.due_s)
            elif session.ended is not None and not session.sealed:
                return
            elif session.leases or session.late or session.subscriptions or session.outgoing:
                if not self._adopted:
                    self._adopt()
                self._watched = True
                self._arm()
                if session.outgoing:
                    self._await_room()
        except UNKEPT as fault:
            self._on_unkept(fault)

    def _follow(self, ticket: Ticket, deadline_s: float) -> None:
        """Wait until the answer is here, or the lead."""
        gate = Lock()
        gate.acquire()
        taken: list[bool] = []
        try:
            take(self._lock, taken)
            if ticket.done:
                return
            if self._leader is None:
                self._leader = ticket
                return
            ticket.wake = opener(gate)
            self._followers.append(ticket)
        finally:
            if taken and taken[0]:
                self._lock.release()
        in_time = gate.acquire(timeout=max(0.0, deadline_s - monotonic()))
        taken = []
        try:
            take(self._lock, taken)
            ticket.wake = None
            self._followers.remove(ticket)
        finally:
            if taken and taken[0]:
                self._lock.release()
        if not in_time and not ticket.done:
            raise self._too_late()

    def _give_up(self, operation: Operation[T], ticket: Ticket | None, fault: BaseException) -> T:
        """Let the operation undo what it began, and hand the lead on."""
        taken: list[bool] = []
        try:
            try:
                take(self._lock, taken)
            except Unavailable:
                self._leave(ticket)
            if ticket is None:
                # Interrupted while it was asked: what it had put down by then is undone.
                operation.close()
                raise fault
            if taken[0]:
                self.session.mend()
                ticket.wake = None
                if ticket in self._followers:
                    self._followers.remove(ticket)
            try:
                operation.throw(fault)
            except StopIteration as end:
                value: T = end.value
                return value
            finally:
                if taken[0] and not self.forked:
                    self._follow_up()
                    if self._leader is ticket or self._leader is None:
                        self._pass_on()
        finally:
            if taken and taken[0]:
                self._lock.release()
        raise AssertionError("an operation has one step")

    def _leave(self, ticket: Ticket | None) -> None:
        """Give a request up without the lock: its owner is in a signal handler, and stays there.

        The session cannot be told, but the daemon can: the end of the connection gives all back.
        """
        if ticket is not None:
            ticket.abandoned = True
            if self._leader is ticket:
                self._leader = None
        self._link.shut()

    def _flush(self) -> None:
        """Send what can be sent now. Called with the lock."""
        session = self.session
        if session.away is not None:
            self.seek(eagerly=True)
            return
        if session.sending is not None:
            # A thread was interrupted in the middle of this, and has not come to mend it yet.
            session.settle_sent()
        (sent := session.sent).clear()
        session.sending = outgoing = session.outgoing
        # The count is put down before an interrupt can strike, so what was sent is always known.
        try:
            sent.extend(map(self._send, (outgoing,), (NOW,)))
        except BlockingIOError:
            sent.append(0)
        except OSError:
            session.sending = None
            self._on_dead()
            return
        session.outgoing = b"" if sent[0] == len(outgoing) else outgoing[sent[0] :]
        session.sending = None

    def _on_dead(self) -> None:
        """The connection takes nothing any more. Called with the lock.

        What the daemon said last may still be there to be read, and the end after it.
        """
        self._broken = True
        self._link.shut()
        if self._leader is None:
            while data := self._read_now():
                self.session.feed(data, monotonic())
            self.session.feed(b"", monotonic())
            self._follow_up()

    def _read_now(self) -> bytes | None:
        """Return what is there, None where nothing is, no bytes at the end of input."""
        try:
            return self._recv(READ_BYTES, NOW)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _send_rest(self, deadline_s: float) -> None:
        """Wait until all is sent, the requests of other threads included."""
        session = self.session
        while session.outgoing and not self._broken:
            if (away := session.away) is not None:
                if away.is_long(monotonic()):
                    raise self._too_late()
                # Sent by whoever connects.
                return
            self._link.wait(deadline_s, POLLOUT)
            with self._lock:
                if session.outgoing:
                    self._flush()
            if session.outgoing and monotonic() >= deadline_s:
                raise self._too_late()

    # -- the keeper's thread

    def on_ready(self) -> None:
        """Send what nobody waits for, and read what came while no thread was inside an operation.

        Raises Unavailable where the lock is not to be had.
        """
        if not self._lock.acquire(True, _TURN_S):
            raise interrupted()
        try:
            session = self.session
            session.mend()
            if session.outgoing and session.away is None:
                self._flush()
            if self._leader is None:
                if self._watched:
                    self._watched = False
                    data = self._read_now()
                    if data is not None and session.feed(data, monotonic()):
                        self._follow_up()
                self._pass_on()
            elif session.outgoing:
                self._await_room()
        finally:
            self._lock.release()

    def renew_due(self, now_s: float) -> float | None:
        """Renew the leases whose time has come; return when the next is due.

        Raises Unavailable where the lock is not to be had.
        """
        if not self._lock.acquire(True, _TURN_S):
            raise interrupted()
        try:
            session = self.session
            session.mend()
            if session.away is not None:
                if self._leader is not None or not session.leases:
                    # Whoever is inside looks for the daemon; or nobody needs it.
                    return None
                self.seek(eagerly=False)
                self._pass_on()
            if session.renew_at is not None and session.renew_at <= now_s:
                session.renew_due(now_s)
                self._flush()
                self._follow_up()
                if self._leader is None:
                    # The connection may have turned out to be dead.
                    self._pass_on()
            return session.renew_at
        finally:
            self._lock.release()

    # -- the end

    def close(self) -> None:
        """Close the connection: every lease and request of it ends. Idempotent.

        Where another thread is waiting for an answer, those who inherited the descriptor lose the
        connection as well; otherwise it is theirs.
        """
        if self.forked or (self.session.final and self.fileno() < 0):
            return
        if not self._lock.acquire(True, ANSWER_S):
            raise interrupted()
        try:
            self.session.close()
            self._let_go()
        finally:
            self._lock.release()


def _leave_all_in_child() -> None:
    """Close every inherited connection in a forked child, and begin without a keeper."""
    KEEPER.leave_in_child()
    for exchange in list(_OPEN):
        exchange.leave_in_child()
    _OPEN.clear()


os.register_at_fork(after_in_child=_leave_all_in_child)
