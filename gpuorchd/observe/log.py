"""The log: a light front that takes events anywhere and writes them when nothing else is due.

    event(name, **fields) ─┐
    Announce effect ───────┴▶ bounded queue ─▶ timer ─▶ log_lines (structlog) ─▶ log_output ─▶ fd

What the lease path pays is an append. Chatty events are bounded in rate by name, and what is left
out is counted and said (`log.suppressed`); warnings and errors never are. When nobody takes the
output the queue fills, and what then has no place is counted and said later (`log.lost`). Only
declared fields are written (see `events`).
"""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpuorchd.core.effects import Announce
from gpuorchd.observe.events import CATALOGUE, EventKind, Level
from gpuorchd.observe.log_output import Output

if TYPE_CHECKING:
    from gpuorchd.observe.log_lines import Lines
    from gpuorchd.observe.log_plain import PlainLines
    from gpuorchd.observe.sources import ObservedEngine

# Lines a second of one chatty event: enough to follow a dozen agents, too little to cost anything
# when thousands of leases come and go.
CHATTY_PER_S = 50
WINDOW_S = 1.0
# How long an event may wait to be written together with others.
GATHER_S = 0.05
# Until a reader that takes nothing is tried again.
RETRY_S = 0.1
# Lines made in one go: about half a millisecond.
SLICE_LINES = 10
# Events kept for a reader that takes nothing.
QUEUE_MAX = 10_000
# How long `close` waits for the reader.
CLOSE_S = 0.5
# Undeclared events that are told apart.
UNDECLARED_MAX = 64

UNDECLARED = EventKind(Level.WARNING, "not in the catalogue", {})
FORMS = ("console", "json", "journal")


class Log:
    """Take events on one thread and write them from its event loop.

    `form` is one of `FORMS` or `auto`; `level` the least that is written. Events taken before
    `start` are kept and written then, or by `close`. The descriptor is not closed.
    """

    def __init__(self, *, form: str = "auto", level: str = "info", fd: int = 2) -> None:
        self._fd = fd
        self._form = choose_form(fd, os.environ) if form == "auto" else form
        if self._form not in FORMS:
            raise ValueError(f"log form is {form!r}; allowed: auto, {', '.join(FORMS)}")
        self._level = Level[level.upper()]
        self._output = Output(fd)
        self._queue: deque[tuple[float, int, str, Mapping[str, Any]]] = deque()
        self._engine: ObservedEngine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: Lines | PlainLines | None = None
        # Why the lines are plain ones, while that has not been said.
        self._load_failure: str | None = None
        self._loader: threading.Thread | None = None
        self._next: asyncio.Handle | None = None
        self._window: asyncio.TimerHandle | None = None
        # In this window: lines that each chatty event still has, and those that had none.
        self._left: dict[str, int] = {}
        self._suppressed: dict[str, int] = {}
        self._lost = 0
        self._undeclared: set[str] = set()
        self.suppressed_total = 0
        self.lost_total = 0

    def event(self, name: str, /, **fields: object) -> None:
        """Log a declared event. Never blocks and never fails for what it is given."""
        self._take(name, fields)

    def announce(self, effect: Announce) -> None:
        """Log what the core announces to all. What goes to an owner alone is not logged."""
        if effect.private:
            return
        name = effect.name
        if name in self._suppressed:
            # The window has no line left for it: all that a busy lease path pays.
            self._suppressed[name] += 1
        else:
            self._take(name, effect.fields)

    def attach(self, engine: ObservedEngine) -> None:
        """Log every `Announce` from now on, and give each line the engine's turn as its cause."""
        self._engine = engine
        engine.on(Announce, self.announce)

    def set_level(self, level: str) -> None:
        """Write what is at least this severe from now on."""
        self._level = Level[level.upper()]

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to write. Call it once the daemon answers: the first line loads structlog."""
        self._loop = loop
        self._close_window()
        if self._queue:
            self._schedule(0)

    def close(self) -> None:
        """Write what there is, for at most `CLOSE_S`, and stop. Events after this are kept only."""
        for handle in (self._next, self._window):
            if handle is not None:
                handle.cancel()
        self._next = self._window = self._loop = None
        if self._loader is not None:
            self._loader.join()
            self._loader = None
        self._close_window()
        if self._queue:
            lines = self._lines = self._lines or self._load()
            self._tell_load_failure()
            while self._queue and not self._output.broken:
                self._write_one(lines)
        self._output.flush(CLOSE_S)

    def _take(self, name: str, fields: Mapping[str, Any]) -> None:
        kind = CATALOGUE.get(name, UNDECLARED)
        if kind.level < self._level:
            return
        if kind.chatty:
            left = self._left.get(name, CHATTY_PER_S)
            if not left:
                self._suppressed[name] = self._suppressed.get(name, 0) + 1
                return
            self._left[name] = left - 1
        if len(self._queue) >= QUEUE_MAX:
            self._lost += 1
            self.lost_total += 1
            return
        cause_id = 0 if self._engine is None else self._engine.turns
        self._queue.append((time.time(), cause_id, name, fields))
        if self._loop is not None:
            if self._next is None:
                self._schedule(GATHER_S)
            if kind.chatty and self._window is None:
                self._window = self._loop.call_later(WINDOW_S, self._close_window)

    def _close_window(self) -> None:
        """Say what the ended second left out, and begin a new one."""
        self._window = None
        self._left.clear()
        suppressed, self._suppressed = self._suppressed, {}
        for name, count in suppressed.items():
            self.suppressed_total += count
            self._take("log.suppressed", {"kind": name, "count": count})

    def _schedule(self, delay_s: float) -> None:
        assert self._loop is not None, "scheduled before start"
        if self._next is not None:
            self._next.cancel()
        self._next = self._loop.call_later(delay_s, self._write_some)

    def _write_some(self) -> None:
        self._next = None
        if self._lines is None:
            self._load_aside()
            return
        self._output.flush()
        for _ in range(SLICE_LINES):
            if not self._queue or self._output.pending:
                break
            self._write_one(self._lines)
        self._output.flush()
        if self._output.pending:
            self._schedule(RETRY_S)
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self._take("log.lost", {"count": lost})
        if self._queue:
            self._schedule(0)

    def _write_one(self, lines: Lines | PlainLines) -> None:
        time_s, cause_id, name, given = self._queue.popleft()
        kind = CATALOGUE.get(name, UNDECLARED)
        fields = {field: given[field] for field in kind.fields if field in given}
        line = lines.render(time_s, kind.level, name, cause_id, fields)
        self._output.put(line.encode(errors="backslashreplace"))
        if kind is UNDECLARED or len(fields) < len(given):
            self._tell_undeclared(name, [field for field in given if field not in fields])

    def _tell_undeclared(self, name: str, fields: list[str]) -> None:
        """Name what was left out, never its value, once for each event."""
        if name not in self._undeclared and len(self._undeclared) < UNDECLARED_MAX:
            self._undeclared.add(name)
            self._take("log.undeclared", {"kind": name, "fields": fields})

    def _load(self) -> Lines | PlainLines:
        try:
            module = importlib.import_module("gpuorchd.observe.log_lines")
        except Exception as error:
            # Whatever is wrong with the library: what happens is to be read all the same.
            from gpuorchd.observe.log_plain import PlainLines

            self._load_failure = f"{type(error).__name__}: {error}"
            return PlainLines(self._form)
        lines: Lines = module.Lines(self._form, colours=os.isatty(self._fd))
        return lines

    def _tell_load_failure(self) -> None:
        failure, self._load_failure = self._load_failure, None
        if failure is not None:
            self._take("log.library_failed", {"error": failure})

    def _load_aside(self) -> None:
        """Import structlog in a thread: on the loop it would hold up every lease meanwhile."""
        if self._loader is None:
            loop = self._loop
            assert loop is not None, "loads only once started"
            self._loader = threading.Thread(
                target=self._load_in_thread, args=(loop,), name="log-loader", daemon=True
            )
            self._loader.start()

    def _load_in_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        self._lines = self._load()
        try:
            loop.call_soon_threadsafe(self._loaded)
        except RuntimeError:
            # The loop has ended meanwhile; `close` writes what there is.
            pass

    def _loaded(self) -> None:
        if self._loader is not None:
            self._loader.join()
            self._loader = None
        self._tell_load_failure()
        if self._loop is not None:
            self._schedule(0)


def choose_form(fd: int, environ: Mapping[str, str]) -> str:
    """Choose `journal` under the journal, `console` on a terminal, else `json`."""
    try:
        status = os.fstat(fd)
    except OSError:
        return "json"
    if environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
        return "journal"
    return "console" if os.isatty(fd) else "json"
