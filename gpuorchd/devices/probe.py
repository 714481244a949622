"""The probe: a child process that reads the GPUs through NVML, one question at a time.

A driver call can hang for good, in the kernel, where no signal arrives; so it happens in a process
that the daemon can leave behind. This is the one place that imports pynvml, and it imports little
else: it starts quickly and is small. It inherits one socket, as its standard input, and stderr.

It ends when that socket does, and with the daemon however the daemon ends (`PR_SET_PDEATHSIG`): the
driver is never held by a probe that nobody asks. Ctrl-C and a service manager's SIGTERM are the
daemon's business; the probe ignores them.

Run as `python -m gpuorchd.devices.probe PARENT_PID`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys

from gpuorchd.devices.driver import Driver, InitFailed
from gpuorchd.devices.probe_wire import HEADER, REQUEST_MAX_BYTES, frame

PR_SET_PDEATHSIG = 1
EXIT_ORPHANED = 3
EXIT_NO_PRCTL = 4


def main(argv: list[str]) -> int:
    """Answer questions on standard input, which is a socket, until it ends."""
    follow_parent(int(argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=0) as pipe:
        serve(pipe)
    return 0


def follow_parent(parent_pid: int) -> None:
    """Die with the parent; end at once where it is already gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(EXIT_NO_PRCTL)
    # It may have died before the line above.
    if os.getppid() != parent_pid:
        sys.exit(EXIT_ORPHANED)


def serve(pipe: socket.socket) -> None:
    """Answer until the end of input."""
    driver: Driver | None = None
    while True:
        request = _receive(pipe)
        if request is None:
            return
        if driver is None:
            try:
                # With the first question, so that its time counts against the first deadline.
                import pynvml
            except ImportError as error:
                _send(pipe, {"n": request["n"], "calls": (), "init_error": str(error)})
                continue
            driver = Driver(pynvml)
        answer: dict[str, object] = {"n": request["n"]}
        try:
            driver.start()
            answer["devices"] = driver.sample(bool(request["telemetry"]))
        except InitFailed as error:
            answer["init_error"] = str(error)
        answer["calls"] = driver.calls
        _send(pipe, answer)
        driver.calls = []


def _send(pipe: socket.socket, answer: dict[str, object]) -> None:
    pipe.sendall(frame(json.dumps(answer, allow_nan=False).encode()))


def _receive(pipe: socket.socket) -> dict[str, object] | None:
    header = _read_exactly(pipe, HEADER.size)
    if header is None:
        return None
    (size,) = HEADER.unpack(header)
    if size > REQUEST_MAX_BYTES:
        raise ValueError(f"a request of {size} bytes; at most {REQUEST_MAX_BYTES}")
    payload = _read_exactly(pipe, size)
    if payload is None:
        return None
    request = json.loads(payload)
    if not isinstance(request, dict):
        raise TypeError("a request that is not a map")
    return request


def _read_exactly(pipe: socket.socket, size: int) -> bytes | None:
    gathered = b""
    while len(gathered) < size:
        part = pipe.recv(size - len(gathered))
        if not part:
            return None
        gathered += part
    return gathered


if __name__ == "__main__":
    sys.exit(main(sys.argv))
