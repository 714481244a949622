"""How the demo is told: live on a terminal where rich is there, else in lines as they come."""

from __future__ import annotations

import sys
from collections import deque
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

from libclient.cli.lists import BAR_WIDTH, legend, memory_bar, memory_parts
from libclient.cli.screen import Screen
from libclient.cli.tables import Cell, Column, table
from libclient.cli.text import cut, safe
from libclient.demo.board import ASKS, CPU, DEAD, GPU, WAITS, Actor
from libclient.sizes import format_duration, format_memory

if TYPE_CHECKING:
    from rich.live import Live

    from libclient.demo.stage import Stage

# Redrawn so often: smooth, and next to nothing beside the agents.
FRAME_S = 0.1
HISTORY = 50
PLACE_STYLES = {GPU: "green", WAITS: "yellow", CPU: "cyan", DEAD: "bold red", ASKS: "dim"}
COLUMNS = (
    Column("AGENT"),
    Column("PORT", right=True, rank=3),
    Column("PRIORITY", rank=2),
    Column("LIMIT", right=True),
    Column("WHERE"),
    Column("SINCE", right=True, rank=1),
    Column("WHAT", least=20),
)


class Show:
    """A context manager around the demo. `say` tells what happened, `draw` how it stands."""

    def __init__(self) -> None:
        self.screen = Screen()
        self.act = "starting the daemon"
        self._history: deque[str] = deque(maxlen=HISTORY)
        self._start_s = monotonic()
        self._drawn_s = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Show:
        """Take the screen, where there is one."""
        self._live = _live_screen() if self.screen.live else None
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the screen back, with the last picture on it."""
        if self._live is not None:
            self._live.__exit__(kind, fault, trace)
            self._live = None

    def say(self, text: str) -> None:
        """Tell what happened."""
        line = f"{monotonic() - self._start_s:5.1f} s  {safe(text)}"
        self._history.append(line)
        if self._live is None:
            self.screen.line(line)
            self.screen.flush()

    def begin(self, act: str) -> None:
        """Begin an act."""
        self.act = act
        if self._live is None:
            self.screen.line(f"\n{self.screen.paint('== ' + act, 'bold')}")
        else:
            self._history.append(f"== {act}")

    def draw(self, stage: Stage) -> None:
        """Show how it stands."""
        if self._live is None or not stage.gpu or monotonic() - self._drawn_s < FRAME_S:
            return
        self._drawn_s = monotonic()
        from rich.text import Text

        size = self._live.console.size
        lines = picture(stage, self.screen, self.act, list(self._history), size)
        text = Text("\n", no_wrap=True, overflow="crop", end="").join(map(Text.from_ansi, lines))
        text.no_wrap, text.overflow = True, "crop"
        self._live.update(text, refresh=True)


def picture(
    stage: Stage, screen: Screen, act: str, history: list[str], size: tuple[int, int]
) -> list[str]:
    """Return the lines of one picture: the act, the card, the agents, what happened last."""
    width, height = size
    paint = screen.paint
    head = f"gpuorchd demo  {safe(stage.describe())}  {stage.elapsed_s:.0f} s"
    lines = [paint(cut(head, width), "bold"), paint(cut(act, width), "bold cyan")]
    # As many lines as the card takes, so that nothing jumps.
    off = [paint("SAFE_MODE is on: no lease is granted", "bold red"), "", ""]
    lines += ["", *(off if stage.safe_mode else _card(stage.gpu, screen, width))]
    now_s = monotonic()
    rows = [_row(actor, stage.scale, now_s) for actor in stage.board.actors.values()]
    lines += ["", *table(COLUMNS, rows, width, paint, screen.ellipsis), ""]
    room = max(0, height - len(lines) - 1)
    lines += [_history_line(line, screen, width) for line in history[-room:]] if room else []
    return lines[: height - 1]


def _card(gpu: dict[str, Any], screen: Screen, width: int) -> list[str]:
    paint = screen.paint
    cell = memory_bar(gpu, min(BAR_WIDTH * 2, width - 8), paint, screen.unicode)
    parts = memory_parts(gpu) or {}
    amounts = "  ".join(
        f"{name} {format_memory(parts.get(name))}" for name in ("leased", "draining", "free")
    )
    return [
        f"GPU {gpu['index']}  {cell.painted or cell.text}",
        f"       {legend(paint, screen.unicode)}",
        f"       {amounts}",
    ]


def _row(actor: Actor, scale: float, now_s: float) -> list[Cell]:
    entry = actor.member
    span = format_duration(float(round(now_s - actor.since_s))) if actor.since_s else ""
    style = PLACE_STYLES.get(actor.place, "dim")
    return [
        Cell(entry.agent, "bold"),
        Cell(str(entry.port)),
        Cell(entry.priority, "dim"),
        Cell(format_memory(entry.limit_mb(scale))),
        Cell(actor.place, style),
        Cell(span, "dim"),
        Cell(safe(actor.story), style if actor.place in (CPU, WAITS, DEAD) else ""),
    ]


def _history_line(line: str, screen: Screen, width: int) -> str:
    style = "bold" if line.startswith("==") else ""
    return screen.paint(cut(line, width, screen.ellipsis), style)


def _live_screen() -> Live | None:
    try:
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError:
        # Told line by line then.
        return None
    return Live(console=Console(file=sys.stdout), auto_refresh=False, screen=True)
