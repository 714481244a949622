"""One picture of `top`: what was seen, as lines that fit a terminal of a given size.

Pure but for the clock that ages are counted by. The head, the GPUs and the queue keep their places;
holders get what is left, and the latest events what holders leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import time
from typing import Any

from libclient.cli.lists import (
    GPU_COLUMNS,
    LEASE_COLUMNS,
    QUEUE_COLUMNS,
    gpu_rows,
    held_s,
    lease_memory,
    lease_rows,
    legend,
    queue_rows,
)
from libclient.cli.looking import daemon_lines
from libclient.cli.screen import Screen
from libclient.cli.tables import Column, Row, table
from libclient.cli.text import safe
from libclient.cli.watching import event_line
from libclient.wire.vocabulary import PRIORITIES

ORDERS = ("memory", "age", "agent", "priority")
# Holders keep this many lines when many wait, and events this many when many hold.
HOLDERS_LEAST = 4
EVENTS_LEAST = 3
KEYS = "q quit  s order"

Entry = Mapping[str, Any]


class Frame:
    """The screen of `top`. Keeps what was seen last, for when the daemon is gone."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._last: dict[str, Any] = {}

    def lines(
        self,
        seen: dict[str, Any] | str,
        events: Sequence[Entry],
        size: tuple[int, int],
        order: str,
    ) -> list[str]:
        """Return the lines of a picture. `seen` is what was found, or why nothing was."""
        width, height = size
        paint = self._screen.paint
        if isinstance(seen, str):
            head = [paint(f"no daemon: {safe(seen)}; looking again", "bold red")]
        else:
            head = daemon_lines(self._screen, seen, width)
            self._last = seen
        shown = self._last
        head += ["", *self._gpus(shown["gpu_info"], width), ""]
        foot = self._waiting(shown["waiting"], width, max(1, height // 4))
        holders = sorted(shown["allocations"], key=_key(order))
        room = height - len(head) - len(foot) - 1
        body = self._holders(holders, width, max(HOLDERS_LEAST, room - EVENTS_LEAST - 1), order)
        news = [event_line(event, paint) for event in events]
        free = room - len(body) - 1
        if free > 0:
            body += ["", *news[-free:]] if news else []
        body = body[: max(0, room)]
        body += [""] * (room - len(body))
        return [*head, *body, *foot, paint(KEYS, "dim")][:height]

    def _gpus(self, info: Entry, width: int) -> list[str]:
        gpus = info.get("gpus") or ()
        if not gpus:
            return [safe(info.get("message") or "no GPU")]
        mark = self._screen
        return [
            *self._table(GPU_COLUMNS, gpu_rows(gpus, mark), width),
            legend(mark.paint, mark.unicode),
        ]

    def _holders(self, holders: Sequence[Entry], width: int, most: int, order: str) -> list[str]:
        if not holders:
            return [self._screen.paint("nobody holds a lease", "dim")]
        fit = most - 1 if len(holders) < most else most - 2
        lines = self._table(LEASE_COLUMNS, lease_rows(holders[:fit]), width)
        hidden = len(holders) - max(0, fit)
        if hidden > 0:
            lines.append(self._screen.paint(f"and {hidden} more, by {order}", "dim"))
        return lines

    def _waiting(self, waiting: Sequence[Entry], width: int, most: int) -> list[str]:
        if not waiting:
            return [self._screen.paint("nobody waits", "dim")]
        lines = self._table(QUEUE_COLUMNS, queue_rows(waiting[:most]), width)
        if len(waiting) > most:
            lines.append(self._screen.paint(f"and {len(waiting) - most} more", "dim"))
        return lines

    def _table(self, columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[str]:
        return table(columns, rows, width, self._screen.paint, self._screen.ellipsis)


def _key(order: str) -> Callable[[Entry], Any]:
    now = time()
    ranks = {word: rank for rank, word in enumerate(PRIORITIES)}
    keys: dict[str, Callable[[Entry], Any]] = {
        "memory": lambda lease: -(lease_memory(lease) or 0),
        "age": lambda lease: -(held_s(lease, now) or 0.0),
        "agent": lambda lease: str(lease.get("agent")),
        "priority": lambda lease: ranks.get(str(lease.get("priority")), len(ranks)),
    }
    return keys[order]
