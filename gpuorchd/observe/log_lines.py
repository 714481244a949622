"""Log lines: one event in, one line of text out, by structlog's renderers.

Three forms: `console` for eyes, `json` for programs, `journal` as key=value behind the priority
prefix that the journal reads. In the forms for eyes a value cannot break out of its line: what is
not printable is escaped. Importing this file imports structlog, which is slow: `log` does it when
the first line is due, in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from structlog.dev import ConsoleRenderer
from structlog.processors import JSONRenderer, LogfmtRenderer

from gpuorchd.observe.events import Level

# Characters of one value: a whole traceback, and no more than a line of the journal holds.
VALUE_CHARS = 8_000
# Entries of one list: the GPUs of one lease at most.
LIST_ENTRIES = 64

# What the journal takes at the start of a line for its priority (syslog's numbers).
PREFIX = {Level.DEBUG: "<7>", Level.INFO: "<6>", Level.WARNING: "<4>", Level.ERROR: "<3>"}
EVENT_COLUMNS = 24


class Lines:
    """Render events in one form. `colours` matters to `console` alone."""

    def __init__(self, form: str, *, colours: bool) -> None:
        self._form = form
        self._json = JSONRenderer(separators=(",", ":"))
        self._logfmt = LogfmtRenderer(bool_as_flag=False)
        self._console = ConsoleRenderer(colors=colours, sort_keys=False, pad_event_to=EVENT_COLUMNS)

    def render(
        self, time_s: float, level: Level, name: str, cause_id: int, fields: Mapping[str, object]
    ) -> str:
        """Make the line, its newline included."""
        entry: dict[str, Any] = {"event": name}
        if self._form != "journal":
            moment = datetime.fromtimestamp(time_s, UTC)
            entry["timestamp"] = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            entry["level"] = level.name.lower()
        entry["cause_id"] = cause_id
        if self._form == "json":
            entry.update((key, _bounded(value)) for key, value in fields.items())
            return f"{_text(self._json(None, '', entry))}\n"
        below = ""
        for key, value in fields.items():
            text = _plain(_bounded(value))
            if self._form == "console" and isinstance(text, str) and "\n" in text:
                # A traceback is read as lines; indented, it cannot be taken for an event.
                rows = (_printable(row) for row in text.splitlines())
                below += "".join(f"    {row}\n" for row in rows)
            else:
                entry[key] = _printable(text) if isinstance(text, str) else text
        if self._form == "console":
            return f"{_text(self._console(None, '', entry))}\n{below}"
        return f"{PREFIX[level]}{_text(self._logfmt(None, '', entry))}\n"


def _text(line: str | bytes) -> str:
    return line if isinstance(line, str) else line.decode()


def _bounded(value: object) -> object:
    """Cut long texts and lists, and say so."""
    if isinstance(value, str):
        return value if len(value) <= VALUE_CHARS else value[:VALUE_CHARS] + "[cut]"
    if isinstance(value, Mapping):
        return {str(key): _bounded(value[key]) for key in list(value)[:LIST_ENTRIES]}
    if isinstance(value, list | tuple | set | frozenset):
        entries = [_bounded(entry) for entry in list(value)[:LIST_ENTRIES]]
        return entries if len(value) <= LIST_ENTRIES else [*entries, "[cut]"]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _bounded(str(value))


def _plain(value: object) -> object:
    if isinstance(value, list | dict):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value


def _printable(text: str) -> str:
    """Escape what would end the line, move the cursor or change a colour."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
