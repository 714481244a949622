"""The small things by which the threads of an exchange wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from libclient.errors import TIMEOUT, ForkedClient, Unavailable
from libclient.tickets import ANSWER_S


class ParentsLock:
    """What stands for the lock in a forked child: whoever wants in is told."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Raise ForkedClient."""
        raise ForkedClient

    def release(self) -> None:
        """Nobody has it."""

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *fault: object) -> None:
        """Nobody gets here."""


def nothing() -> None:
    """Tell no keeper: it does not know the connection."""


def interrupted() -> Unavailable:
    """Return what a signal handler is told that strikes while the client is at work."""
    # Nobody holds the lock that long but one who was interrupted while holding it: a signal handler
    # that uses the client must not hang for that.
    return Unavailable("the client was interrupted at work, and cannot be used here", TIMEOUT)


def take(lock: Lock | ParentsLock, taken: list[bool]) -> None:
    """Take a lock within the time of an operation. Raises Unavailable.

    `taken` then holds whether it is to be released: put down before an interrupt can strike.
    """
    taken.extend(map(lock.acquire, (True,), (ANSWER_S,)))
    if not taken[0]:
        raise interrupted()


def opener(gate: Lock) -> Callable[[], None]:
    """Return what opens a gate, and may be called again: for the lead, then for the answer."""

    def open_gate() -> None:
        if gate.locked():
            gate.release()

    return open_gate
