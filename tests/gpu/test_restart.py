"""Leases and their bytes outlive the daemon's own death, on a real card."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.conftest import driver_environ
from tests.gpu.workers import WorkerProcess
from tests.support.daemon_process import wait_until
from tests.support.init import Init

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(300)]

KILLS = 20
SEED = 5
SHARE = 0.6
# A CUDA context and the driver's rounding, with room to spare.
CONTEXT_MB = 1_500
WAIT_S = 120


def test_a_holder_keeps_its_bytes_through_kills_and_the_next_gets_them_when_they_are_back(
    tmp_path: Path,
) -> None:
    chance = random.Random(SEED)
    workers: list[WorkerProcess] = []
    with Init(tmp_path, environ=driver_environ()) as init:
        try:
            with init.client() as client:
                _until_read(lambda: client.ask("gpu_info"))
                memory_mb = int(client.ask("gpu_info")["gpus"][0]["memory_total_mb"] * SHARE)
            take_mb = memory_mb - CONTEXT_MB
            holder, waiter = (WorkerProcess(init.socket) for _ in range(2))
            workers += [holder, waiter]
            held = holder.do("lease_and_take", memory_mb=memory_mb, wait_s=0, take_mb=take_mb)
            assert held["granted"]
            assert not held["out_of_memory"]
            # Its context is there already, so that it can allocate in the moment of its grant.
            waiter.do("start_cuda")
            waiter.tell("lease_and_take", memory_mb=memory_mb, wait_s=WAIT_S, take_mb=take_mb)
            for _ in range(KILLS):
                time.sleep(chance.random() * 0.5)
                init.restart()
                with init.client() as client:
                    (row,) = client.ask("allocations")["allocations"]
                    assert (row["lease_id"], row["state"]) == (held["lease_id"], "active")
                    (place,) = client.ask("queue")["waiting"]
                    assert place["position"] == 1
            # The holder dies while nobody watches.
            init.kill()
            holder.kill()
            init.start()
            answer = waiter.answer()
            assert answer["granted"], answer
            assert not answer["out_of_memory"]
        finally:
            for worker in workers:
                worker.end()


def _until_read(ask: Callable[[], dict[str, list[dict[str, object]]]]) -> None:
    def is_read() -> bool:
        gpus = ask()["gpus"]
        return bool(gpus) and gpus[0]["memory_free_mb"] is not None

    wait_until(is_read, "the first reading", 60.0)
