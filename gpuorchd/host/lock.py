"""A lock that lasts as long as the daemon: one owner of a socket's name, one of a state folder.

The lock is the kernel's (`flock`) and ends with the process, however that ends. The file holds the
owner's pid for a message to people and is never removed: a third daemon could otherwise lock a new
file while a second still waits on the old one.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from gpuorchd.host.start import StartError

_PID_BYTES = 32


class HeldLock:
    """A lock that is held until `release`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        """Let another have it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def hold_lock(path: Path, guarded: Path) -> HeldLock:
    """Take the lock file `path`, which guards `guarded`, or raise `StartError` naming its owner."""
    try:
        # Not followed: in a folder that others may write to, a link would make us write its target.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StartError(f"cannot open the lock file {path}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(fd, _PID_BYTES, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise StartError(f"cannot lock {path}: {error.strerror}") from None
        raise StartError(
            f"another daemon (pid {owner}) has {guarded}: it holds the lock {path}"
        ) from None
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        # A full disk, most likely: settings could not be kept there either.
        os.close(fd)
        raise StartError(f"cannot write the lock file {path}: {error.strerror}") from None
    return HeldLock(fd)
