"""Workers as the tests hold them: started, told what to do, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.daemon_process import ROOT

ANSWER_S = 60.0


class WorkerProcess:
    """A `tests.gpu.worker` process. `kill` it in the end."""

    def __init__(self, socket: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.worker", os.fspath(socket)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, do: str, **fields: object) -> None:
        """Give a command and do not wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the oldest unanswered command."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the worker ended instead of answering"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, do: str, **fields: object) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.tell(do, **fields)
        return self.answer()

    def kill(self) -> float:
        """Kill it the hard way; return when."""
        killed = time.time()
        self._process.send_signal(signal.SIGKILL)
        return killed

    def end(self) -> None:
        """Kill it if it lives, and reap it."""
        self._process.kill()
        self._process.wait(ANSWER_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    # It was killed with a command unread.
                    pass
