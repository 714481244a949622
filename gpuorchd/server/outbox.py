"""What is still to be sent on one connection, and what the kernel has taken of it.

Owns every write to a client. Frames are gathered while a turn runs and leave in as few writes as
their size allows. A write never waits: what the kernel does not take is kept, and `blocked` says so
until a later `flush` has sent it. Frames are merged only up to the size that a Unix stream socket
takes whole or not at all, so a frame of which a part has left (`partial`) stays rare.

Whoever fills an outbox bounds it: `unsent_bytes` is there to be asked. What is unsent over all
outboxes is kept in one `Unsent`, counted from the moment that the kernel refuses bytes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Final

from libclient.wire.framing import WHOLE_FRAME_BYTES

# A reader as fast as the writer could keep one flush going for a whole large reply; the rest
# goes in the next turn of the loop, after everyone else.
FLUSH_BYTES: Final = 262_144

_write = os.write


class Unsent:
    """Bytes that kernels have refused so far, over all connections."""

    __slots__ = ("total_bytes",)

    def __init__(self) -> None:
        self.total_bytes = 0


class Outbox:
    """Unsent frames of one connection. The descriptor stays the connection's: it is not closed."""

    __slots__ = (
        "_chunks",
        "_counted",
        "_fd",
        "_large",
        "_sent",
        "_shared",
        "blocked",
        "broken",
        "guard",
        "unsent_bytes",
    )

    def __init__(self, fd: int, shared: Unsent) -> None:
        self._fd = fd
        self._shared = shared
        self._chunks: deque[bytes] = deque()
        # Bytes of the first chunk that the kernel has.
        self._sent = 0
        # What this outbox has added to the shared count.
        self._counted = 0
        self.unsent_bytes = 0
        # The last flush left something: a later one is needed when the descriptor can be written.
        self.blocked = False
        # The peer is gone: nothing will ever be sent again.
        self.broken = False
        # Told before a part of a frame may leave, and when none is out any more. Only frames over
        # `WHOLE_FRAME_BYTES` are ever cut.
        self.guard: Callable[[bool], None] | None = None
        self._large = False

    def set_guard(self, guard: Callable[[bool], None] | None) -> None:
        """Have `guard` told from now on; a frame that may be cut and is here already is told now.

        With None the guard before is told that nothing of the kind is out any more.
        """
        if self.guard is not None and self._large:
            self.guard(False)
        self.guard = guard
        self._large = guard is not None and any(len(x) > WHOLE_FRAME_BYTES for x in self._chunks)
        if guard is not None and self._large:
            guard(True)

    @property
    def partial(self) -> bool:
        """Whether the kernel has a part of a frame and not the rest of it."""
        return self._sent > 0

    def put(self, data: bytes) -> None:
        """Add one frame or line."""
        self._chunks.append(data)
        if self.guard is not None and len(data) > WHOLE_FRAME_BYTES and not self._large:
            self._large = True
            self.guard(True)
        self.unsent_bytes += len(data)
        if self.blocked:
            self._count()

    def flush(self) -> bool:
        """Send what the kernel takes; say if that was everything.

        Never blocks and never raises for what a peer did.
        """
        chunks = self._chunks
        budget = FLUSH_BYTES
        try:
            if len(chunks) == 1 and not self._sent:
                # Nearly always: one reply, taken whole.
                taken = _write(self._fd, chunks[0])
                if taken == self.unsent_bytes and not self._counted and not self._large:
                    chunks.clear()
                    self.unsent_bytes = 0
                    return True
                budget -= taken
                self._forget(taken)
            while chunks and budget > 0:
                if self._sent:
                    data: bytes | memoryview = memoryview(chunks[0])[self._sent :]
                elif len(chunks) == 1:
                    data = chunks[0]
                else:
                    data = self._merged()
                taken = _write(self._fd, data)
                budget -= taken
                self._forget(taken)
                if taken < len(data):
                    break
        except BlockingIOError:
            pass
        except OSError:
            # The peer is gone. Its end reaches the connection by the usual way.
            self.drop()
            self.broken = True
            return False
        self.blocked = bool(chunks)
        if self._large and not self.blocked and self.guard is not None:
            self._large = False
            self.guard(False)
        if self.blocked or self._counted:
            self._count()
        return not self.blocked

    def drop(self) -> None:
        """Forget everything unsent."""
        self._chunks.clear()
        self._sent = 0
        self.unsent_bytes = 0
        self.blocked = False
        self._count()

    def _merged(self) -> bytes:
        size = 0
        first: list[bytes] = []
        for chunk in self._chunks:
            size += len(chunk)
            if first and size > WHOLE_FRAME_BYTES:
                break
            first.append(chunk)
        return b"".join(first) if len(first) > 1 else first[0]

    def _forget(self, taken: int) -> None:
        self.unsent_bytes -= taken
        chunks = self._chunks
        taken += self._sent
        while chunks and taken >= len(chunks[0]):
            taken -= len(chunks.popleft())
        self._sent = taken

    def _count(self) -> None:
        self._shared.total_bytes += self.unsent_bytes - self._counted
        self._counted = self.unsent_bytes
