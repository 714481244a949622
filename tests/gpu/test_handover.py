"""A killed holder's memory goes to the next one, and never before it is free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.gpu.conftest import driver_environ, wait_until_ready
from tests.gpu.workers import WorkerProcess
from tests.support.daemon_process import ROOT, DaemonProcess, LineClient, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(420)]

ROUNDS = 50
# Of the card; the rest is for the driver and for contexts.
SHARE = 0.9
# A CUDA context and the driver's rounding, with room to spare: measured 618 MiB on an H100.
CONTEXT_MB = 1_500
WAIT_S = 60


def share_of_card(daemon: DaemonProcess) -> int:
    with daemon.client() as client:
        return int(client.ask("gpu_info")["gpus"][0]["memory_total_mb"] * SHARE)


def hand_over(
    start: Callable[[], WorkerProcess], memory_mb: int, rounds: int, events: LineClient | None
) -> list[dict[str, Any]]:
    """Kill the holder `rounds` times; return what became of each waiter."""
    take_mb = memory_mb - CONTEXT_MB
    told: list[dict[str, Any]] = []
    holder, spare = start(), start()
    first = holder.do("lease_and_take", memory_mb=memory_mb, wait_s=WAIT_S, take_mb=take_mb)
    assert first["granted"]
    assert not first["out_of_memory"]
    for _ in range(rounds):
        waiter, spare = spare, start()
        # Its context is there already, so that it can allocate in the moment of its grant.
        waiter.do("start_cuda")
        waiter.tell("lease_and_take", memory_mb=memory_mb, wait_s=WAIT_S, take_mb=take_mb)
        if events is not None:
            events.event("lease.queued")
        killed = holder.kill()
        answer = waiter.answer()
        row = {"killed": killed, **answer}
        if events is not None:
            for name in ("lease.released", "lease.drained", "lease.granted"):
                row[name] = events.event(name)["time"]
        told.append(row)
        holder.end()
        holder = waiter
        if row.get("out_of_memory") and events is None:
            break
    return told


def report(rows: list[dict[str, Any]], memory_mb: int) -> None:
    """Print the measured way from kill to grant, and keep it where $OUT names a folder."""
    figures = {}
    for name in ("lease.released", "lease.drained", "lease.granted"):
        times = sorted((row[name] - row["killed"]) * 1000 for row in rows)
        figures[name] = {"median_ms": median(times), "worst_ms": times[-1]}
    print(f"\n{len(rows)} hand-overs of {memory_mb} MiB, from the kill:")
    for name, figure in figures.items():
        print(f"  {name}: median {figure['median_ms']:.1f} ms, worst {figure['worst_ms']:.1f} ms")
    folder = os.environ.get("OUT")
    if folder:
        Path(folder, "handover.json").write_text(json.dumps(figures, indent=1))


def test_ninety_percent_of_the_card_goes_from_hand_to_hand_without_running_out(
    daemon: DaemonProcess, worker: Callable[[], WorkerProcess]
) -> None:
    memory_mb = share_of_card(daemon)
    with daemon.client() as events:
        events.ask("subscribe", topics=["lease.*"])
        rows = hand_over(worker, memory_mb, ROUNDS, events)
    report(rows, memory_mb)
    assert [row["granted"] for row in rows] == [True] * ROUNDS
    assert [row["out_of_memory"] for row in rows] == [False] * ROUNDS


def test_without_draining_the_same_hand_over_runs_out(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    daemon = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.gpu.undrained_daemon", "--socket", str(socket)),
            *("--state-dir", str(tmp_path / "state"), "--http-port", "0"),
        ],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **driver_environ()},
    )
    started: list[WorkerProcess] = []

    def start() -> WorkerProcess:
        started.append(WorkerProcess(socket))
        return started[-1]

    try:
        undrained = DaemonProcess.__new__(DaemonProcess)
        undrained.socket = socket
        wait_until(socket.exists, "the socket is there")
        wait_until_ready(undrained)
        rows = hand_over(start, share_of_card(undrained), 10, None)
    finally:
        for process in started:
            process.end()
        daemon.kill()
        daemon.wait(30)
    assert any(row.get("out_of_memory") for row in rows), "this test could not fail"
