"""The running demo: daemon, agents, and the one loop that hears them all.

`pump` is the loop: it takes in reports, asks the daemon how it stands, draws, and returns as soon
as what was waited for is true. Nothing here waits longer than its deadline, nor past the end of the
whole.
"""

from __future__ import annotations

import select
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import libclient
from libclient.demo.board import Board
from libclient.demo.processes import AgentProcess, DaemonProcess, end_all, has_driver
from libclient.demo.roster import CARD_MB, ROSTER, VISION_GIB, Member, member
from libclient.demo.show import Show
from libclient.sizes import format_memory

# From the first process to the last: whatever happens, it is over then.
WHOLE_S = 50.0
START_S = 15.0
TICK_S = 0.05
# How often the daemon is asked how it stands; people do not read faster.
LOOK_S = 0.2
# How long an agent waits for memory before it goes on with the CPU; longer than the demo.
PATIENCE_S = 300
IMPATIENCE_S = 2.5
# A path of a Unix socket has room for 107 bytes.
SOCKET_PATH_BYTES = 107


class CannotStart(Exception):
    """The daemon does not answer. `str()` says what it wrote."""


class Stage:
    """A context manager: on leaving it, everything that it started has ended."""

    def __init__(self, show: Show) -> None:
        self.show = show
        self.board = Board()
        self.start_s = monotonic()
        self.gpu: dict[str, Any] = {}
        self.safe_mode = False
        # The most that the daemon itself said was leased and draining, and how often it was asked.
        self.promised_mb = 0
        self.looks = 0
        self.scale = 1.0
        self.simulated = not has_driver()
        self.daemon_code: int | None = None
        self._agents: dict[str, AgentProcess] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="gpuorch-demo-", dir=_short_folder()))
        self._daemon: DaemonProcess | None = None
        self._client: libclient.Client | None = None
        self._looked_s = 0.0

    def __enter__(self) -> Stage:
        """Return the stage; `open` starts what is on it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End everything."""
        self.close()

    @property
    def capacity_mb(self) -> int:
        """What the card has, in MiB."""
        return int(self.gpu.get("memory_total_mb") or 0)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return monotonic() - self.start_s

    @property
    def left_s(self) -> float:
        """Seconds until the demo ends in any case."""
        return WHOLE_S - self.elapsed_s

    def open(self) -> None:
        """Start the daemon, on the host's GPUs where it can use them. Raises CannotStart."""
        self._start_daemon()
        if not self.simulated and not self.gpu:
            self.show.say("the driver is there, but no GPU can be used: simulating one card")
            self._stop_daemon()
            self.simulated = True
            self._start_daemon()
        if not self.gpu:
            raise CannotStart(f"the daemon shows no GPU\n{self._last_words()}")
        if not self.simulated:
            # So that the roster does not fit at once here either.
            self.scale = self._free_mb() / CARD_MB

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask the daemon. Raises Unavailable or RequestError."""
        assert self._client is not None, "the daemon answers before the first question"
        return self._client.call(op, **fields)

    def enter(self, agent: str) -> None:
        """Start an agent."""
        entry = member(agent)
        flags = ["--priority", entry.priority, "--device", str(self.gpu["index"])]
        flags += self._asks(entry)
        flags += ["--stubborn"] if entry is ROSTER[-1] else []
        assert self._daemon is not None
        self._agents[agent] = AgentProcess(agent, flags, self._daemon.socket)

    def kill(self, agent: str) -> tuple[int, float]:
        """Kill an agent with SIGKILL; return its pid and the moment just before."""
        process = self._agents.pop(agent)
        at_s = monotonic()
        process.signal(signal.SIGKILL)
        self.board.killed(agent, at_s)
        pid = process.pid
        process.end()
        return pid, at_s

    def finish(self, agent: str) -> None:
        """Let an agent come to the end of its piece of work."""
        self._agents[agent].signal(signal.SIGUSR1)

    def pump(self, until: Callable[[], bool], within_s: float) -> bool:
        """Take in what happens until something is true; return whether it became so in time."""
        end_s = monotonic() + min(within_s, self.left_s)
        while not until():
            if monotonic() >= end_s:
                return False
            self._turn()
        return True

    def watch(self, span_s: float) -> None:
        """Let time pass, for eyes."""
        self.pump(lambda: False, span_s)

    def close(self) -> None:
        """End the agents, then the daemon, and remove what they wrote. Idempotent."""
        end_all(self._agents)
        self._agents.clear()
        self._stop_daemon()
        shutil.rmtree(self._folder, ignore_errors=True)

    def wait_until_free(self, within_s: float) -> bool:
        """End the agents; return whether all of their memory came back in time."""
        end_all(self._agents)
        self._agents.clear()
        for actor in self.board.at("GPU"):
            self.board.killed(actor.member.agent, monotonic())
        return self.pump(
            lambda: not (self.gpu["memory_leased_mb"] or self.gpu["memory_draining_mb"]), within_s
        )

    def stop(self) -> None:
        """Stop the daemon and keep its exit code."""
        self._stop_daemon()

    def _asks(self, entry: Member) -> list[str]:
        asks = [f"{entry.limit_mb(self.scale)}:{PATIENCE_S}"]
        if entry.agent == "newsreader":
            vision = Member("", VISION_GIB, 0, "", "")
            asks.insert(0, f"{vision.limit_mb(self.scale)}:{IMPATIENCE_S}")
        return [word for ask in asks for word in ("--ask", ask)]

    def _turn(self) -> None:
        by_fd = {process.fileno(): process for process in self._agents.values()}
        for fd in select.select(list(by_fd), [], [], TICK_S)[0]:
            process = by_fd[fd]
            reports = process.reports()
            if reports is None:
                self._lost(process)
            for report in reports or ():
                line = self.board.take(report)
                if line is not None:
                    self.show.say(line)
        if monotonic() - self._looked_s >= LOOK_S:
            self._look()
        self.show.draw(self)

    def _lost(self, process: AgentProcess) -> None:
        """Take note of an agent that ended although nobody ended it."""
        self.show.say(f"{process.agent} has ended by itself: that is a bug")
        del self._agents[process.agent]
        self.board.killed(process.agent, monotonic())
        process.end()

    def _look(self) -> None:
        self._looked_s = monotonic()
        info = self.call("gpu_info")
        self.safe_mode = bool(self.call("health")["safe_mode"])
        usable = [gpu for gpu in info["gpus"] if gpu["state"] == "ok"]
        if usable:
            self.gpu = usable[0]
            promised = (self.gpu["memory_leased_mb"] or 0) + (self.gpu["memory_draining_mb"] or 0)
            self.promised_mb = max(self.promised_mb, promised)
            self.looks += 1

    def _free_mb(self) -> int:
        outside = self.gpu.get("memory_unleased_mb") or 0
        free = self.gpu.get("memory_free_mb")
        known = self.capacity_mb - outside
        return min(known, free) if isinstance(free, int) else known

    def _start_daemon(self) -> None:
        self._daemon = DaemonProcess(self._folder, simulated=self.simulated)
        end_s = monotonic() + START_S
        while monotonic() < end_s and not self._daemon.ended:
            try:
                self._client = libclient.connect(str(self._daemon.socket))
                if self._client.call("ready")["ready"]:
                    self._look()
                    return
                self._client.close()
            except libclient.Unavailable:
                # Not there yet.
                pass
            self.show.draw(self)
            select.select([], [], [], TICK_S)
        raise CannotStart(f"the daemon does not get ready\n{self._last_words()}")

    def _stop_daemon(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._daemon is not None:
            self.daemon_code = self._daemon.stop()
            self._daemon = None

    def _last_words(self) -> str:
        return "" if self._daemon is None else self._daemon.last_words()

    def describe(self) -> str:
        """Return which card this runs on."""
        amount = format_memory(self.capacity_mb)
        if self.simulated:
            return f"one simulated card of {amount}"
        scaled = f", limits scaled by {self.scale:.2g}" if abs(self.scale - 1) > 0.05 else ""
        return f"{self.gpu['name']}, {amount}{scaled}"


def _short_folder() -> str | None:
    """Return a folder whose name leaves room for a socket's path."""
    usual = tempfile.gettempdir()
    return usual if len(usual.encode()) < SOCKET_PATH_BYTES - 40 else "/tmp"
