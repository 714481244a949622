"""The least that speaks frames: for benchmarks that must not measure their own client."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Self

import msgpack

from libclient.wire.framing import HEADER_BYTES, MAX_REPLY_BYTES, FrameSplitter, frame

READ_BYTES = 65_536


class WireClient:
    """One connection; one request at a time; events are skipped."""

    def __init__(self, path: Path | str, timeout_s: float = 30.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        self.socket.connect(os.fspath(path))
        self._splitter = FrameSplitter(MAX_REPLY_BYTES)
        self._id = 0
        # Bytes of the last request and of its reply, with their length fields.
        self.sent_bytes = 0
        self.received_bytes = 0

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        """Send one request and return its reply."""
        self.send(op, **fields)
        return self.reply()

    def send(self, op: str, **fields: object) -> None:
        """Send one request."""
        self._id += 1
        request = frame(msgpack.packb({"id": self._id, "op": op, **fields}))
        self.sent_bytes = len(request)
        self.socket.sendall(request)

    def reply(self) -> dict[str, Any]:
        """Return the reply to the last request."""
        while (message := self._next_reply()) is None:
            self._receive()
        return message

    def reply_if_there(self) -> dict[str, Any] | None:
        """Read once from a socket that has something; return the reply if that completed it."""
        self._receive()
        return self._next_reply()

    def _receive(self) -> None:
        received = self.socket.recv(READ_BYTES)
        if not received:
            raise ConnectionResetError("the daemon closed the connection")
        self._splitter.feed(received)

    def _next_reply(self) -> dict[str, Any] | None:
        while (payload := self._splitter.next_frame()) is not None:
            message: dict[str, Any] = msgpack.unpackb(payload)
            if message.get("id") == self._id:
                self.received_bytes = len(payload) + HEADER_BYTES
                return message
        return None

    def close(self) -> None:
        """End the connection."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
