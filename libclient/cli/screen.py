"""What a command writes to: standard output for its answer, standard error for everything else.

Owns whether there are colours (a terminal, no NO_COLOR, TERM other than dumb), how wide it is, and
whether it can show more than ASCII. With `--json` the answer is one JSON document, or one a line.
An answer that cannot be written ends the command; what only goes with it does not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from libclient.cli.faults import CannotWrite
from libclient.cli.tables import Cell, Column, Row, table
from libclient.cli.text import Paint, coloured, plain, safe


class Screen:
    """Standard output and error of one invocation."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        for stream in (sys.stdout, sys.stderr):
            # A name that the locale cannot write must not end the command.
            getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
        self.live = is_terminal(sys.stdout)
        self.paint: Paint = coloured if colours(sys.stdout) else plain
        self.unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        self.ellipsis = "…" if self.unicode else "~"

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where the answer goes to a pipe or a file."""
        if not self.live:
            return None
        from shutil import get_terminal_size

        return get_terminal_size().columns

    def line(self, text: str = "") -> None:
        """Write one line of the answer. Raises BrokenPipeError or CannotWrite."""
        try:
            sys.stdout.write(text + "\n")
        except BrokenPipeError:
            raise
        except OSError as fault:
            raise CannotWrite(fault) from None

    def document(self, value: object) -> None:
        """Write the answer as one JSON document: indented for eyes, else on one line."""
        from json import dumps

        self.line(dumps(value, indent=2 if self.live else None))

    def record(self, value: object) -> None:
        """Write one JSON document on one line, and let it out at once."""
        from json import dumps

        self.line(dumps(value))
        self.flush()

    def flush(self) -> None:
        """Let out what was written: whoever reads a stream is not to wait for more of it.

        Raises BrokenPipeError or CannotWrite.
        """
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as fault:
            raise CannotWrite(fault) from None

    def table(self, columns: Sequence[Column], rows: Sequence[Row]) -> None:
        """Write a table that fits the terminal."""
        for text in table(columns, rows, self.width, self.paint, self.ellipsis):
            self.line(text)

    def facts(self, facts: Mapping[str, object]) -> None:
        """Write names and values, one a line, aligned."""
        room = max(map(len, facts), default=0)
        for name, value in facts.items():
            self.line(f"{self.paint(name.ljust(room), 'dim')}  {safe(value)}")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; one that is closed is none."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def colours(stream: TextIO | None) -> bool:
    """Whether to write colours to a stream."""
    return (
        is_terminal(stream)
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "") not in ("", "dumb")
    )


def complain(text: str) -> None:
    """Write one line to standard error, as `gpuorch: ...`."""
    paint = coloured if colours(sys.stderr) else plain
    chatter(f"{paint('gpuorch:', 'bold')} {safe(text)}\n")


def chatter(text: str) -> None:
    """Write to standard error as it is. One that is closed, full or broken ends no command."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        # Nobody is there to be told. ValueError: it was closed under way.
        pass


__all__ = ["Cell", "Column", "Row", "Screen", "chatter", "colours", "complain", "is_terminal"]
