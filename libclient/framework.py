"""What a deep-learning framework in this process still holds.

Never imports one: only what is loaded already is asked.
"""

from __future__ import annotations

import sys
from typing import Any


def cuda_framework() -> Any | None:
    """Return torch if it is loaded and has started CUDA in this process, else None."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    cuda = getattr(torch, "cuda", None)
    started = getattr(cuda, "is_initialized", None)
    return torch if started is not None and started() else None


def empty_cache() -> None:
    """Give a framework's cached blocks back to the driver, so that others can have them.

    Without this a process that releases and lives on keeps what its allocator has cached.
    """
    torch = cuda_framework()
    if torch is None:
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        # CUDA itself has failed in this process; the lease is to be released all the more.
        return
