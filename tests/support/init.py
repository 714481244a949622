"""A service manager that keeps descriptors, as far as the daemon notices: for tests without one.

It passes a listening socket and what it keeps, takes what it is told, and starts the daemon again
whenever it is asked to. Like the real one it drops connections that have hung up, and what is over
its bound in silence. `deaf` makes it read nothing, as one that is very busy.
"""

from __future__ import annotations

import array
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from gpuorchd.host.inherited import LISTENER_NAME
from tests.support.daemon_process import ANSWER_DEADLINE_S, ROOT, LineClient

FDS_START = 3


class Init:
    """Owns the sockets, the store and the daemon's process; `close` ends all of them."""

    def __init__(
        self, folder: Path, *flags: str, bound: int = 100, environ: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.socket = folder / "s"
        self.log = folder / "daemon.log"
        # On a memory file system, as /run is.
        self.runtime = Path(tempfile.mkdtemp(prefix="gpuorchd-", dir="/dev/shm"))
        self.bound = bound
        self.flags = flags
        self.environ = dict(environ or {})
        self.deaf = False
        # What the daemon said last, by assignment.
        self.said: dict[str, str] = {}
        self.store: dict[str, list[int]] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(self.socket))
        self._listener.listen(4_096)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(os.fspath(folder / "n"))
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="manager", daemon=True)
        self._thread.start()
        self.process: subprocess.Popen[bytes] | None = None

    # The daemon.

    def start(self) -> None:
        """Start the daemon with the listener and all that is kept."""
        with self._lock:
            self._drop_dead()
            kept = [(name, fd) for name, fds in self.store.items() for fd in fds]
        passed = [(LISTENER_NAME, self._listener.fileno()), *kept]
        names = ":".join(name for name, _ in passed)
        fds = [fd for _, fd in passed]
        own = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self.folder),
            "GPUORCH_LOG_FORMAT": "json",
            "GPU_ORCHESTRATOR_PORT": "0",
            "GPUORCH_DESCRIPTOR_STORE": str(self.bound),
            "RUNTIME_DIRECTORY": str(self.runtime),
            "NOTIFY_SOCKET": str(self.folder / "n"),
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": names,
            **self.environ,
        }
        # The shell's pid is the daemon's: it becomes it.
        command = ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", sys.executable, "-m", "gpuorchd"]
        command += ["--state-dir", str(self.folder / "state"), *self.flags]

        def place() -> None:
            high = [os.dup2(fd, 500 + i, inheritable=False) for i, fd in enumerate(fds)]
            for place, fd in enumerate(high, FDS_START):
                os.dup2(fd, place)

        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=False,
                preexec_fn=place,
            )

    def kill(self) -> None:
        """End the daemon as a crash does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(ANSWER_DEADLINE_S)

    def stop(self) -> int:
        """Ask the daemon to end; return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ANSWER_DEADLINE_S)

    def restart(self) -> None:
        """Kill the daemon and start the next one."""
        self.kill()
        self.start()

    def empty(self) -> None:
        """Forget every connection that is kept."""
        with self._lock:
            for fds in self.store.values():
                for fd in fds:
                    os.close(fd)
            self.store.clear()

    def client(self) -> LineClient:
        """Open a text-mode connection; the kernel keeps it waiting until a daemon is there."""
        return LineClient(self.socket)

    @property
    def kept(self) -> int:
        """How many connections are kept."""
        with self._lock:
            return sum(len(fds) for fds in self.store.values())

    def wait_until_kept(self, count: int) -> None:
        """Wait until so many connections are kept."""
        deadline = time.monotonic() + ANSWER_DEADLINE_S
        while self.kept != count:
            assert time.monotonic() < deadline, f"{self.kept} connections are kept, not {count}"
            time.sleep(0.005)

    def output(self) -> str:
        """Give all that the daemons have written."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """End the daemon and give everything back."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(ANSWER_DEADLINE_S)
        self._ending.set()
        self._thread.join()
        self.empty()
        self._listener.close()
        self._notify.close()
        shutil.rmtree(self.runtime)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # The manager's own thread.

    def _serve(self) -> None:
        while not self._ending.is_set():
            if self.deaf:
                self._ending.wait(0.02)
                continue
            if select.select([self._notify], [], [], 0.05)[0]:
                self._take()

    def _take(self) -> None:
        text, ancillary, _, _ = self._notify.recvmsg(4_096, socket.CMSG_SPACE(4 * 64))
        fds = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        said = dict(line.partition("=")[::2] for line in text.decode().splitlines())
        with self._lock:
            self._drop_dead()
            self.said.update(said)
            if said.get("FDSTORE") == "1" and self._count() + len(fds) <= self.bound:
                self.store.setdefault(said["FDNAME"], []).extend(fds)
                return
            if said.get("FDSTOREREMOVE") == "1":
                for fd in self.store.pop(said["FDNAME"], []):
                    os.close(fd)
        # A barrier's end, or what was too much: closed in silence.
        for fd in fds:
            os.close(fd)

    def _count(self) -> int:
        return sum(len(fds) for fds in self.store.values())

    def _drop_dead(self) -> None:
        for name, fds in tuple(self.store.items()):
            for fd in tuple(fds):
                poll = select.poll()
                poll.register(fd, 0)
                if poll.poll(0):
                    os.close(fd)
                    fds.remove(fd)
            if not fds:
                del self.store[name]
