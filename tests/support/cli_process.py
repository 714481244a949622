"""The command `gpuorch` as a process of its own, as its users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.daemon_process import ANSWER_DEADLINE_S, ROOT

COMMAND = (sys.executable, "-W", "error", "-m", "libclient.cli")


def cli_environ(socket: Path, **changes: str) -> dict[str, str]:
    """The environment of a command: nothing of the test run's own but where things are."""
    return {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": str(ROOT),
        "LANG": "C.UTF-8",
        "GPUORCH_SOCKET": str(socket),
        **changes,
    }


def gpuorch(
    socket: Path, *words: str, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *words],
        env=cli_environ(socket, **(environ or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ANSWER_DEADLINE_S,
        check=False,
    )


def gpuorch_json(socket: Path, *words: str, code: int = 0) -> Any:
    """Run a command with `--json` and return its document."""
    done = gpuorch(socket, *words, "--json")
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    return json.loads(done.stdout)


def start_gpuorch(socket: Path, *words: str, **settings: Any) -> subprocess.Popen[bytes]:
    """Start a command. Whoever starts it ends it."""
    settings.setdefault("stdin", subprocess.DEVNULL)
    settings.setdefault("stdout", subprocess.PIPE)
    settings.setdefault("stderr", subprocess.PIPE)
    environ = settings.pop("environ", {})
    return subprocess.Popen([*COMMAND, *words], env=cli_environ(socket, **environ), **settings)
