"""A raw client of the wire contract, for tests: frames as they are, right or wrong.

It leans on nothing of ours but the length header: messages are msgpack by the msgpack package.
Every wait has a deadline, so that a test of silence or of an answer that never comes ends. Text
mode has `LineClient` beside the daemon process.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack

DEADLINE_S = 20.0
LENGTH = struct.Struct(">I")


def framed(payload: bytes) -> bytes:
    """Put a payload's length in front of it."""
    return LENGTH.pack(len(payload)) + payload


def packed(message: object) -> bytes:
    """Write a message as a frame."""
    return framed(msgpack.packb(message))


class FrameClient:
    """One frame-mode connection: requests out, replies and events in."""

    def __init__(self, path: Path | str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        try:
            self.socket.connect(os.fspath(path))
        except OSError:
            self.socket.close()
            raise
        self.events: list[dict[str, Any]] = []
        self._input = bytearray()
        self._next_id = 0

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def send(self, op: str, **fields: object) -> object:
        """Send one request and do not wait; return its id, which is a new one if none is given."""
        if "id" not in fields:
            self._next_id += 1
            fields["id"] = self._next_id
        self.send_bytes(packed({"op": op, **fields}))
        return fields["id"]

    def send_all(self, messages: Iterable[object]) -> None:
        """Send several messages in one piece."""
        self.send_bytes(b"".join(packed(message) for message in messages))

    def message(self) -> dict[str, Any] | None:
        """Return the next message of any kind, None at the end of the connection."""
        header = self._exactly(LENGTH.size)
        if header is None:
            return None
        payload = self._exactly(LENGTH.unpack(header)[0])
        assert payload is not None, "the connection ended within a frame"
        message = msgpack.unpackb(payload)
        assert isinstance(message, dict)
        return message

    def reply(self) -> dict[str, Any]:
        """Return the next reply; events that come before it are kept in `events`."""
        while True:
            message = self.message()
            assert message is not None, "the daemon closed the connection instead of answering"
            if "event" not in message:
                return message
            self.events.append(message)

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        """Send one request and return its reply."""
        request_id = self.send(op, **fields)
        reply = self.reply()
        assert reply["id"] in (request_id, None)
        return reply

    def event(self, name: str) -> dict[str, Any]:
        """Return the next event of this name, of those kept first; others are kept."""
        for index, kept in enumerate(self.events):
            if kept["event"] == name:
                return self.events.pop(index)
        while True:
            message = self.message()
            assert message is not None, f"the daemon closed the connection before {name}"
            if message.get("event") == name:
                return message
            assert "event" in message, f"a reply came before {name}: {message}"
            self.events.append(message)

    def is_silent(self, for_s: float = 0.2) -> bool:
        """Whether nothing comes for a while; what came is still there to be read."""
        return not self._input and not select.select([self.socket], [], [], for_s)[0]

    def rest(self) -> list[dict[str, Any]]:
        """Return everything that still comes until the daemon closes."""
        return list(iter(self.message, None))

    def fill(self, data: bytes, at_most: int = 100_000_000) -> int:
        """Send `data` over and over until the daemon takes no more; return the bytes sent.

        The last copy may have been sent in part.
        """
        sent = 0
        self.socket.setblocking(False)
        try:
            while sent < at_most:
                _, writable, _ = select.select([], [self.socket], [], 0.3)
                if not writable:
                    break
                at = sent % len(data)
                sent += self.socket.send(data[at:])
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self.socket.settimeout(DEADLINE_S)
        return sent

    def close(self) -> None:
        """End the connection, and with it every lease on it."""
        self.socket.close()

    def _exactly(self, length: int) -> bytes | None:
        deadline = time.monotonic() + DEADLINE_S
        while len(self._input) < length:
            assert time.monotonic() < deadline, "the daemon sends too slowly"
            try:
                data = self.socket.recv(65_536)
            except ConnectionResetError:
                data = b""
            if not data:
                assert not self._input, f"the connection ended within {bytes(self._input[:80])!r}"
                return None
            self._input += data
        taken = bytes(self._input[:length])
        del self._input[:length]
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
