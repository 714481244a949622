"""What can go wrong for a caller, and whose fault it is.

`Unavailable` is the daemon's or the host's fault, `RequestError` the request's, `NotGranted` an
outcome that the caller asked to have raised, `ForkedClient` and `CudaAlreadyStarted` a misuse of
this library in the caller's own process. None of them carries a lease's token.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# Why no daemon answered. `Lease.reason` uses the same words beside the notes of the wire.
NO_DAEMON = "NO_DAEMON"
TIMEOUT = "TIMEOUT"
GARBAGE = "GARBAGE"
CLOSED = "CLOSED"
SEALED = "SEALED"


class GpuOrchError(Exception):
    """Anything that this library raises on purpose, other than ValueError and TypeError."""


class Unavailable(GpuOrchError):
    """No daemon gave an answer that could be used.

    `reason` is one word for counting: NO_DAEMON (none there, or it went away), TIMEOUT (no answer
    in time), GARBAGE (its answer breaks the contract; the connection is closed), CLOSED and SEALED
    (this connection is used for nothing more). `str()` says what happened, in full.
    """

    def __init__(self, detail: str, reason: str = NO_DAEMON) -> None:
        super().__init__(detail)
        self.detail = detail
        self.reason = reason


class RequestError(GpuOrchError):
    """The daemon refused a request.

    `code` is a code of the wire contract, `field` the request field at fault where there is one,
    `retryable` whether the same request may succeed later.
    """

    def __init__(
        self, code: str, message: str, field: str | None = None, retryable: bool = False
    ) -> None:
        super().__init__(code, message, field, retryable)
        self.code = code
        self.message = message
        self.field = field
        self.retryable = retryable

    def __str__(self) -> str:
        """One line for people."""
        where = f" (field {self.field})" if self.field else ""
        return f"{self.code}: {self.message}{where}"


def may_pass(fault: Unavailable | RequestError) -> bool:
    """Whether asking again may succeed: no daemon yet, one that stops, a bound that is reached."""
    return not isinstance(fault, RequestError) or fault.retryable


class NotGranted(GpuOrchError):
    """A lease that was `required` was not granted. `reason` and `detail` are the lease's."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class ForkedClient(GpuOrchError):
    """A client or lease of the parent process was used in a forked child.

    The child's copy of the connection is closed already; the parent's lease is untouched.
    """

    def __init__(self) -> None:
        super().__init__(
            "this connection belongs to the parent process: connect anew in the forked child"
        )


class CudaAlreadyStarted(GpuOrchError):
    """A lease's environment was applied after CUDA had started in this process: too late."""


class RequestRefused(UserWarning):
    """The daemon called a lease request wrong or forbidden; the caller goes on with the CPU."""


def warn_refused(message: str) -> None:
    """Warn `RequestRefused` in the name of whoever called this library.

    Counts frames, because there are more of them under asyncio.
    """
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("libclient."):
        level += 1
        frame = frame.f_back
    warnings.warn(message, RequestRefused, stacklevel=level)
