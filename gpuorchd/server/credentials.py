"""Who the peer of a connection is, from the kernel alone, and whether it is an admin.

A peer's credentials are those of the process that connected, at the moment when it did. Its
supplementary groups are read only when an admin op is tried.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final, NamedTuple

_UCRED: Final = struct.Struct("=iII")
# From the kernel's headers; Python's socket module does not name it.
SO_PEERGROUPS: Final = 59
# The kernel's own bound on a process's groups.
GROUPS_MAX: Final = 65_536
# Python's getsockopt refuses a larger answer: 256 groups.
PYTHON_OPTION_BYTES: Final = 1_024


class Credentials(NamedTuple):
    """What the kernel says of the process that connected. `pid` 0: not visible from here."""

    pid: int
    uid: int
    gid: int


def credentials_of(sock: socket.socket) -> Credentials:
    """Ask the kernel who connected. Raises OSError where the socket is no longer connected."""
    answer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Credentials(*_UCRED.unpack(answer))


def is_admin(peer: Credentials, sock: socket.socket, admin_gid: int | None) -> bool:
    """Whether the peer may use admin ops: root, the daemon's own user, or the admin group."""
    if peer.uid in (0, os.getuid()):
        return True
    if admin_gid is None:
        return False
    return peer.gid == admin_gid or admin_gid in _groups_of(sock)


def _groups_of(sock: socket.socket) -> tuple[int, ...]:
    try:
        answer = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, PYTHON_OPTION_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            return ()
        answer = _large_option(sock.fileno(), SO_PEERGROUPS, 4 * GROUPS_MAX)
    return struct.unpack(f"={len(answer) // 4}I", answer)


def _large_option(fd: int, option: int, size: int) -> bytes:
    # Rare and slow to import: a user in more groups than Python's own call has room for.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    answer = ctypes.create_string_buffer(size)
    length = ctypes.c_uint32(size)
    failed = libc.getsockopt(fd, socket.SOL_SOCKET, option, answer, ctypes.byref(length))
    return b"" if failed else answer.raw[: length.value]
