"""The mark in a client's input behind which it speaks to this daemon and to no earlier one.

A connection that outlived a daemon may have anything in it: half a request, or requests that the
earlier daemon has taken. All of it is thrown away, up to and including four bytes that begin no
frame and a number that nobody could know before.
"""

from __future__ import annotations

import os
from typing import Final

NONCE_BYTES: Final = 16
FIRST: Final = b"\xff\xff\xff\xff"


class MarkerWait:
    """Waits for the marker of one connection. Keeps less than a marker of what came."""

    __slots__ = ("_marker", "_tail", "nonce")

    def __init__(self) -> None:
        self.nonce = os.urandom(NONCE_BYTES)
        self._marker = FIRST + self.nonce
        self._tail = b""

    def feed(self, data: bytes) -> bytes | None:
        """Take bytes as they came; return what follows the marker, None while it has not come."""
        seen = self._tail + data
        _, found, rest = seen.partition(self._marker)
        if found:
            return rest
        self._tail = seen[-len(self._marker) + 1 :]
        return None
