"""What `run` says on standard error while it waits, and how the wait ended.

On a terminal it is one line that changes; elsewhere a line whenever the place in the queue changes;
with `--json` one document at the end. Standard output belongs to the command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from time import monotonic
from types import TracebackType
from typing import Any

from libclient.cli.lists import gpu_numbers
from libclient.cli.screen import chatter, complain, is_terminal
from libclient.cli.text import counted, cut, safe
from libclient.decision import Decision, Event
from libclient.sizes import format_duration, format_memory

ERASE_LINE = "\r\x1b[K"


class Progress:
    """The story of one wait. A context manager around it, which leaves a clean line."""

    def __init__(self, fields: Mapping[str, Any], *, quiet: bool, json: bool) -> None:
        self._json = json
        self._silent = quiet or json
        terminal = is_terminal(sys.stderr) and os.environ.get("TERM", "") not in ("", "dumb")
        self._moving = terminal and not self._silent
        self._wanted = describe(fields)
        self._start_s = monotonic()
        self._place: tuple[int, float | None] | None = None
        self._drawn = False

    def __enter__(self) -> Progress:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the changing line away, also where Ctrl-C ends the wait."""
        if self._drawn:
            chatter(ERASE_LINE)
            self._drawn = False

    def on_event(self, event: Event) -> None:
        """Hear of an event; only the place in the queue matters here."""
        position = event.get("position")
        if event.get("event") != "lease.queued" or not isinstance(position, int):
            return
        moved = self._place is None or self._place[0] != position
        eta_s = event.get("eta_s")
        self._place = (position, eta_s if isinstance(eta_s, int | float) else None)
        if self._moving:
            self._draw()
        elif moved and not self._silent:
            complain(self._text())

    def on_tick(self) -> None:
        """Show that time passes."""
        if self._moving and self._place is not None:
            self._draw()

    def granted(self, decision: Decision) -> None:
        """Tell of the grant, where somebody waited for it or a program listens."""
        if self._json:
            self._record({"granted": True, "lease_id": decision.lease_id, "gpus": decision.gpus,
                          "waited_s": decision.waited_s, "enforcement": decision.enforcement,
                          "env": decision.env})  # fmt: skip
        elif self._place is not None and not self._silent:
            amount = format_memory(decision.memory_mb)
            complain(
                f"granted {amount} on GPU {gpu_numbers({'gpus': decision.gpus})} "
                f"after {format_duration(self._waited_s())}"
            )

    def failed(self, why: str, facts: Mapping[str, object], *, on_cpu: bool) -> None:
        """Tell why there is no lease; this is said even when quiet."""
        if self._json:
            word, _, detail = why.partition(": ")
            self._record({"granted": False, "reason": word, "detail": detail, **facts,
                          "device": "cpu" if on_cpu else None})  # fmt: skip
            return
        complain(f"{why}; going on with the CPU" if on_cpu else f"not granted: {why}")

    def _draw(self) -> None:
        # The last column stays free: some terminals wrap as soon as it is written to.
        chatter(ERASE_LINE + cut(f"gpuorch: {self._text()}", _stderr_columns() - 1, "~"))
        self._drawn = True

    def _text(self) -> str:
        position, eta_s = self._place or (0, None)
        ahead = "next" if position == 1 else f"{position - 1} ahead"
        eta = f", about {format_duration(round(eta_s))} to go" if eta_s else ""
        waited = format_duration(round(self._waited_s()))
        return f"waiting for {self._wanted}: {ahead}{eta} (waited {waited})"

    def _waited_s(self) -> float:
        return monotonic() - self._start_s

    @staticmethod
    def _record(document: Mapping[str, object]) -> None:
        from json import dumps

        chatter(dumps(document) + "\n")


def _stderr_columns() -> int:
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        # It has gone meanwhile; a wait is not to end for that.
        columns = 0
    # A terminal that does not know its size says 0.
    return max(20, columns or 80)


def describe(fields: Mapping[str, Any]) -> str:
    """Return what is asked for in words, such as `4 GiB on 2 GPUs as analyst`."""
    gpus = fields.get("gpus", 1)
    if fields.get("exclusive"):
        what = f"{counted(gpus, 'whole GPU')}"
    elif fields.get("min_memory_mb"):
        what = format_memory(fields["min_memory_mb"])
        what += f" on each of {gpus} GPUs" if gpus > 1 else ""
    else:
        what = "GPU memory" if gpus == 1 else f"memory on {gpus} GPUs"
    return f"{what} as {safe(fields['agent'])}"
