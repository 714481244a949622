"""The daemon's life: what ends it, how it ends, and with which exit code.

A first SIGTERM or SIGINT asks for a clean stop; a second changes nothing, for whoever waits has to
be answered. A clean stop has a deadline of its own below the one that the contract promises,
because something that hangs on the way out must not keep the daemon alive. A bug, which is an
exception that nobody expected in a callback of the loop, ends the daemon with a code by which the
service manager starts it again.

Owns the process's signal handling and the loop's exception handler; knows nothing of leases.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from gpuorchd.host.start import EXIT_BUG, Report

# The contract promises the end within 5 s of the signal; the rest is for the interpreter's own end.
STOP_DEADLINE_S = 4.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Lifecycle:
    """Signals and bugs of one daemon. `ended` answers with the exit code when one of them comes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, report: Report) -> None:
        self._loop = loop
        self._report = report
        self._deadline: asyncio.TimerHandle | None = None
        self._reload: Callable[[], None] | None = None
        self.ended: asyncio.Future[int] = loop.create_future()

    def install(self) -> None:
        """Take over SIGTERM, SIGINT, SIGHUP and the exceptions that nobody catches."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_stop, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        self._loop.set_exception_handler(self._on_exception)

    def on_hangup(self, reload: Callable[[], None]) -> None:
        """Let SIGHUP do this from now on; before that it does nothing."""
        self._reload = reload

    def set_deadline(self, before_exit: Callable[[], None]) -> None:
        """End the process if the loop still runs in `STOP_DEADLINE_S`, whatever hangs.

        Only then is `before_exit` called, as the last thing; a stop that is done in time ends
        without it. `uninstall` calls the deadline off.
        """
        self._deadline = self._loop.call_later(STOP_DEADLINE_S, self._on_deadline, before_exit)

    def uninstall(self) -> None:
        """Give the signals back and call the deadline off."""
        if self._deadline is not None:
            self._deadline.cancel()
        for number in SIGNALS:
            self._loop.remove_signal_handler(number)
        self._loop.set_exception_handler(None)

    def go_deaf(self) -> None:
        """Ignore signals from now to the process's end, and call the deadline off.

        What is left takes no time, and a signal must not spoil the exit code. The closing of the
        loop gives the signals their defaults back, so they are kept from coming through as well;
        ignored they are for threads, which have masks of their own and end before that.
        """
        if self._deadline is not None:
            self._deadline.cancel()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def fail(self, what: str, error: BaseException) -> None:
        """Report a bug and end the daemon with the code for it."""
        self._report("daemon.bug_met", what=what, error="".join(traceback.format_exception(error)))
        if not self.ended.done():
            self.ended.set_result(EXIT_BUG)

    def _on_stop(self, number: signal.Signals) -> None:
        if self.ended.done():
            self._report("daemon.stop_repeated", signal=number.name)
            return
        self._report("daemon.stop_asked", signal=number.name)
        self.ended.set_result(0)

    def _on_hangup(self) -> None:
        if self._reload is None or self.ended.done():
            self._report("daemon.hangup_ignored")
        else:
            self._reload()

    def _on_deadline(self, before_exit: Callable[[], None]) -> None:
        self._report("daemon.stop_overdue", deadline_s=STOP_DEADLINE_S)
        before_exit()
        exit_now(self.ended.result())

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        what = str(context.get("message", "an exception in the event loop"))
        error = context.get("exception")
        if error is None or isinstance(error, OSError):
            # The outside's fault (a socket that fails, no descriptor left to accept with): a
            # daemon that fell over it could be made to fall.
            self._report("daemon.loop_failed", what=what, error=str(error or ""))
            return
        self.fail(what, error)


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for threads or for anything else that may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
