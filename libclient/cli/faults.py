"""What a command can fail with that is neither the daemon's answer nor its absence.

Each has its exit code and one word for programs, in capitals: the codes of the wire are not.
"""

from __future__ import annotations

from libclient.cli import exits


class Failure(Exception):
    """Ends the command. `str()` is one line; `code` is the exit code; `word` is for programs."""

    code = exits.BUG
    word = "BUG"


class UsageError(Failure):
    """The command line asks for something that cannot be. `command` is whose help says more."""

    code = exits.USAGE
    word = "USAGE"

    def __init__(self, text: str, command: str = "") -> None:
        super().__init__(text)
        self.command = command


class ExtraMissing(Failure):
    """A command needs what the base install does not bring. `str()` says how to install it."""

    code = exits.EXTRA_MISSING
    word = "EXTRA_MISSING"

    def __init__(self, command: str) -> None:
        super().__init__(f"`{command}` needs rich: pip install 'gpuorchd[cli]'")


class CannotWrite(Failure):
    """Standard output takes nothing more, though somebody may still read it: a full disk."""

    code = exits.CANNOT_WRITE
    word = "CANNOT_WRITE"

    def __init__(self, fault: OSError) -> None:
        super().__init__(f"the answer cannot be written: {fault.strerror or fault}")


class CannotRun(Failure):
    """The command of `run` cannot be run. `code` is the exit code that shells give for it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.word = "COMMAND_NOT_FOUND" if code == exits.NOT_FOUND else "NOT_EXECUTABLE"
