"""`top`: the screen of `status`, live, with what happened last.

Looks once an interval, and at once when an event comes. The daemon going away is shown and waited
out. Keys are read where standard input is a terminal. With `--json` it is a stream of documents.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from select import select
from time import sleep
from typing import TYPE_CHECKING, Any

from libclient.cli import exits
from libclient.cli.faults import ExtraMissing, UsageError
from libclient.cli.frame import ORDERS, Frame
from libclient.cli.invocation import Invocation
from libclient.cli.looking import look
from libclient.cli.newsreel import Newsreel
from libclient.cli.screen import is_terminal
from libclient.errors import RequestError, Unavailable

if TYPE_CHECKING:
    from rich.console import RenderableType

# A burst of events is one change of the picture.
SETTLE_S = 0.1
QUIT_KEYS = b"q\x03\x04"
SORT_KEY = b"s"


def top(invocation: Invocation) -> int:
    """Show the daemon live until q or Ctrl-C."""
    if invocation.screen.json:
        return _stream(invocation)
    if not invocation.screen.live:
        raise UsageError("`top` needs a terminal; `gpuorch status` prints the same once")
    try:
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError:
        raise ExtraMissing("top") from None
    # Fail with a plain message where there is no daemon to begin with.
    seen: dict[str, Any] | str = look(invocation)
    frame = Frame(invocation.screen)
    console = Console()
    newsreel = Newsreel(invocation.args.socket)
    order = ORDERS.index(invocation.args.sort)
    try:
        with (
            _keys() as keys,
            Live(console=console, screen=True, auto_refresh=False, transient=True) as live,
        ):
            while True:
                lines = frame.lines(seen, newsreel.latest(), console.size, ORDERS[order])
                live.update(_renderable(lines), refresh=True)
                pressed = _wait(keys, newsreel, invocation.args.interval)
                if any(key in QUIT_KEYS for key in pressed):
                    return exits.OK
                order = (order + pressed.count(SORT_KEY)) % len(ORDERS)
                seen = _look_again(invocation)
    except KeyboardInterrupt:
        return exits.OK
    finally:
        newsreel.close()


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


def _wait(keys: int | None, newsreel: Newsreel, interval_s: float) -> bytes:
    """Wait for a key, news or the interval; return the keys that were pressed."""
    watched = [newsreel.fileno(), *([] if keys is None else [keys])]
    ready, _, _ = select(watched, [], [], interval_s)
    if keys in ready and keys is not None:
        return os.read(keys, 64) or QUIT_KEYS[:1]
    if newsreel.fileno() in ready:
        sleep(SETTLE_S)
        newsreel.seen()
    return b""


@contextmanager
def _keys() -> Iterator[int | None]:
    """Let keys be read one by one, without echo, and put the terminal back afterwards."""
    if not is_terminal(sys.stdin):
        yield None
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
