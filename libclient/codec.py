"""Messages as bytes: one msgpack map in one frame.

Owns the choice of the msgpack implementation and the limits on what goes out. What comes in is
checked for its form alone; its meaning is the session's business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from libclient.wire.framing import HEADER, MAX_REQUEST_BYTES

if not msgpack.Packer.__module__.endswith("_cmsgpack"):
    # Said once, because the module is imported once.
    warnings.warn(
        "msgpack runs without its C extension: every request costs several times as much",
        RuntimeWarning,
        stacklevel=2,
    )

# What msgpack raises for bytes that are not a message: all of it is the peer's fault.
MALFORMED = (ValueError, TypeError, OverflowError, RecursionError)

_header = HEADER.pack
decode: Callable[[bytes], Any] = msgpack.unpackb


def encoder() -> Callable[[Mapping[str, object]], bytes]:
    """Return a function from a message to its frame. It is not safe for several threads at once.

    The function raises ValueError or TypeError for a message that cannot be put into a frame.
    """
    pack: Callable[[Mapping[str, object]], bytes] = msgpack.Packer().pack

    def encode(message: Mapping[str, object]) -> bytes:
        payload = pack(message)
        length = len(payload)
        if length > MAX_REQUEST_BYTES:
            raise ValueError(f"the request has {length} bytes, at most {MAX_REQUEST_BYTES} allowed")
        return _header(length) + payload

    return encode
