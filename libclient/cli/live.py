"""`top`: the screen of `status`, live, with what happened last.

Looks once an interval, and soon after an event comes, but never so often that many events make it a
load. The daemon going away is shown and waited out. Keys are read where standard input is a
terminal, which gets back what it was however `top` ends, or is stopped. With `--json` it is a
stream of documents.
"""

from __future__ import annotations

import signal
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from libclient.cli import exits
from libclient.cli.attention import ENDING, Attention, Woken
from libclient.cli.faults import ExtraMissing, UsageError
from libclient.cli.frame import ORDERS, Frame
from libclient.cli.invocation import Invocation
from libclient.cli.looking import look
from libclient.cli.newsreel import Newsreel
from libclient.errors import RequestError, Unavailable

if TYPE_CHECKING:
    from rich.console import RenderableType

# A burst of events is one change of the picture.
SETTLE_S = 0.1
# Between two looks, whatever happens meanwhile: each asks for every lease there is.
LOOK_LEAST_S = 0.5
QUIT_KEYS = b"q\x04"
# Where the terminal does not make a signal of Ctrl-C.
INTERRUPT_KEY = b"\x03"
SORT_KEY = b"s"


def top(invocation: Invocation) -> int:
    """Show the daemon live until q or Ctrl-C."""
    if invocation.screen.json:
        return _stream(invocation)
    if not invocation.screen.live:
        raise UsageError("`top` needs a terminal; `gpuorch status` prints the same once")
    try:
        import rich.live
    except ModuleNotFoundError:
        raise ExtraMissing("top") from None
    del rich
    # Fail with a plain message where there is no daemon to begin with.
    seen = look(invocation)
    newsreel = Newsreel(invocation.args.socket)
    try:
        with Attention(newsreel.fileno()) as attention:
            ended_by = _show(invocation, seen, newsreel, attention)
    finally:
        newsreel.close()
    if ended_by is not None:
        # The terminal is as it was: now the signal may do what it does.
        invocation.screen.flush()
        signal.raise_signal(ended_by)
    return exits.OK


def _show(
    invocation: Invocation, seen: dict[str, Any] | str, newsreel: Newsreel, attention: Attention
) -> signal.Signals | None:
    """Draw until a key or a signal ends it; return the signal."""
    from rich.console import Console
    from rich.live import Live

    frame = Frame(invocation.screen)
    console = Console()
    order = ORDERS.index(invocation.args.sort)
    looked_s = monotonic()
    with Live(console=console, screen=True, auto_refresh=False, transient=True) as live:
        while True:
            lines = frame.lines(seen, newsreel.latest(), console.size, ORDERS[order])
            live.update(_renderable(lines), refresh=True)
            woken = _pause(newsreel, attention, looked_s, invocation.args.interval)
            if woken.signals & ENDING:
                return min(woken.signals & ENDING)
            if signal.SIGTSTP in woken.signals:
                live.stop()
                attention.stop_process()
                live.start()
            if INTERRUPT_KEY in woken.keys:
                raise KeyboardInterrupt
            if any(key in QUIT_KEYS for key in woken.keys):
                return None
            order = (order + woken.keys.count(SORT_KEY)) % len(ORDERS)
            if not woken.keys and not woken.signals:
                seen = _look_again(invocation)
                looked_s = monotonic()


def _pause(newsreel: Newsreel, attention: Attention, looked_s: float, interval_s: float) -> Woken:
    """Wait until it is time to look again, or a key or a signal comes."""
    due_s = looked_s + interval_s
    news = False
    while True:
        woken = attention.wait(due_s - monotonic(), for_news=not news)
        if woken.keys or woken.signals or (not woken.news and monotonic() >= due_s):
            return woken
        if woken.news:
            news = True
            due_s = min(due_s, max(looked_s + LOOK_LEAST_S, monotonic() + SETTLE_S))
            newsreel.seen()


def _renderable(lines: list[str]) -> RenderableType:
    from rich.text import Text

    text = Text("\n", no_wrap=True, overflow="crop", end="").join(map(Text.from_ansi, lines))
    text.no_wrap, text.overflow = True, "crop"
    return text


def _stream(invocation: Invocation) -> int:
    """Print one document an interval. Raises Unavailable when the daemon goes."""
    while True:
        invocation.restart_budget()
        invocation.screen.record(look(invocation))
        sleep(invocation.args.interval)


def _look_again(invocation: Invocation) -> dict[str, Any] | str:
    invocation.restart_budget()
    try:
        return look(invocation)
    except (Unavailable, RequestError) as fault:
        return str(fault)
