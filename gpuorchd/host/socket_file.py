"""The socket file: bound once, by one daemon, with the mode and group that it was given.

Owns the listening socket's name in the file system and a lock file beside it. The lock is held for
the daemon's life, so that of two daemons that start together one wins and the other says why it
does not start. An old socket file is taken over only when nobody answers on it. At a clean stop the
file goes, but only while it is still the one that was bound here.

    claim_socket: lock -> look at what is there -> bind -> group -> mode -> listen
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from pathlib import Path

from gpuorchd.host.lock import HeldLock, hold_lock
from gpuorchd.host.start import StartError

# A burst of thousands of agents connecting at once is refused by the kernel beyond this.
BACKLOG = 4_096
# sun_path holds 108 bytes, the last of them a NUL.
PATH_BYTES_MAX = 107
# A daemon that is alive accepts at once, or its backlog is full.
ANSWER_TIMEOUT_S = 2.0
_UCRED = struct.Struct("3i")


class SocketFile:
    """A bound, listening socket and its name. `listener` belongs to whoever serves it."""

    def __init__(self, path: Path, listener: socket.socket, lock: HeldLock) -> None:
        self.path = path
        self.listener = listener
        self._lock = lock
        self._bound = _identity(path)

    def refuse(self) -> None:
        """Let connections be refused from now on; the name stays ours."""
        self.listener.close()

    def release(self) -> None:
        """Remove the file if it is still ours, close the listener, give up the lock."""
        if self._bound is not None and _identity(self.path) == self._bound:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        self._bound = None
        self.listener.close()
        self._lock.release()


class PassedSocket:
    """A listening socket that the service manager bound: its name stays when the daemon ends."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        name = listener.getsockname()
        # An abstract name comes as bytes, and shows with the "@" that units write.
        self.path = Path("@" + name[1:].decode() if isinstance(name, bytes) else name)

    def refuse(self) -> None:
        """Do nothing: who connects from now on is the next daemon's."""

    def release(self) -> None:
        """Close the listener; the service manager has another descriptor of it."""
        self.listener.close()


def claim_socket(path: Path, mode: int, gid: int | None) -> SocketFile:
    """Bind `path`, or raise `StartError` with the reason why it cannot be ours.

    `mode` is the mode of the file, `gid` its group (None: this process's own).
    """
    size = len(os.fsencode(path))
    if size > PATH_BYTES_MAX:
        raise StartError(
            f"the socket path {path} has {size} bytes; "
            f"at most {PATH_BYTES_MAX} fit in a socket address"
        )
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    lock = hold_lock(path.with_name(path.name + ".lock"), path)
    try:
        _make_room(path)
        return SocketFile(path, _bind(path, mode, gid), lock)
    except BaseException:
        lock.release()
        raise


def _make_room(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StartError(f"cannot look at {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(found.st_mode):
        raise StartError(f"{path} exists and is not a socket; it is left as it is")
    peer = _answering_pid(path)
    if peer is not None:
        raise StartError(f"another daemon (pid {peer}) answers on {path}")
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StartError(f"cannot remove the stale socket {path}: {error.strerror}") from None


def _answering_pid(path: Path) -> str | None:
    """Who accepts connections on `path`: a pid in digits, "unknown", or None for nobody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_TIMEOUT_S)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except TimeoutError:
            # The backlog is full: somebody listens, and is busy.
            return "unknown"
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return "unknown"
            # Such as a datagram socket, or one that we may not open: not known to be stale.
            raise StartError(
                f"cannot tell whether anybody answers on {path}: {error.strerror}; "
                "it is left as it is"
            ) from None
        pid, _, _ = _UCRED.unpack(
            probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        # 0: a process that this one's pid namespace does not see.
        return str(pid) if pid > 0 else "unknown"


def _bind(path: Path, mode: int, gid: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    bound = False
    # Never looser than it will be, not even between the bind and the chmod.
    umask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
        bound = True
        if gid is not None:
            os.chown(path, -1, gid)
        os.chmod(path, mode)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if bound:
            path.unlink(missing_ok=True)
        doing = f"give {path} to group {gid}" if bound and gid is not None else f"bind {path}"
        raise StartError(f"cannot {doing}: {error.strerror}") from None
    finally:
        os.umask(umask)
    return listener


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
