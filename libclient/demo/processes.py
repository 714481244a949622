"""The processes of the demo: the daemon and the agents. Started here, and ended here.

Each gets a session of its own, so that Ctrl-C reaches the demo alone, and dies with it whatever
happens. Nothing of the environment configures them but what is set here.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from libclient.demo.roster import CARD_MB

PREFIXES = ("GPUORCH_", "GPU_ORCHESTRATOR_", "LISTEN_", "CUDA_MPS_")
VARIABLES = {"SAFE_MODE", "ENABLE_NVML", "ENABLE_MPS", "STATE_DIRECTORY", "NOTIFY_SOCKET"}
DRIVER_FILE = Path("/dev/nvidiactl")
# The daemon promises to be gone 5 s after SIGTERM where it hands nothing over.
STOP_S = 6.0
_PR_SET_PDEATHSIG = 1

Report = dict[str, Any]


def has_driver() -> bool:
    """Whether this host has NVIDIA's driver."""
    return DRIVER_FILE.exists()


def _environment(socket: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(PREFIXES) and name not in VARIABLES
    }
    return {**kept, "GPUORCH_SOCKET": str(socket)}


def _die_with_us() -> Callable[[], None]:
    """Return what a child does before it becomes its program: ask to be ended with its parent."""
    # Found before the fork: after it, only the call itself is left to do.
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask


class DaemonProcess:
    """A daemon on a private socket in a folder of its own."""

    def __init__(self, folder: Path, *, simulated: bool) -> None:
        self.socket = folder / "s"
        self.log = folder / "daemon.log"
        command = [sys.executable, "-m", "gpuorchd", "--socket", str(self.socket)]
        command += ["--state-dir", str(folder / "state"), "--http-port", "0"]
        command += ["--simulate", f"1x{CARD_MB}"] if simulated else []
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=_environment(self.socket),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_us(),  # safe: this process has one thread
            )

    @property
    def ended(self) -> bool:
        """Whether it is gone by itself."""
        return self._process.poll() is not None

    def stop(self) -> int:
        """End it and return its exit code: negative where it had to be killed."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def last_words(self) -> str:
        """Return the end of what it wrote."""
        return self.log.read_text(errors="replace")[-2_000:]


class AgentProcess:
    """One agent's process, and what it says."""

    def __init__(self, agent: str, flags: list[str], socket: Path) -> None:
        self.agent = agent
        self.started_s = monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "libclient.demo.agent", agent, *flags],
            env=_environment(socket),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_us(),  # safe: this process has one thread
        )
        assert self._process.stdout is not None
        self._output: BinaryIO = self._process.stdout  # type: ignore[assignment]  # a pipe of bytes
        os.set_blocking(self._output.fileno(), False)
        self._partial = b""

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._process.pid

    def fileno(self) -> int:
        """Return the descriptor on which it reports."""
        return self._output.fileno()

    def reports(self) -> list[Report] | None:
        """Return what it reported since; None once it has ended."""
        try:
            data = os.read(self.fileno(), 65_536)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> None:
        """End it, whatever it does, and take its pipe away."""
        self._process.kill()
        self._process.wait()
        self._output.close()


def end_all(agents: Mapping[str, AgentProcess]) -> None:
    """End all agents: first ask each, then wait for each."""
    for process in agents.values():
        process.signal(signal.SIGTERM)
    for process in agents.values():
        process.end()
