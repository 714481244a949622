"""A stand-in for the service manager's part: it passes sockets to a daemon and hears what it says.

The sockets are made by the process that then becomes the daemon, since `LISTEN_PID` has to be its
pid. Real systemd is in tests/systemd; this is for what one daemon does with what it was given.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.support.daemon_process import ANSWER_DEADLINE_S, DaemonProcess

# Makes the sockets that $PASS names (`NAME=PATH` a Unix one, `NAME=PORT` an IPv4 one), passes them
# from descriptor 3 on, and becomes the daemon.
LAUNCHER = """
import os, socket, sys
made = []
for entry in filter(None, os.environ.pop("PASS").split(",")):
    name, place = entry.split("=")
    inet = place.isdigit()
    sock = socket.socket(socket.AF_INET if inet else socket.AF_UNIX)
    sock.bind(("127.0.0.1", int(place)) if inet else place)
    sock.listen(64)
    made.append((name, os.dup(sock.fileno()), sock))
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(made))
os.environ["LISTEN_FDNAMES"] = ":".join(name for name, _, _ in made)
high = [os.dup2(fd, 100 + place) for place, (_, fd, _) in enumerate(made)]
for place, fd in enumerate(high, 3):
    os.dup2(fd, place)
    os.close(fd)
os.execv(sys.executable, [sys.executable, "-m", "gpuorchd", *sys.argv[1:]])
"""


class Ear:
    """The socket on which a service manager hears. Close it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(ANSWER_DEADLINE_S)
        self._socket.bind(os.fspath(path))

    def hear(self) -> str:
        """Return the next message."""
        return self._socket.recv(10_000).decode()

    def hear_until(self, beginning: str) -> list[str]:
        """Return all messages up to the first that begins so."""
        heard = [self.hear()]
        while not heard[-1].startswith(beginning):
            heard.append(self.hear())
        return heard

    def wait_for_silence(self, time_s: float) -> None:
        """Wait until nothing has come for so long; fail where something always comes."""
        deadline = time.monotonic() + ANSWER_DEADLINE_S
        self._socket.settimeout(time_s)
        try:
            while time.monotonic() < deadline:
                self.hear()
            raise AssertionError("it goes on speaking")
        except TimeoutError:
            pass
        finally:
            self._socket.settimeout(ANSWER_DEADLINE_S)

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def passed_daemon(
    folder: Path,
    *flags: str,
    passed: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
    cards: str = "1x24576",
) -> Iterator[DaemonProcess]:
    """Run a daemon that was passed these sockets, by name; not waited for, ended at the end."""
    entries = ",".join(f"{name}={place}" for name, place in passed.items())
    daemon = DaemonProcess(
        folder,
        *(("--simulate", cards) if cards else ()),
        *flags,
        environ={"PASS": entries, **(environ or {})},
        program=("-c", LAUNCHER),
    )
    try:
        yield daemon
    finally:
        daemon.end()
