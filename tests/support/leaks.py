"""What a test left behind: descriptors, threads, child processes, tasks.

A snapshot before and a comparison after. What ends by itself in a moment (a thread on its way out,
a child that is being reaped) is waited for with a deadline; what is still there is a leak.
"""

from __future__ import annotations

import asyncio
import asyncio.runners
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# What ends by itself does so within this; a leak costs its own test this much and no other.
SETTLE_S = 2.0
LOOK_AGAIN_S = 0.01

# Started once by the interpreter itself, for all spawned processes, and ended by it at exit.
INTERPRETERS_OWN = b"multiprocessing.resource_tracker"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What this process has open and running."""

    descriptors: frozenset[str]
    threads: frozenset[threading.Thread]
    children: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        """Look now."""
        return cls(_descriptors(), frozenset(threading.enumerate()), _children())

    def left_since(self, before: Snapshot) -> list[str]:
        """Name what is here and was not before, one line each."""
        fds = sorted(self.descriptors - before.descriptors)
        threads = [thread.name for thread in self.threads - before.threads]
        children = sorted(self.children - before.children)
        return [
            *(f"descriptor {entry}" for entry in fds),
            *(f"thread {name}" for name in sorted(threads)),
            *(f"child process {entry}" for entry in children),
        ]


def left_behind(before: Snapshot) -> list[str]:
    """Name what was left since `before`, once that which ends by itself has ended."""
    stop_client_thread()
    left = Snapshot.take().left_since(before)
    if not left:
        return []
    # A descriptor whose last owner sits in a reference cycle is closed by the collector, which
    # warns of it: the warning is then the failure, with the place where it was opened.
    gc.collect()
    deadline = time.monotonic() + SETTLE_S
    while left := Snapshot.take().left_since(before):
        if time.monotonic() > deadline:
            return left
        time.sleep(LOOK_AGAIN_S)
    return []


def stop_client_thread() -> None:
    """End the client library's one thread, which otherwise lives as long as its process."""
    keeper = sys.modules.get("libclient.keeper")
    if keeper is not None:
        keeper.KEEPER.stop()


def watch_tasks(report: Callable[[str], None]) -> Callable[[], None]:
    """Report every task that is still pending when its loop is closed; return how to stop.

    A runner cancels such tasks without a word, which is where a forgotten task hides. There is no
    public place between the end of a test's coroutine and that cancellation.
    """
    runners = asyncio.runners
    cancel_all = runners._cancel_all_tasks  # type: ignore[attr-defined]  # see above

    def cancel_and_report(loop: asyncio.AbstractEventLoop) -> None:
        for task in asyncio.all_tasks(loop):
            report(f"task {task.get_name()}: {task.get_coro()!r}")
        cancel_all(loop)

    runners._cancel_all_tasks = cancel_and_report  # type: ignore[attr-defined]  # see above

    def stop() -> None:
        runners._cancel_all_tasks = cancel_all  # type: ignore[attr-defined]  # see above

    return stop


def _descriptors() -> frozenset[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            # The one that listed the folder.
            continue
        found.add(f"{number} -> {target}")
    return frozenset(found)


def _children() -> frozenset[str]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except FileNotFoundError:
            # The thread has ended.
            continue
        for pid in pids:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if INTERPRETERS_OWN not in command:
                shown = command.replace(b"\0", b" ").decode(errors="replace").strip()
                found.add(f"{pid} ({shown[:120] or 'ended, not waited for'})")
    return frozenset(found)
