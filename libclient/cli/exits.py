"""Exit codes: one table for the commands, their help, docs/cli.md and its test."""

from __future__ import annotations

from typing import Final, NamedTuple

from libclient.errors import RequestError
from libclient.wire.vocabulary import CONFLICT, FORBIDDEN, INTERNAL, LIMIT, SHUTTING_DOWN

OK: Final = 0
NO: Final = 1
USAGE: Final = 2
EXTRA_MISSING: Final = 3
# Where sysexits.h has a name for it, its number is used.
REFUSED: Final = 65
UNAVAILABLE: Final = 69
BUG: Final = 70
SYSTEM_REFUSED: Final = 71
CANNOT_WRITE: Final = 74
NOT_GRANTED: Final = 75
FORBIDDEN_CODE: Final = 77
# What shells and env(1) answer for the command that they were to run, and 128 + the signal.
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141


class ExitCode(NamedTuple):
    """One row: the number and when it is given."""

    code: int
    meaning: str


TABLE: Final = (
    ExitCode(OK, "done; `run`: the command took over, and the code is its own"),
    ExitCode(NO, "the answer is no: not ready, would not be granted, nothing changed, not well"),
    ExitCode(USAGE, "the command line is wrong"),
    ExitCode(EXTRA_MISSING, "this command needs an extra that is not installed; it says which"),
    ExitCode(REFUSED, "the daemon refused the request, and would refuse it again"),
    ExitCode(UNAVAILABLE, "no daemon, or none that answered in time"),
    ExitCode(BUG, "a bug, in gpuorch or in the daemon"),
    ExitCode(SYSTEM_REFUSED, "the system refused what is needed, such as one more descriptor"),
    ExitCode(CANNOT_WRITE, "the answer cannot be written: a full disk"),
    ExitCode(NOT_GRANTED, "not granted (`run`), or refused for the moment: try again later"),
    ExitCode(FORBIDDEN_CODE, "only an admin, or another user or unit, may do this"),
    ExitCode(NOT_EXECUTABLE, "`run`: the command was found and cannot be executed"),
    ExitCode(NOT_FOUND, "`run`: the command was not found"),
    ExitCode(INTERRUPTED, "interrupted with Ctrl-C; what waited is cancelled"),
    ExitCode(BROKEN_PIPE, "whoever read the output has gone"),
)

_BY_ERROR = {
    FORBIDDEN: FORBIDDEN_CODE,
    LIMIT: NOT_GRANTED,
    SHUTTING_DOWN: NOT_GRANTED,
    CONFLICT: NOT_GRANTED,
    INTERNAL: BUG,
}


def of_refusal(refusal: RequestError) -> int:
    """Return the exit code for a refusal of the daemon."""
    return _BY_ERROR.get(refusal.code, REFUSED)
