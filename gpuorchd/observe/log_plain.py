"""Log lines without a library: what is written where structlog cannot be loaded.

An installation that is broken in this is still one whose daemon holds leases, and whoever mends it
needs its log. Every form becomes JSON, behind the priority where the journal reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from gpuorchd.observe.events import Level

PREFIX = {Level.DEBUG: "<7>", Level.INFO: "<6>", Level.WARNING: "<4>", Level.ERROR: "<3>"}


class PlainLines:
    """Render events in the form of `log_lines`, by the standard library alone."""

    def __init__(self, form: str) -> None:
        self._form = form

    def render(
        self, time_s: float, level: Level, name: str, cause_id: int, fields: Mapping[str, object]
    ) -> str:
        """Make the line, its newline included."""
        entry = {
            "event": name,
            "timestamp": datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds"),
            "level": level.name.lower(),
            "cause_id": cause_id,
        }
        prefix = PREFIX[level] if self._form == "journal" else ""
        return f"{prefix}{json.dumps({**entry, **fields}, default=str)}\n"
