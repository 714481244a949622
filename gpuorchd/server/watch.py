"""Watch descriptors that the event loop does not: blocked writers, and peers nobody reads from.

A loop that has paused reading a connection says nothing of its peer's death, and a connection
whose bytes the kernel refuses has to be told when it takes more. One epoll set, itself watched by
the loop, serves all such connections; most connections are never in it.

Notifications are edge-triggered: what stays true (a peer's half-close) is told once for each
`set`.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from typing import Final, Protocol

# One turn of the loop tells no more than this many connections.
EVENTS_PER_TURN: Final = 64


class Watched(Protocol):
    """What a watched connection is told."""

    def on_writable(self) -> None:
        """The kernel takes more bytes."""

    def on_peer_half_closed(self) -> None:
        """The peer will send nothing more."""

    def on_peer_gone(self) -> None:
        """The peer has closed the connection altogether."""


class Watch:
    """One epoll set on the loop. `close` gives its descriptor back."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        self._told: asyncio.Event = asyncio.Event()
        loop.add_reader(self._epoll.fileno(), self._tell)

    def set(self, fd: int, watched: Watched, *, writable: bool, half_close: bool) -> None:
        """Watch `fd`, or change what for. A peer that is gone is told in any case."""
        mask = select.EPOLLET
        if writable:
            mask |= select.EPOLLOUT
        if half_close:
            mask |= select.EPOLLRDHUP
        if fd in self._watched:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._watched[fd] = watched

    def drop(self, fd: int) -> None:
        """Stop watching `fd`; to be called before it is closed."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    async def told(self, timeout_s: float) -> None:
        """Wait until some connections have been told something, at most `timeout_s`."""
        self._told.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), timeout_s)

    def close(self) -> None:
        """Stop watching everything. Does nothing the second time."""
        if self._epoll.closed:
            return
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._watched.clear()

    def _tell(self) -> None:
        self._told.set()
        for fd, events in self._epoll.poll(0, EVENTS_PER_TURN):
            watched = self._watched.get(fd)
            if watched is None:
                # Dropped by what an earlier one in this batch brought about.
                continue
            if events & (select.EPOLLHUP | select.EPOLLERR):
                watched.on_peer_gone()
                continue
            if events & select.EPOLLRDHUP:
                watched.on_peer_half_closed()
            if events & select.EPOLLOUT:
                watched.on_writable()
