"""Many clients at once, each a process: `python -m tests.support.crowd SOCKET COUNT MEMORY_MB`.

All connect, then all ask at the same moment, hold for a moment of their own and give back; every
fifth is killed while it holds. Each prints one line of JSON: the reply, when it was there, and when
the lease was let go of, on the monotonic clock that all processes of a host share.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.support.daemon_process import LineClient

WAIT_S = 20
# How long holders hold, in turn: some shorter and some longer than a simulated card drains.
HOLD_S = (0.0, 0.01, 0.03, 0.15)
KILLED_EVERY = 5


def main() -> None:
    """Start all, let them go at once, and wait for them."""
    path, count, memory_mb = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    start_fd, started_fd = os.pipe()
    ready_fd, tell_ready_fd = os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(started_fd)
            try:
                _live(path, number, memory_mb, start_fd, tell_ready_fd)
            finally:
                os._exit(1)
        pids.append(pid)
    os.close(start_fd)
    os.close(tell_ready_fd)
    ready = 0
    while ready < count:
        said = os.read(ready_fd, count)
        if not said:
            break
        ready += len(said)
    # The end of this pipe is what all of them wait for.
    os.close(started_fd)
    for pid in pids:
        os.waitpid(pid, 0)


def _live(path: Path, number: int, memory_mb: int, start_fd: int, ready_fd: int) -> None:
    with LineClient(path) as client:
        os.write(ready_fd, b".")
        os.close(ready_fd)
        os.read(start_fd, 1)
        reply = client.ask("lease", agent="crowd", min_memory_mb=memory_mb, wait_s=WAIT_S)
        granted_s = time.monotonic()
        time.sleep(HOLD_S[number % len(HOLD_S)])
        line = {"reply": reply, "granted_s": granted_s, "let_go_s": time.monotonic()}
        # One write to a file that all share: lines of many processes do not mix.
        os.write(1, json.dumps(line).encode() + b"\n")
        if number % KILLED_EVERY == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        released = client.ask("release", token=reply["token"])
        os._exit(0 if released["ok"] else 1)


if __name__ == "__main__":
    main()
