"""What has come in on one connection and was not taken yet, as requests.

The first byte decides between frames and text for the connection's whole life. Bytes go in as they
come, requests come out one at a time, so whoever takes them can stop between any two. What is kept
is bounded by one read and one incomplete request.
"""

from __future__ import annotations

from gpuorchd.server.faults import Fault, read_frame, read_line
from gpuorchd.server.lines import LineSplitter, LineTooLong
from gpuorchd.server.requests import AnyRequest
from libclient.wire import vocabulary as words
from libclient.wire.framing import (
    MAX_REQUEST_BYTES,
    TEXT_FIRST,
    TEXT_LAST,
    EmptyFrame,
    FrameSplitter,
    FrameTooLarge,
)


class Intake:
    """The incoming half of a connection, without I/O."""

    __slots__ = ("_splitter", "has_ended")

    def __init__(self, *, frames: bool = False) -> None:
        """`frames`: the connection speaks frames already."""
        self._splitter: FrameSplitter | LineSplitter | None = None
        if frames:
            self._splitter = FrameSplitter(MAX_REQUEST_BYTES)
        # No more bytes will come; what is left is the last line.
        self.has_ended = False

    @property
    def is_text(self) -> bool:
        """Whether the connection speaks lines."""
        return isinstance(self._splitter, LineSplitter)

    @property
    def is_between_frames(self) -> bool:
        """Whether the next byte begins a frame."""
        return isinstance(self._splitter, FrameSplitter) and not self._splitter.pending_bytes

    def feed(self, data: bytes) -> None:
        """Take bytes as they came from the socket."""
        if self._splitter is None:
            text = TEXT_FIRST <= data[0] <= TEXT_LAST
            self._splitter = LineSplitter() if text else FrameSplitter(MAX_REQUEST_BYTES)
        self._splitter.feed(data)

    def end(self) -> None:
        """Take the end of input."""
        self.has_ended = True
        if isinstance(self._splitter, LineSplitter):
            self._splitter.end()

    def next(self) -> AnyRequest | Fault | None:
        """Return the next request, or what is wrong with it; None when more bytes are needed."""
        try:
            if isinstance(self._splitter, FrameSplitter):
                payload = self._splitter.next_frame()
                return None if payload is None else read_frame(payload)
            if isinstance(self._splitter, LineSplitter):
                return self._next_line(self._splitter)
        except FrameTooLarge as error:
            message = f"a frame of {error.announced} bytes is announced; allowed: {error.limit}"
            return Fault(words.FRAME_TOO_LARGE, message)
        except LineTooLong as error:
            message = f"a line has {error.seen} bytes or more; allowed: {MAX_REQUEST_BYTES}"
            return Fault(words.FRAME_TOO_LARGE, message)
        except EmptyFrame:
            return Fault(words.BAD_FRAME, "a frame of 0 bytes is announced; allowed: 1 or more")
        return None

    @staticmethod
    def _next_line(lines: LineSplitter) -> AnyRequest | Fault | None:
        while (line := lines.next_line()) is not None:
            request = read_line(line)
            if request is not None:
                return request
        return None
