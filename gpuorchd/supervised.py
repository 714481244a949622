"""What the service manager hears while the daemon runs: ready, how it goes, and that it goes on.

Joins the engine and the way to the service manager. `READY=1` is sent again until it is taken: the
start would time out without it. The status is one line for people, sent at most once a second and
only when it has changed. The watchdog is fed only after the engine has completed a turn that was
asked for here: a loop that turns while nothing is decided any more is not alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gpuorchd.core.events import TimePassed
from gpuorchd.core.state import State
from gpuorchd.engine import Engine
from gpuorchd.host.notify import Notifier

# A service manager that did not take a word may take it after so long.
AGAIN_S = 0.05
STATUS_PERIOD_S = 1.0
# A third of what is allowed: one feeding may be lost to a full queue, and the next is in time.
FEEDINGS_PER_PERIOD = 3

Remark = Callable[[], str | None]


class Supervised:
    """The daemon's words to its service manager. Does nothing where there is none."""

    def __init__(self, notifier: Notifier, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._notifier = notifier
        self._engine = engine
        self._loop = loop
        self._remarks: list[Remark] = []
        self._shown = ""
        # Whether a first line was tried.
        self._begun = False
        self._status_timer: asyncio.TimerHandle | None = None
        self._ready_timer: asyncio.TimerHandle | None = None
        self._watchdog_timer: asyncio.TimerHandle | None = None
        self._ended = not notifier.present

    def add_remark(self, remark: Remark) -> None:
        """Let `remark` add its text to the status while it has one."""
        self._remarks.append(remark)

    def start(self) -> None:
        """Say that requests are answered, and begin to say how it goes."""
        if self._ended:
            return
        self._say_ready()
        self._turn_ended()
        self._engine.at_turn_end(self._turn_ended)
        if self._notifier.watchdog_period_s is not None:
            self._feed()

    def refresh(self) -> None:
        """Look at the status within a second: something may have changed."""
        if self._status_timer is None and not self._ended:
            self._status_timer = self._loop.call_later(STATUS_PERIOD_S, self._show)

    def tell_reloading(self) -> None:
        """Say that the configuration is being read again."""
        self._notifier.reloading()

    def tell_reloaded(self) -> None:
        """Say that it has been read, and show in the status line what came of it."""
        if self._ended:
            return
        for timer in (self._ready_timer, self._status_timer):
            if timer is not None:
                timer.cancel()
        self._say_ready()
        self._show()

    def tell_stopping(self) -> None:
        """Say that the daemon ends."""
        self._notifier.stopping()

    def stop(self) -> None:
        """Say nothing more."""
        self._ended = True
        for timer in (self._status_timer, self._ready_timer, self._watchdog_timer):
            if timer is not None:
                timer.cancel()
        self._status_timer = self._ready_timer = self._watchdog_timer = None

    def _turn_ended(self) -> None:
        if self._begun or self._engine.state.probing:
            self.refresh()
        elif not self._ended:
            # The first line waits until there is something to say of the GPUs, and no longer.
            self._show()

    def _say_ready(self) -> None:
        self._ready_timer = None
        if not self._notifier.ready():
            self._ready_timer = self._loop.call_later(AGAIN_S, self._say_ready)

    def _show(self) -> None:
        if self._status_timer is not None:
            self._status_timer.cancel()
            self._status_timer = None
        self._begun = True
        remarks = [text for remark in self._remarks if (text := remark())]
        text = "; ".join([status_line(self._engine.state), *remarks])
        if text == self._shown:
            return
        if self._notifier.status(text):
            self._shown = text
        else:
            self.refresh()

    def _feed(self) -> None:
        period_s = self._notifier.watchdog_period_s
        assert period_s is not None, "fed without a watchdog"
        turns = self._engine.turns
        self._engine.submit(TimePassed())
        if self._engine.turns > turns:
            self._notifier.watchdog()
        self._watchdog_timer = self._loop.call_later(period_s / FEEDINGS_PER_PERIOD, self._feed)


def status_line(state: State) -> str:
    """Say in one line how it goes: GPUs, leases, who waits, SAFE_MODE."""
    draining = len(state.leases) - state.live_leases
    parts = [_gpus(state), _counted(state.live_leases, "lease")]
    if draining:
        parts.append(f"{draining} draining")
    parts.append(f"{len(state.waiters)} waiting")
    return ", ".join(parts)


def _gpus(state: State) -> str:
    if state.safe_mode:
        return "SAFE_MODE: no GPU is granted"
    if state.order:
        total_mb = sum(device.facts.total_mb for device in state.order)
        leased_mb = sum(device.claim_mb for device in state.order)
        count = _counted(len(state.order), "GPU")
        return f"{count} ({leased_mb} of {total_mb} MiB leased)"
    if state.probing:
        return "looking for GPUs"
    return f"no GPU ({state.unavailable or 'none was found'})"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
