"""Messages as bytes: one msgpack map each.

Owns the choice of the msgpack implementation. What a message means is the session's business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

if not msgpack.Packer.__module__.endswith("_cmsgpack"):
    # Said once, because the module is imported once.
    warnings.warn(
        "msgpack runs without its C extension: every request costs several times as much",
        RuntimeWarning,
        stacklevel=2,
    )

# What msgpack raises for bytes that are not a message: all of it is the peer's fault.
MALFORMED = (ValueError, TypeError, OverflowError, RecursionError)

Encoder = Callable[[Mapping[str, object]], bytes]

decode: Callable[[bytes], Any] = msgpack.unpackb


def encoder() -> Encoder:
    """Return a function from a message to its payload, for one thread at a time.

    It raises ValueError, TypeError or OverflowError for what msgpack cannot hold.
    """
    pack: Encoder = msgpack.Packer().pack
    return pack
