"""A daemon on the real cards, and workers on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gpu.workers import WorkerProcess
from tests.support.daemon_process import DaemonProcess, running_daemon, wait_until

# What the daemon needs of the environment to find the driver's library and its own packages.
PASSED_ON = ("LD_LIBRARY_PATH", "PYTHONPATH")


def driver_environ() -> dict[str, str]:
    """Return the part of the environment that a daemon on real cards needs."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def wait_until_ready(daemon: DaemonProcess) -> None:
    """Wait for the first probe of the cards."""
    with daemon.client() as client:
        wait_until(lambda: bool(client.ask("ready")["ready"]), "the cards are probed", 60.0)
        wait_until(
            lambda: client.ask("gpu_info")["gpus"][0]["memory_free_mb"] is not None,
            "the first reading",
        )


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Run a daemon that has read the real cards."""
    with running_daemon(tmp_path, environ=driver_environ()) as running:
        wait_until_ready(running)
        yield running


@pytest.fixture
def worker(daemon: DaemonProcess) -> Iterator[Callable[[], WorkerProcess]]:
    """Start workers; all are ended with the test."""
    started: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        started.append(WorkerProcess(daemon.socket))
        return started[-1]

    yield start
    for process in started:
        process.end()
