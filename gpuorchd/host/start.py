"""What every part of the host shares while the daemon starts: how it fails, and whom it tells."""

from __future__ import annotations

from typing import Protocol

# The daemon cannot start here: the socket is another's, the state folder cannot be had.
EXIT_CANNOT_START = 1
# A value that cannot be: trying again changes nothing.
EXIT_USAGE = 2
# A bug. The service manager starts the daemon again.
EXIT_BUG = 70


class StartError(Exception):
    """The daemon cannot start here. `str()` is one line for a person: what, to what, and why."""


class Report(Protocol):
    """Write one log event, by its declared name and fields."""

    def __call__(self, event: str, /, **fields: object) -> None: ...
