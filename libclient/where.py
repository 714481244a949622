"""Where the daemon is to be found, and the first step towards it.

Knows every socket of this process from the moment it is made, so that a forked child can close its
copies: also of those that another thread was just connecting.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterator
from threading import RLock, get_ident
from time import monotonic

from libclient.errors import TIMEOUT, Unavailable
from libclient.tickets import ANSWER_S
from libclient.turns import interrupted
from libclient.wire.vocabulary import DEFAULT_SOCKET, SOCKET_VARIABLE

# A full backlog answers at once: ask again, ever more slowly.
CONNECT_RETRY_S = 0.001
CONNECT_RETRY_MAX_S = 0.05

# How a caller may name the socket.
SocketPath = str | os.PathLike[str]


def socket_path(given: SocketPath | None = None) -> str:
    """Return the path to connect to: the one given, else GPUORCH_SOCKET, else the default."""
    if given:
        return os.fspath(given)
    return os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET


class _Sockets:
    """The sockets of this process. No fork comes between the making of one and its place here."""

    def __init__(self) -> None:
        # A signal handler may connect, or fork, in the middle of this.
        self._lock = RLock()
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        # The threads that fork now, and have the lock.
        self._forking: list[int] = []

    def new(self) -> socket.socket:
        """Return another. Raises OSError, or Unavailable."""
        if not self._lock.acquire(True, ANSWER_S):
            raise interrupted()
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._open.add(sock)
            return sock
        finally:
            self._lock.release()

    def before_fork(self) -> None:
        """Wait until none is just being made."""
        if self._lock.acquire(True, ANSWER_S):
            self._forking.append(get_ident())

    def after_in_parent(self) -> None:
        """Let others be made again."""
        if (ident := get_ident()) in self._forking:
            self._forking.remove(ident)
            self._lock.release()

    def after_in_child(self) -> None:
        """Close this process's copies; they are the parent's."""
        inherited = list(self._open)
        self.__init__()  # type: ignore[misc]  # every field anew, the lock too
        for sock in inherited:
            sock.close()


_SOCKETS = _Sockets()
os.register_at_fork(
    before=_SOCKETS.before_fork,
    after_in_parent=_SOCKETS.after_in_parent,
    after_in_child=_SOCKETS.after_in_child,
)


def new_socket() -> socket.socket:
    """Return a socket that never blocks and that no started program inherits.

    A forked child closes its copy. Raises Unavailable where the process can have no more.
    """
    try:
        sock = _SOCKETS.new()
    except OSError as fault:
        raise Unavailable(f"no socket to ask the daemon with: {fault.strerror}") from None
    sock.setblocking(False)
    return sock


def connecting(sock: socket.socket, path: str, deadline_s: float) -> Iterator[float]:
    """Connect; yield for how many seconds to sleep before the next try. Raises Unavailable."""
    retry_s = CONNECT_RETRY_S
    while not _try_connect(sock, path):
        if monotonic() + retry_s > deadline_s:
            raise Unavailable(f"{path}: too busy to accept a connection in time", TIMEOUT)
        yield retry_s
        retry_s = min(retry_s * 2, CONNECT_RETRY_MAX_S)


def _try_connect(sock: socket.socket, path: str) -> bool:
    """Connect at once: False where the backlog is full. Raises Unavailable, saying why."""
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        raise Unavailable(f"{path}: no such socket (is gpuorchd running?)") from None
    except ConnectionRefusedError:
        raise Unavailable(f"{path}: nobody answers there (is gpuorchd running?)") from None
    except PermissionError:
        raise Unavailable(f"{path}: permission denied (not in its group?)") from None
    except OSError as fault:
        raise Unavailable(f"{path}: {fault.strerror or fault}") from None
    return True
