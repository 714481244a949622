"""Frames of the wire contract: a 4-byte big-endian length, then that many bytes.

Owns the byte limits and the incremental splitter that both sides use. Knows nothing of what a
frame holds. Bytes come in through `FrameSplitter.feed`; whole payloads come out of
`FrameSplitter.next_frame`, one at a time, so that a caller that must stop (a full outbox) leaves
the rest unparsed.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct(">I")
HEADER_BYTES = HEADER.size

# Client to daemon. A request is small: larger announcements are refused before the body is read.
MAX_REQUEST_BYTES = 65_536
# Daemon to client: room for a page of 1,000 allocations with the longest legal names.
MAX_REPLY_BYTES = 16 * 1024 * 1024

# A first byte in this range starts a text-mode connection: as a frame it would announce half a
# gigabyte or more.
TEXT_FIRST = 0x20
TEXT_LAST = 0x7E

# A frame up to this size leaves a Unix stream socket whole or not at all; a larger one may be cut.
WHOLE_FRAME_BYTES = 32_768


class FrameTooLarge(Exception):
    """The peer announced more bytes than the limit allows.

    `announced` and `limit` are bytes. The stream cannot be followed further.
    """

    def __init__(self, announced: int, limit: int) -> None:
        super().__init__(f"frame of {announced} bytes announced, at most {limit} allowed")
        self.announced = announced
        self.limit = limit


class EmptyFrame(Exception):
    """The peer announced a frame of no bytes, which cannot hold a message."""


def frame(payload: bytes) -> bytes:
    """Put the length in front of a payload."""
    return HEADER.pack(len(payload)) + payload


class FrameSplitter:
    """Cut a byte stream into frames, whatever pieces it arrives in.

    Holds at most one incomplete frame plus what `feed` was given last. `limit` is the largest
    payload in bytes. Pieces that do not complete a frame are gathered in place, so a frame that
    arrives a byte at a time costs no more than its length.
    """

    __slots__ = ("_buffer", "_limit", "_offset")

    def __init__(self, limit: int) -> None:
        # As it came while it holds whole frames only, else a bytearray that grows.
        self._buffer: bytes | bytearray = b""
        self._offset = 0
        self._limit = limit

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the socket."""
        buffer = self._buffer
        if self._offset == len(buffer):
            self._buffer = data
        elif isinstance(buffer, bytearray):
            if self._offset:
                del buffer[: self._offset]
            buffer += data
        else:
            self._buffer = bytearray(memoryview(buffer)[self._offset :])
            self._buffer += data
        self._offset = 0

    def next_frame(self) -> bytes | None:
        """Return the next whole payload, or None when more bytes are needed.

        Raises `FrameTooLarge` or `EmptyFrame` as soon as the four length bytes are there.
        """
        buffer = self._buffer
        start = self._offset + HEADER_BYTES
        if len(buffer) < start:
            return None
        (length,) = HEADER.unpack_from(buffer, self._offset)
        if not 0 < length <= self._limit:
            if length == 0:
                raise EmptyFrame
            raise FrameTooLarge(length, self._limit)
        end = start + int(length)
        if len(buffer) < end:
            return None
        if end == len(buffer):
            # The common case: one whole frame. Nothing of the buffer is kept.
            self._buffer = b""
            self._offset = 0
        else:
            self._offset = end
        payload = buffer[start:end]
        return payload if isinstance(payload, bytes) else bytes(payload)

    @property
    def pending_bytes(self) -> int:
        """Bytes fed and not yet returned as frames."""
        return len(self._buffer) - self._offset
