"""A real daemon in a process of its own, for tests that look at it from outside.

`DaemonProcess` starts `python -m gpuorchd` with a private socket and state folder, waits until it
answers, and ends it by its handle. It speaks text mode by itself, so that a test of the daemon does
not lean on the client library. A daemon that says something on its error output that a test did not
ask for is to be seen there: the output is kept in a file and shown when waiting fails.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Generous: the machine may be busy with other tests. A daemon alone takes well under a second.
START_DEADLINE_S = 30.0
ANSWER_DEADLINE_S = 20.0

ROOT = Path(__file__).parent.parent.parent


class LineClient:
    """One text-mode connection: requests out, replies and events in, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_DEADLINE_S)
        try:
            self._socket.connect(os.fspath(path))
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []

    def send(self, op: str, **fields: object) -> None:
        """Send one request and do not wait."""
        self._socket.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")

    def send_until_full(self, op: str) -> None:
        """Send requests and read no answer, until the daemon takes no more of them."""
        line = json.dumps({"op": op}).encode() + b"\n"
        self._socket.settimeout(0.5)
        try:
            for _ in range(100_000):
                self._socket.sendall(line)
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self._socket.settimeout(ANSWER_DEADLINE_S)

    def receive(self) -> dict[str, Any] | None:
        """Return the next message of any kind, None at the end."""
        line = self._lines.readline()
        return json.loads(line) if line else None

    def reply(self) -> dict[str, Any]:
        """Return the next reply; events that come before it are kept in `events`."""
        while True:
            message = self.receive()
            assert message is not None, "the daemon closed the connection instead of answering"
            if "event" not in message:
                return message
            self.events.append(message)

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        """Send one request and return its reply."""
        self.send(op, **fields)
        return self.reply()

    def event(self, name: str) -> dict[str, Any]:
        """Return the next event of this name; others that come before it are kept in `events`."""
        while True:
            message = self.receive()
            assert message is not None, f"the daemon closed the connection before {name}"
            if message.get("event") == name:
                return message
            self.events.append(message)

    def rest(self) -> list[dict[str, Any]]:
        """Return everything that still comes until the daemon closes."""
        return list(iter(self.receive, None))

    def close(self) -> None:
        """End the connection, and with it every lease on it."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class DaemonProcess:
    """A daemon that was started and is to be ended with `end`.

    `program` is what Python is given to run: the module, or a script that breaks something first.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        environ: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "gpuorchd"),
    ) -> None:
        self.folder = folder
        self.socket = folder / "s"
        self.state = folder / "state"
        self.log = folder / "daemon.log"
        command = [sys.executable, *program, "--socket", str(self.socket)]
        command += ["--state-dir", str(self.state), *flags]
        # Nothing of the environment of the test run may configure the daemon.
        own = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(folder),
            "GPUORCH_LOG_FORMAT": "json",
            "GPU_ORCHESTRATOR_PORT": "0",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**own, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        """The daemon's pid."""
        return self.process.pid

    def wait_until_it_answers(self) -> dict[str, Any]:
        """Return the first answer to `health`; fail with the daemon's output where none comes."""
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            code = self.process.poll()
            assert code is None, f"it ended with {code}:\n{self.output()}"
            try:
                with LineClient(self.socket) as client:
                    return client.ask("health")
            except (FileNotFoundError, ConnectionRefusedError):
                # Not there yet: look again soon, or when the process ends.
                self._wait_for_end(0.01)
        raise AssertionError(f"it does not answer within {START_DEADLINE_S} s:\n{self.output()}")

    def client(self) -> LineClient:
        """Open a text-mode connection."""
        return LineClient(self.socket)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon alone."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = ANSWER_DEADLINE_S) -> int:
        """Wait for the daemon's end and return its exit code (negative: the signal)."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """Ask for a clean stop and return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def end(self) -> None:
        """End it in whatever state it is. For finalizers: does nothing where it has ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(ANSWER_DEADLINE_S)

    def output(self) -> str:
        """Everything that it has written so far."""
        return self.log.read_text(errors="replace")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        lines = []
        for line in self.output().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("event") == event:
                lines.append(entry)
        return lines

    def wait_for_log(self, event: str) -> dict[str, Any]:
        """Return the first log line of an event, waiting until it is there."""
        wait_until(lambda: bool(self.logged(event)), f"{event} in the log")
        return self.logged(event)[0]

    def _wait_for_end(self, timeout_s: float) -> None:
        fd = os.pidfd_open(self.pid)
        try:
            select.select([fd], [], [], timeout_s)
        finally:
            os.close(fd)


def wait_until(
    condition: Callable[[], bool], what: str, deadline_s: float = ANSWER_DEADLINE_S
) -> None:
    """Wait for a condition that no descriptor announces; fail naming it after the deadline."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s} s: {what}"
        time.sleep(0.01)


@contextmanager
def running_daemon(
    folder: Path, *flags: str, environ: Mapping[str, str] | None = None
) -> Iterator[DaemonProcess]:
    """Run a daemon that answers, and end it whatever happens."""
    daemon = DaemonProcess(folder, *flags, environ=environ)
    try:
        daemon.wait_until_it_answers()
        yield daemon
    finally:
        daemon.end()
