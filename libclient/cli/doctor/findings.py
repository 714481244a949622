"""One finding of the doctor: what was looked at, how it is, and the commands that mend it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"
LEVELS: Final = (OK, WARN, FAIL)


class Finding(NamedTuple):
    """`found` is in plain words; `mend` are lines to type, or steps where no command does it."""

    area: str
    level: str
    found: str
    mend: tuple[str, ...] = ()


Findings = Iterator[Finding]


def as_root(command: str) -> str:
    """Return a command that needs root, as whoever asks has to type it."""
    return command if os.geteuid() == 0 else f"sudo {command}"
