"""Lines of text mode: bytes in, lines out, whatever pieces they arrive in.

Owns the limit of a line. Ends of line are LF or CRLF; the last line may lack one once the input has
ended. Knows nothing of what a line holds.
"""

from __future__ import annotations

from libclient.wire.framing import MAX_REQUEST_BYTES


class LineTooLong(Exception):  # reads as what happened, like the frames' FrameTooLarge
    """A line is over the limit; `seen` bytes of it have come so far."""

    def __init__(self, seen: int) -> None:
        super().__init__(f"a line of {seen} bytes or more, at most {MAX_REQUEST_BYTES} allowed")
        self.seen = seen


class LineSplitter:
    """Cut a byte stream into lines. Holds one incomplete line plus what `feed` was given last."""

    __slots__ = ("_buffer", "_ended", "_offset", "_searched")

    def __init__(self) -> None:
        self._buffer = bytearray()
        # Where the next line begins, and up to where no end of line was found.
        self._offset = 0
        self._searched = 0
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the socket."""
        if self._offset:
            del self._buffer[: self._offset]
            self._searched -= self._offset
            self._offset = 0
        self._buffer += data

    def end(self) -> None:
        """Say that the input has ended: what is left is the last line."""
        self._ended = True

    def next_line(self) -> bytes | None:
        """Return the next line without its end, or None when more bytes are needed.

        Raises `LineTooLong` as soon as more bytes than a line may have are there without an end.
        """
        buffer = self._buffer
        start = self._offset
        end = buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(buffer)
            if not self._ended or start == len(buffer):
                self._check(start, len(buffer))
                return None
            end = len(buffer)
        self._check(start, end)
        self._offset = self._searched = min(end + 1, len(buffer))
        return bytes(buffer[start : end - buffer.endswith(b"\r", start, end)])

    def _check(self, start: int, end: int) -> None:
        length = end - start - self._buffer.endswith(b"\r", start, end)
        if length > MAX_REQUEST_BYTES:
            raise LineTooLong(length)

    @property
    def pending_bytes(self) -> int:
        """Bytes fed and not yet returned as lines."""
        return len(self._buffer) - self._offset
