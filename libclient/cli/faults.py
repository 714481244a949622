"""What a command can fail with that is neither the daemon's answer nor its absence."""

from __future__ import annotations


class UsageError(Exception):
    """The command line asks for something that cannot be. `str()` is one line."""


class ExtraMissing(Exception):
    """A command needs what the base install does not bring. `str()` says how to install it."""

    def __init__(self, command: str) -> None:
        super().__init__(f"`{command}` needs rich: pip install 'gpuorchd[cli]'")
