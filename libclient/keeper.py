"""The one background thread of a process: it listens and renews while the callers compute.

Started with the first lease or subscription, never before. It sleeps in one epoll over all
connections that hold something. A connection is armed for one event at a time, by the thread that
leaves it, and disarmed by the next one that enters: so a thread inside an operation has the
connection to itself, and the two never wake each other for an answer. Handlers of events run here,
one after the other, outside of every lock: they may use the client, and should be quick, because
renewals wait for them.

Nothing that a handler or a connection does ends the thread: it is reported, and the thread goes on.
Nor does it wait for a lock that a signal handler may have been called in the middle of: only the
making of its epoll is guarded, and who cannot get in there in time is told.

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
from contextlib import suppress
from functools import partial
from time import monotonic, sleep
from typing import Protocol

from libclient.decision import Event, EventHandler
from libclient.errors import Unavailable
from libclient.tickets import ANSWER_S
from libclient.turns import interrupted, take

# Errors and hang-ups are reported even when nothing is armed, but, with this, only once.
_DISARMED = select.EPOLLONESHOT
_ARMED = select.EPOLLIN | select.EPOLLONESHOT
_ARMED_TO_SEND = select.EPOLLOUT | select.EPOLLONESHOT
_FOREVER = float("inf")
# The longest sleep: poll counts milliseconds in 32 bits, and a TTL may be longer than that.
_SLEEP_MAX_S = 86_400.0
# How soon a connection is looked after again whose turn has failed.
_AGAIN_S = 0.5
# Events whose handlers have not been called yet. When full, the oldest are dropped: what they said
# of a lease can still be read from it.
_CALLS_MAX = 1_024
# At exit, a handler that does not return is left behind.
_STOP_S = 0.5


class Kept(Protocol):
    """A connection as the keeper knows it. Both methods are called in the keeper's thread.

    One that raises is called again soon.
    """

    def on_ready(self) -> None:
        """Read what is there, if nobody else does, and send what waits to be sent."""

    def renew_due(self, now_s: float) -> float | None:
        """Renew what is due; return when the next renewal is, on the monotonic clock.

        Without a connection, look for one if it is time.
        """


class Keeper:
    """Watches the connections of a process. Its methods may be called by any thread.

    What they raise (OSError, RuntimeError, Unavailable) says that the process is short of
    descriptors or threads, or was interrupted right here; nothing is watched then.

    Lock order: a connection's lock before this one. The thread holds neither while it calls out.
    Whatever is not done with the lock is one step of the interpreter: put in, or take out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, weakref.ref[Kept]] = {}
        # Those that have lost theirs, by identity.
        self._absent: dict[int, weakref.ref[Kept]] = {}
        # Those whose turn has failed.
        self._again: deque[weakref.ref[Kept]] = deque()
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
        thread = self._thread
        return thread is not None and thread.is_alive()

    def adopt(self, kept: Kept, fd: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """Take a connection in; return how to arm it for one event and how to disarm it.

        It is not kept alive: with its owner gone, so are its leases.
        """
        taken: list[bool] = []
        try:
            take(self._lock, taken)
            epoll = self._epoll or self._open()
            epoll.register(fd, _DISARMED)
            self._kept[fd] = weakref.ref(kept)
            self._stopping = False
        finally:
            if taken and taken[0]:
                self._lock.release()
        try:
            self._have_thread()
        except BaseException:
            self.disown(fd)
            self._close_unused()
            raise
        return partial(epoll.modify, fd, _ARMED), partial(epoll.modify, fd, _DISARMED)

    def await_room(self, fd: int, *, reading: bool) -> None:
        """Have an adopted connection's turn come when it takes more bytes, or brings some."""
        if self._epoll is not None:
            self._epoll.modify(fd, _ARMED_TO_SEND | _ARMED if reading else _ARMED_TO_SEND)

    def disown(self, fd: int) -> None:
        """Forget a connection, before its descriptor is closed."""
        if self._kept.pop(fd, None) is not None and self._epoll is not None:
            with suppress(OSError, ValueError):
                # The thread may have ended at this moment, and closed all.
                self._epoll.unregister(fd)

    def await_return(self, kept: Kept, due_s: float) -> None:
        """Have one without a connection look for it at `due_s`. It is not kept alive either."""
        self._have_thread()
        self._absent[id(kept)] = weakref.ref(kept)
        self.expect(due_s)

    def expect(self, due_s: float) -> None:
        """See to it that the thread is awake at `due_s`."""
        # The thread looks at everything each time it wakes, so a wake too many harms nothing, and
        # one that is due later than another is found then.
        if due_s < self._wakes_at:
            self._wakes_at = due_s
            self._wake()

    def call(self, notices: Iterable[tuple[EventHandler, Event]]) -> None:
        """Call these handlers in the keeper's thread."""
        self._have_thread()
        self._calls.extend(notices)
        self._wake()

    def stop(self) -> None:
        """End the thread and let go of its descriptors. A later lease starts it anew."""
        thread = self._thread
        if thread is None or not thread.is_alive():
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

    def _open(self) -> select.epoll:
        """Make the epoll, with what wakes it. Called with the lock."""
        epoll = select.epoll()
        try:
            wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            epoll.close()
            raise
        epoll.register(wake_fd, select.EPOLLIN)
        self._wake_fd = wake_fd
        self._epoll = epoll
        return epoll

    def _have_thread(self) -> None:
        """Have the thread, and the epoll that it sleeps in."""
        if self.running or self._exiting:
            return
        if self._epoll is None:
            taken: list[bool] = []
            try:
                take(self._lock, taken)
                if self._epoll is None:
                    self._open()
            finally:
                if taken and taken[0]:
                    self._lock.release()
        thread = threading.Thread(target=self._run, name="gpuorch-keeper", daemon=True)
        # Without the lock: a signal handler may strike here, and need the thread as well. Of two
        # that are started so, the first to begin stays.
        try:
            thread.start()
        except BaseException:
            self._close_unused()
            raise
        with suppress(Unavailable):
            # It does so itself in any case; here, so that it can be stopped from now on.
            self._install(thread, ANSWER_S)

    def _install(self, thread: threading.Thread, timeout_s: float = -1) -> bool:
        """Make this the keeper's thread, unless there is another. Return whether it is."""
        if not self._lock.acquire(True, timeout_s):
            raise interrupted()
        try:
            if not self.running:
                self._thread = thread
            return self._thread is thread
        finally:
            self._lock.release()

    def _close_unused(self) -> None:
        """Close what no thread came to sleep in."""
        taken: list[bool] = []
        try:
            with suppress(Unavailable):
                take(self._lock, taken)
            if taken and taken[0] and not self.running:
                self._close()
        finally:
            if taken and taken[0]:
                self._lock.release()

    def _close(self) -> None:
        """Close the epoll, unless there is something in it. Called with the lock."""
        if not self._kept and self._epoll is not None:
            self._epoll.close()
            os.close(self._wake_fd)
            self._epoll = None
            self._wake_fd = -1

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            with suppress(BlockingIOError):
                # Full of wakes: it is awake.
                os.eventfd_write(self._wake_fd, 1)

    # -- the thread

    def _run(self) -> None:
        if not self._install(threading.current_thread()):
            return
        while True:
            try:
                if self._turn():
                    return
            except BaseException as fault:
                # Whatever it is, the leases of this process hang on this thread.
                _report(fault)
                sleep(_AGAIN_S)

    def _turn(self) -> bool:
        """Do what is due, and sleep. Return whether it is over."""
        self._renew()
        while self._calls:
            self._call(*self._calls.popleft())
        if self._stopping and self._end():
            return True
        epoll = self._epoll
        assert epoll is not None
        wait_s = min(max(0.0, self._wakes_at - monotonic()), _SLEEP_MAX_S)
        for fd, _ in epoll.poll(wait_s):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            elif (reference := self._kept.get(fd)) is not None:
                self._serve(reference)
        return False

    def _serve(self, reference: weakref.ref[Kept]) -> None:
        """Give a connection its turn."""
        # Not held while asleep: its owner may let it go.
        if (kept := reference()) is None:
            return
        try:
            kept.on_ready()
        except Unavailable:
            # A signal handler struck while its thread had the connection's lock, and is not done.
            self._again.append(reference)
        except BaseException as fault:  # nothing that one connection does ends the thread
            _report(fault)
            self._again.append(reference)

    def _renew(self) -> None:
        self._wakes_at = _FOREVER
        due_s = _FOREVER
        for _ in range(len(self._again)):
            self._serve(self._again.popleft())
        for key in list(self._absent):
            # It says itself that it is still looking.
            if (reference := self._absent.pop(key, None)) is not None:
                due_s = min(due_s, self._renew_one(reference))
        for fd, reference in list(self._kept.items()):
            if reference() is None:
                self._forget(fd, reference)
            else:
                due_s = min(due_s, self._renew_one(reference))
        if self._again:
            due_s = min(due_s, monotonic() + _AGAIN_S)
        if due_s < self._wakes_at:
            self._wakes_at = due_s

    def _renew_one(self, reference: weakref.ref[Kept]) -> float:
        """Renew what is due of a connection; return when to come back."""
        if (kept := reference()) is None:
            return _FOREVER
        try:
            return kept.renew_due(monotonic()) or _FOREVER
        except Unavailable:
            # The same.
            return monotonic() + _AGAIN_S
        except BaseException as fault:  # nothing that one connection does ends the thread
            _report(fault)
            return monotonic() + _AGAIN_S

    def _forget(self, fd: int, reference: weakref.ref[Kept]) -> None:
        """Take out a connection that is gone, unless another has its number by now."""
        if self._lock.acquire(False):
            try:
                if self._kept.get(fd) is reference:
                    del self._kept[fd]
            finally:
                self._lock.release()

    @staticmethod
    def _call(handler: EventHandler, event: Event) -> None:
        try:
            handler(event)
        except BaseException as fault:
            # A handler is the user's code: its failure is reported like that of any thread, and
            # must not end the renewals of every other lease.
            _report(fault)

    def _end(self) -> bool:
        """Let go of everything, as the thread's last act. Return whether it is to end still."""
        with self._lock:
            if not self._stopping:
                return False
            self._thread = None
            self._stopping = False
            self._wakes_at = _FOREVER
            self._close()
            return True


def _report(fault: BaseException) -> None:
    """Report what went wrong in the thread, as for any thread."""
    said = threading.ExceptHookArgs(
        (type(fault), fault, fault.__traceback__, threading.current_thread())
    )
    try:
        threading.excepthook(said)
    except BaseException:
        # The hook is the user's code too. Without a place to report to, nothing is left to do.
        with suppress(BaseException):
            threading.__excepthook__(said)


KEEPER = Keeper()
atexit.register(KEEPER.at_exit)
