"""Whether CUDA MPS is there: what its own files and /proc say, no driver asked.

The pipe directory lies where anybody may write, so a directory proves nothing, and what is in it is
read without trust: a control process counts when the pid file names a living process of that name.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from typing import NamedTuple

from gpuorchd.devices.proc_facts import read_stat

DEFAULT_PIPE_DIR = "/tmp/nvidia-mps"
PID_FILE = "nvidia-cuda-mps-control.pid"
PID_FILE_MAX_BYTES = 32
# The kernel keeps 15 characters of "nvidia-cuda-mps-control".
CONTROL_COMM = "nvidia-cuda-mps"
# People ask through `gpu_info`, as often as they like; a second old is fresh enough for them.
MAX_AGE_NS = 1_000_000_000


class MpsStatus(NamedTuple):
    """What was seen. `enabled`: configured and its control process lives."""

    enabled: bool
    pipe_dir: str
    control_process: bool


class MpsWatch:
    """Look for the MPS control process, at most once a second."""

    def __init__(
        self,
        wanted: bool,
        pipe_dir: str = DEFAULT_PIPE_DIR,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wanted = wanted
        self._clock = clock
        self._seen = MpsStatus(False, pipe_dir, False)
        self._seen_ns: int | None = None

    def look(self) -> MpsStatus:
        """Say whether MPS runs. Where it is not wanted nothing is looked at."""
        now_ns = self._clock()
        if self._wanted and (self._seen_ns is None or now_ns - self._seen_ns > MAX_AGE_NS):
            self._seen_ns = now_ns
            running = control_process(self._seen.pipe_dir) is not None
            self._seen = MpsStatus(running, self._seen.pipe_dir, running)
        return self._seen


def control_process(pipe_dir: str) -> int | None:
    """Give the pid of the MPS control process that serves this directory, None where none does."""
    try:
        # Not followed and not waited for: somebody may have put a link or a pipe there.
        fd = os.open(
            os.path.join(pipe_dir, PID_FILE),
            os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
        )
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        text = os.read(fd, PID_FILE_MAX_BYTES).strip()
    except OSError:
        return None
    finally:
        os.close(fd)
    if not text.isdigit():
        return None
    pid = int(text)
    facts = read_stat(pid)
    # A zombie keeps its name and serves nobody.
    if facts is None or facts.state in ("Z", "X") or not facts.comm.startswith(CONTROL_COMM):
        return None
    return pid
