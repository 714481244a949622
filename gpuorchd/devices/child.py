"""One probe child as the daemon holds it: spawn, ask, hear the answer, kill, reap.

The daemon never waits for it. Its answers and its death are descriptors that become readable; a
question goes into a socket that is empty, because only one is ever out. A child that was killed may
yet stay, when it hangs in the kernel; it is then watched until it is gone and nothing of it is
used. Judging answers and deciding when to ask are `nvml`'s.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

from gpuorchd.devices.probe_wire import ANSWER_MAX_BYTES, HEADER, frame

PROBE_MODULE = "gpuorchd.devices.probe"
RECEIVE_BYTES = 262_144


class ChildOwner(Protocol):
    """Whom a child tells."""

    def answered(self, child: ProbeChild, payload: bytes) -> None:
        """A whole answer has come."""

    def broke(self, child: ProbeChild, reason: str) -> None:
        """The pipe ended or carries nonsense: no answer will come any more."""

    def died(self, child: ProbeChild) -> None:
        """The process is gone and reaped, and all of its descriptors are closed."""


class ProbeChild:
    """A running probe. `pid` is its process. Its descriptors are its own until `died` is told."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        owner: ChildOwner,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Spawn it. Call on the main thread: the child dies with the thread that made it.

        Raises OSError where no process can be started; nothing is left open then.
        """
        self._loop = loop
        self._owner = owner
        self._received = bytearray()
        self._reaped = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", PROBE_MODULE, str(os.getpid())],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    close_fds=True,
                    # A session of its own: the terminal's Ctrl-C is not for it.
                    start_new_session=True,
                    env=None if environment is None else dict(environment),
                )
            except OSError:
                ours.close()
                raise
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:
            # It has not touched the driver yet: it dies at once.
            ours.close()
            self._process.kill()
            self._process.wait()
            raise
        ours.setblocking(False)
        self._pipe: socket.socket | None = ours
        self.pid = self._process.pid
        loop.add_reader(ours.fileno(), self.receive)
        loop.add_reader(self._pidfd, self._reap)

    @property
    def alive(self) -> bool:
        """Whether its process is not reaped yet."""
        return not self._reaped

    def ask(self, number: int, telemetry: bool) -> bool:
        """Send a question; False where the child can take none, because it is ending."""
        if self._pipe is None:
            return False
        request = frame(json.dumps({"n": number, "telemetry": telemetry}).encode())
        try:
            return self._pipe.send(request) == len(request)
        except OSError:
            # It has died, or does not read: its end is told by the pipe itself or by the deadline.
            return False

    def receive(self) -> bool:
        """Take in what has come, and tell the owner of an answer or of the end.

        False where nothing had come.
        """
        if self._pipe is None:
            return False
        try:
            part = self._pipe.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._break(f"its pipe failed: {error}")
            return True
        if part:
            self._gather(part)
        else:
            self._break("its process ended")
        return True

    def kill(self) -> None:
        """Close the pipe and kill the process; `died` is told once it is gone, if ever it is."""
        self._close_pipe()
        if not self._reaped:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                # Reaped by somebody else; its pidfd tells as ever.
                pass

    def forget(self) -> None:
        """Stop watching a process that does not die. Nothing is told any more."""
        self._close_pipe()
        if not self._reaped:
            self._close_pidfd()
            # Whoever reaps it is not us: init, when the daemon has ended.
            self._process.returncode = -signal.SIGKILL

    def _gather(self, part: bytes) -> None:
        received = self._received
        received += part
        if len(received) < HEADER.size:
            return
        (size,) = HEADER.unpack_from(received)
        if size > ANSWER_MAX_BYTES or len(received) > HEADER.size + size:
            self._break(f"it sent {len(received)} bytes for an answer of {size}")
        elif len(received) == HEADER.size + size:
            payload = bytes(received[HEADER.size :])
            received.clear()
            self._owner.answered(self, payload)

    def _break(self, reason: str) -> None:
        self._close_pipe()
        self._owner.broke(self, reason)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
            self._pipe = None

    def _reap(self) -> None:
        # The pidfd is readable: this does not wait.
        if self._process.poll() is None:
            return
        self._close_pidfd()
        # What it had said before it died is still in the pipe, and so is the end.
        while self.receive():
            pass
        self._owner.died(self)

    def _close_pidfd(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._reaped = True


Spawn = Callable[[asyncio.AbstractEventLoop, ChildOwner, Mapping[str, str] | None], ProbeChild]
