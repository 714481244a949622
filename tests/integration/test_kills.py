"""A daemon that is killed again and again with clients at work: no lease lost, none granted twice.

The service manager is a stand-in (tests/support/init.py), so that this runs where no real one can
be had; tests/systemd/test_survival.py does the same with systemd. `GPUORCH_TEST_KILLS` and
`GPUORCH_TEST_SEED` choose more kills and other moments.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import libclient
from tests.support.daemon_process import wait_until
from tests.support.init import Init

KILLS = int(os.environ.get("GPUORCH_TEST_KILLS", "60"))
SEED = int(os.environ.get("GPUORCH_TEST_SEED", "5"))
PATIENCE_S = 60.0
CARDS = ("--simulate", "2x100000")
HOLDERS, ASKERS, WAITERS = 16, 4, 5
# Of the second card: how many of the askers' leases fit at once.
ASKER_MB, ASKERS_AT_ONCE = 40_000, 2
# Of the first card: what is in the waiters' way, and one of theirs.
BEFORE_MB, WAITER_MB = 80_000, 70_000


class Asking:
    """Threads that ask for leases and release them until they are told to end."""

    def __init__(self, path: str) -> None:
        self.counts = [0] * ASKERS
        self.bad: list[str] = []
        self._path = path
        self._held = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(at,)) for at in range(ASKERS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Let each finish what it does."""
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _ask(self, at: int) -> None:
        with libclient.connect(self._path) as client:
            while not self._over.is_set():
                lease = client.lease("asks", ASKER_MB, wait_s=PATIENCE_S, devices=[1])
                if not lease.live:
                    self.bad.append(f"not granted: {lease.reason} {lease.detail}")
                    return
                self._count(1)
                client.call("health", timeout_s=PATIENCE_S)
                self._count(-1)
                lease.release()
                self.counts[at] += 1

    def _count(self, change: int) -> None:
        with self._lock:
            self._held += change
            if self._held > ASKERS_AT_ONCE:
                self.bad.append(f"{self._held} leases are held at once, {ASKERS_AT_ONCE} fit")


class Waiting:
    """Threads that wait in line for the first card, and note when they got it."""

    def __init__(self, path: str) -> None:
        self.order: list[int] = []
        self.bad: list[str] = []
        self._path = path
        self._threads: list[threading.Thread] = []
        for number in range(WAITERS):
            queued = threading.Event()
            thread = threading.Thread(target=self._wait, args=(number, queued.set))
            thread.start()
            self._threads.append(thread)
            assert queued.wait(PATIENCE_S), f"{number} does not come to wait"

    def join(self) -> None:
        """Wait until all were served."""
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _wait(self, number: int, queued: Callable[[], None]) -> None:
        lease = libclient.lease(
            "waits", WAITER_MB, wait_s=3_600, devices=[0], socket=self._path,
            on_event=lambda event: queued() if event["event"] == "lease.queued" else None,
        )  # fmt: skip
        if not lease.live:
            self.bad.append(f"{number}: {lease.reason} {lease.detail}")
            return
        self.order.append(number)
        lease.release()


def kill_often(manager: Init) -> None:
    """Kill at once, in the middle of the start, and at work."""
    chance = random.Random(SEED)
    for _ in range(KILLS):
        manager.restart()
        time.sleep(chance.choice((0.0, chance.random() * 0.05, chance.random() * 0.4)))


@pytest.mark.slow
def test_nothing_is_lost_or_granted_twice_however_often_it_is_killed(tmp_path: Path) -> None:
    with Init(tmp_path, *CARDS) as manager:
        path = str(manager.socket)
        held = [
            libclient.lease("holds", 1_000, devices=[0], socket=path, wait_s=PATIENCE_S)
            for _ in range(HOLDERS)
        ]
        before = libclient.lease("before", BEFORE_MB, devices=[0], socket=path)
        held.append(before)
        tokens = [lease.token for lease in held]
        asking, waiting = Asking(path), Waiting(path)
        try:
            kill_often(manager)
        finally:
            asking.end()
        assert asking.bad == []
        assert all(asking.counts)
        assert [lease.ended for lease in held] == [None] * len(held)
        assert [lease.token for lease in held] == tokens
        with manager.client() as client:
            rows = client.ask("allocations")["allocations"]
        states = {row["lease_id"]: row["state"] for row in rows}
        assert len(states) == len(rows)
        assert {states.get(lease.lease_id) for lease in held} == {"active"}
        assert waiting.order == []
        before.release()
        waiting.join()
        assert (waiting.bad, waiting.order) == ([], list(range(WAITERS)))
        for lease in held:
            lease.release()

        def all_free() -> bool:
            with manager.client() as client:
                return not client.ask("allocations")["allocations"]

        wait_until(all_free, "the end of all leases")
        assert "Traceback" not in manager.output()
        assert '"level":"error"' not in manager.output()
