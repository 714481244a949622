"""The one background thread of a process: it listens and renews while the callers compute.

Started with the first lease or subscription, never before. It sleeps in one epoll over all
connections that hold something. A connection is armed for one event at a time, by the thread that
leaves it, and disarmed by the next one that enters: so a thread inside an operation has the
connection to itself, and the two never wake each other for an answer. Handlers of events run here,
one after the other, outside of every lock: they may use the client, and should be quick, because
renewals wait for them.

It is a daemon thread, and told to end at the exit of the interpreter. A forked child has none.
"""

from __future__ import annotations

import atexit
import os
import select
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic
from typing import Protocol

from libclient.decision import Event, EventHandler

# Errors and hang-ups are reported even when nothing is armed, but, with this, only once.
_DISARMED = select.EPOLLONESHOT
_ARMED = select.EPOLLIN | select.EPOLLONESHOT
_FOREVER = float("inf")
# Events whose handlers have not been called yet. When full, the oldest are dropped: what they said
# of a lease can still be read from it.
_CALLS_MAX = 1_024
# At exit, a handler that does not return is left behind.
_STOP_S = 0.5


class Kept(Protocol):
    """A connection as the keeper knows it. Both methods are called in the keeper's thread."""

    def on_readable(self) -> None:
        """Read what is there, if nobody else does."""

    def renew_due(self, now_s: float) -> float | None:
        """Renew what is due; return when the next renewal is, on the monotonic clock.

        Without a connection, look for one if it is time.
        """


class Keeper:
    """Watches the connections of a process. Its methods may be called by any thread.

    Lock order: a connection's lock before this one. The thread holds neither while it calls out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, weakref.ref[Kept]] = {}
        # Those that have lost theirs, by identity.
        self._absent: dict[int, weakref.ref[Kept]] = {}
        self._calls: deque[tuple[EventHandler, Event]] = deque(maxlen=_CALLS_MAX)
        self._thread: threading.Thread | None = None
        self._epoll: select.epoll | None = None
        self._wake_fd = -1
        self._wakes_at = _FOREVER
        self._stopping = False
        self._exiting = False

    @property
    def running(self) -> bool:
        """Whether its thread is there."""
        return self._thread is not None

    def adopt(self, kept: Kept, fd: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """Take a connection in; return how to arm it for one event and how to disarm it.

        It is not kept alive: with its owner gone, so are its leases.
        """
        with self._lock:
            epoll = self._start()
            self._kept[fd] = weakref.ref(kept)
            epoll.register(fd, _DISARMED)
        return partial(epoll.modify, fd, _ARMED), partial(epoll.modify, fd, _DISARMED)

    def disown(self, fd: int) -> None:
        """Forget a connection, before its descriptor is closed."""
        with self._lock:
            if self._kept.pop(fd, None) is not None and self._epoll is not None:
                self._epoll.unregister(fd)

    def await_return(self, kept: Kept, due_s: float) -> None:
        """Have one without a connection look for it at `due_s`. It is not kept alive either."""
        with self._lock:
            self._start()
            self._absent[id(kept)] = weakref.ref(kept)
            if due_s < self._wakes_at:
                self._wakes_at = due_s
                self._wake()

    def expect(self, due_s: float) -> None:
        """See to it that the thread is awake at `due_s`."""
        with self._lock:
            if due_s < self._wakes_at:
                self._wakes_at = due_s
                self._wake()

    def call(self, notices: Iterable[tuple[EventHandler, Event]]) -> None:
        """Call these handlers in the keeper's thread."""
        with self._lock:
            self._start()
            self._calls.extend(notices)
            self._wake()

    def stop(self) -> None:
        """End the thread and let go of its descriptors. A later lease starts it anew."""
        with self._lock:
            thread = self._thread
            if thread is None:
                return
            self._stopping = True
            self._wake()
        if thread is not threading.current_thread():
            thread.join(_STOP_S)

    def leave_in_child(self) -> None:
        """In a forked child: begin as if nothing had been, without touching the parent's epoll."""
        if self._epoll is not None:
            self._epoll.close()
            os.close(self._wake_fd)
        self.__init__()  # type: ignore[misc]  # every field anew, the lock too

    def at_exit(self) -> None:
        """End the thread for good."""
        self._exiting = True
        self.stop()

    def _start(self) -> select.epoll:
        """Have the thread and its epoll. Called with the lock."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll.register(self._wake_fd, select.EPOLLIN)
        if self._thread is None and not self._exiting:
            self._thread = threading.Thread(target=self._run, name="gpuorch-keeper", daemon=True)
            self._thread.start()
        return self._epoll

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    # -- the thread

    def _run(self) -> None:
        epoll = self._epoll
        assert epoll is not None
        while True:
            self._renew()
            while self._calls:
                self._call(*self._calls.popleft())
            with self._lock:
                if self._stopping:
                    self._end(epoll)
                    return
                wait_s = -1.0 if self._wakes_at == _FOREVER else self._wakes_at - monotonic()
            for fd, _ in epoll.poll(wait_s if wait_s == -1.0 else max(0.0, wait_s)):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                elif (kept := self._at(fd)) is not None:
                    kept.on_readable()
                    # Not held while asleep: its owner may let it go.
                    del kept

    def _at(self, fd: int) -> Kept | None:
        with self._lock:
            found = self._kept.get(fd)
        return None if found is None else found()

    def _renew(self) -> None:
        with self._lock:
            self._wakes_at = _FOREVER
            found = list(self._kept.items())
            absent, self._absent = self._absent, {}
        for reference in absent.values():
            # It says itself that it is still looking.
            if (kept := reference()) is not None:
                kept.renew_due(monotonic())
                del kept
        due_s = _FOREVER
        for fd, reference in found:
            kept = reference()
            if kept is None:
                with self._lock:
                    if self._kept.get(fd) is reference:
                        del self._kept[fd]
                continue
            due_s = min(due_s, kept.renew_due(monotonic()) or _FOREVER)
            del kept
        with self._lock:
            self._wakes_at = min(self._wakes_at, due_s)

    @staticmethod
    def _call(handler: EventHandler, event: Event) -> None:
        try:
            handler(event)
        except Exception as fault:
            # A handler is the user's code: its failure is reported like that of any thread, and
            # must not end the renewals of every other lease.
            threading.excepthook(
                threading.ExceptHookArgs(
                    (type(fault), fault, fault.__traceback__, threading.current_thread())
                )
            )

    def _end(self, epoll: select.epoll) -> None:
        """Let go of everything. Called with the lock, by the thread as its last act."""
        self._thread = None
        self._stopping = False
        self._wakes_at = _FOREVER
        if not self._kept:
            epoll.close()
            os.close(self._wake_fd)
            self._epoll = None
            self._wake_fd = -1


KEEPER = Keeper()
atexit.register(KEEPER.at_exit)
