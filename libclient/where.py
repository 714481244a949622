"""Where the daemon is to be found, and the first step towards it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from time import monotonic

from libclient.errors import TIMEOUT, Unavailable
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


def new_socket() -> socket.socket:
    """Return a socket that never blocks and that no started program inherits."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
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
