"""What a live screen waits for: keys, news, the time, and signals that want the terminal back.

While it is open, keys are read one by one and are not shown. A signal has no effect of its own but
to end the wait: whoever draws takes the screen down first and then lets the signal do what it does.
So the terminal is never left without its cursor, or on the wrong screen.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from select import select
from types import TracebackType
from typing import NamedTuple, Self

from libclient.cli.screen import is_terminal

# The end of the process, and of the terminal.
ENDING = frozenset({signal.SIGTERM, signal.SIGHUP})
# Ctrl-Z, and a window of another size.
OTHERS = frozenset({signal.SIGTSTP, signal.SIGWINCH})


class Woken(NamedTuple):
    """Why a wait ended; all empty where only the time was over."""

    keys: bytes = b""
    signals: frozenset[signal.Signals] = frozenset()
    news: bool = False


class Attention:
    """One wait for everything. `news` is a descriptor that is readable while there is news.

    A context manager, for the main thread alone: signals are its own only.
    """

    def __init__(self, news: int) -> None:
        self._news = news
        self._keys = sys.stdin.fileno() if is_terminal(sys.stdin) else None
        self._before: dict[signal.Signals, object] = {}
        self._restore_keys: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        """Take over keys and signals."""
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in ENDING | OTHERS:
            # What was ignored from the start, as under nohup, stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, _only_wake)
        self._take_keys()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give keys and signals back."""
        self._restore_keys()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as it was given by `signal`
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self, timeout_s: float, *, for_news: bool = True) -> Woken:
        """Wait for a key or a signal, for news where asked to, for at most `timeout_s`."""
        watched = [self._reader]
        watched += [self._news] if for_news else []
        watched += [] if self._keys is None else [self._keys]
        ready, _, _ = select(watched, [], [], max(0.0, timeout_s))
        keys = b""
        if self._keys is not None and self._keys in ready:
            # Nothing at all is the end of the terminal's input.
            keys = os.read(self._keys, 64) or b"\x04"
        numbers = os.read(self._reader, 64) if self._reader in ready else b""
        return Woken(keys, frozenset(map(signal.Signals, numbers)), self._news in ready)

    def stop_process(self) -> None:
        """Do what Ctrl-Z does, with the terminal as it was; return when the process goes on."""
        self._restore_keys()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, _only_wake)
        self._take_keys()

    def _take_keys(self) -> None:
        if self._keys is None:
            return
        import termios
        import tty

        fd = self._keys
        before = termios.tcgetattr(fd)
        tty.setcbreak(fd)

        def restore() -> None:
            try:
                termios.tcsetattr(fd, termios.TCSADRAIN, before)
            except termios.error:
                # The terminal has gone, which may be what ends the screen.
                pass

        self._restore_keys = restore


def _only_wake(number: int, frame: object) -> None:
    """Do nothing: Python writes the number to the descriptor that ends the wait."""
