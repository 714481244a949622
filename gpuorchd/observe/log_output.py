"""The descriptor that log lines go to: written to without ever waiting for whoever reads it.

A terminal that is stopped, a pipe that nobody reads or a journal that hangs must not hold up a
lease. So every write is asked for first (`poll`) and is at most as large as what a writable pipe
takes whole. The descriptor's own flags stay as they are, because other processes share it.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections import deque

# What a pipe that polls as writable takes without blocking (PIPE_BUF on Linux).
PIECE_BYTES = 4_096
# Failures that may pass: somebody else made the descriptor non-blocking and filled it, or the disk
# is full. The lines wait, as for a reader that takes nothing.
PASSING = frozenset({errno.EAGAIN, errno.EINTR, errno.ENOSPC, errno.EDQUOT})


class Output:
    """Bytes on their way to one descriptor. It stays the caller's and is not closed here."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pieces: deque[bytes] = deque()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        # Nobody can read any more (a closed pipe): what is put is dropped.
        self.broken = False

    @property
    def pending(self) -> bool:
        """Whether something waits to be taken."""
        return bool(self._pieces)

    def put(self, line: bytes) -> None:
        """Add a line. The caller stops adding while `pending` after a `flush`."""
        for start in range(0, len(line), PIECE_BYTES):
            self._pieces.append(line[start : start + PIECE_BYTES])

    def flush(self, wait_s: float = 0) -> None:
        """Write as much as is taken now, or within `wait_s`."""
        deadline_s = time.monotonic() + wait_s
        while self._pieces and not self.broken:
            left_ms = max(0.0, deadline_s - time.monotonic()) * 1_000 if wait_s else 0
            if not self._poll.poll(left_ms):
                return
            if not self._write(self._gather()):
                break
        if self.broken:
            self._pieces.clear()

    def _gather(self) -> bytes:
        """Take out the next pieces that together stay within one safe write."""
        piece = self._pieces.popleft()
        while self._pieces and len(piece) + len(self._pieces[0]) <= PIECE_BYTES:
            piece += self._pieces.popleft()
        return piece

    def _write(self, piece: bytes) -> bool:
        """Say whether anything was taken."""
        try:
            written = os.write(self._fd, piece)
        except OSError as error:
            if error.errno not in PASSING:
                # Nobody reads any more: there is no place left to say so.
                self.broken = True
                return False
            written = 0
        if written < len(piece):
            self._pieces.appendleft(piece[written:])
        return written > 0
