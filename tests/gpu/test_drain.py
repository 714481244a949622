"""What becomes of memory whose lease has ended, case by case, on the real card."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.workers import WorkerProcess
from tests.support.daemon_process import DaemonProcess, LineClient, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

Start = Callable[[], WorkerProcess]

BLOCK_MB = 20_000


def gpu(client: LineClient) -> dict[str, Any]:
    card: dict[str, Any] = client.ask("gpu_info")["gpus"][0]
    return card


def lease_of(client: LineClient, worker: WorkerProcess) -> dict[str, Any]:
    rows = client.ask("allocations")["allocations"]
    return next((row for row in rows if row["pid"] == worker.pid), {})


def wait_until_seen(client: LineClient, worker: WorkerProcess, used_mb: int) -> None:
    wait_until(
        lambda: (lease_of(client, worker).get("used_mb") or 0) >= used_mb,
        f"a reading shows {used_mb} MiB of the lease in use",
    )


def test_a_childs_memory_outlives_its_killed_parent_and_stays_kept(
    daemon: DaemonProcess, worker: Start
) -> None:
    parent, waiter = worker(), worker()
    with daemon.client() as client:
        client.ask("policy_set", changes={"drain_timeout_s": 60})
        free_mb = gpu(client)["memory_free_mb"]
        assert parent.do("lease", memory_mb=2 * BLOCK_MB)["granted"]
        child = parent.do("child_takes", memory_mb=BLOCK_MB)["child"]
        wait_until_seen(client, parent, BLOCK_MB)
        client.ask("subscribe", topics=["lease.*"])
        parent.kill()
        waiter.tell("lease", memory_mb=free_mb - BLOCK_MB // 2, wait_s=60)
        client.event("lease.draining")
        # The half that nobody used comes back; the child's half does not.
        wait_until(lambda: gpu(client)["memory_draining_mb"] < 2 * BLOCK_MB, "a part is back")
        assert gpu(client)["memory_draining_mb"] >= BLOCK_MB
        assert client.ask("queue")["waiting"], "the waiter was served with memory still in use"
        os.kill(child, signal.SIGKILL)
        assert waiter.answer()["granted"]
        client.event("lease.drained")


def test_an_orphans_memory_is_unleased_and_nobody_waits_for_it(
    daemon: DaemonProcess, worker: Start, tmp_path: Path
) -> None:
    parent, other = worker(), worker()
    go = tmp_path / "go"
    with daemon.client() as client:
        free_mb = gpu(client)["memory_free_mb"]
        orphan = parent.do("orphan_takes", memory_mb=BLOCK_MB, go=str(go))["orphan"]
        try:
            assert parent.do("lease", memory_mb=BLOCK_MB)["granted"]
            client.ask("subscribe", topics=["lease.*"])
            parent.kill()
            go.touch()
            client.event("lease.drained")
            wait_until(
                lambda: (gpu(client)["memory_unleased_mb"] or 0) >= BLOCK_MB,
                "the orphan's memory is seen outside leases",
            )
            assert gpu(client)["memory_draining_mb"] == 0
            whole = other.do("lease", memory_mb=free_mb - BLOCK_MB // 2)
            assert (whole["granted"], whole["note"]) == (False, "INSUFFICIENT_MEMORY")
            assert other.do("lease", memory_mb=free_mb - 2 * BLOCK_MB)["granted"]
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_a_living_process_keeps_its_residue_from_others_and_may_lease_it_again(
    daemon: DaemonProcess, worker: Start
) -> None:
    keeper, other = worker(), worker()
    with daemon.client() as client:
        card = gpu(client)
        most_mb = card["memory_free_mb"] - 1_000
        assert keeper.do("lease", memory_mb=most_mb)["granted"]
        assert not keeper.do("take", memory_mb=most_mb - 1_500)["out_of_memory"]
        wait_until_seen(client, keeper, most_mb - 1_500)
        keeper.do("release")
        denied = other.do("lease", memory_mb=BLOCK_MB)
        assert (denied["granted"], denied["note"]) == (False, "INSUFFICIENT_MEMORY")
        again = keeper.do("lease", memory_mb=most_mb - 1_000)
        assert again["granted"], again
        keeper.do("release")
        keeper.do("give_back")
        # What it freed is to be had, though it lives on with its context.
        assert other.do("lease", memory_mb=BLOCK_MB, wait_s=20)["granted"]


def test_residue_past_the_drain_time_is_reported_and_not_handed_out(
    daemon: DaemonProcess, worker: Start
) -> None:
    keeper, other = worker(), worker()
    with daemon.client() as client:
        client.ask("policy_set", changes={"drain_timeout_s": 1})
        most_mb = gpu(client)["memory_free_mb"] - 1_000
        assert keeper.do("lease", memory_mb=most_mb)["granted"]
        assert not keeper.do("take", memory_mb=most_mb - 1_500)["out_of_memory"]
        wait_until_seen(client, keeper, most_mb - 1_500)
        client.ask("subscribe", topics=["lease.*"])
        keeper.do("release")
        withheld = client.event("lease.withheld")
        assert withheld["memory_mb"] >= most_mb - 1_500
        assert withheld["pids"] == [keeper.pid]
        denied = other.do("lease", memory_mb=BLOCK_MB)
        assert (denied["granted"], denied["note"]) == (False, "INSUFFICIENT_MEMORY")
        assert gpu(client)["memory_unleased_mb"] >= most_mb - 1_500
        other.tell("lease", memory_mb=BLOCK_MB, wait_s=30)
        client.event("lease.queued")
        keeper.kill()
        assert other.answer()["granted"]


def test_a_process_outside_the_system_shrinks_what_can_be_had_and_is_not_counted_twice(
    daemon: DaemonProcess, worker: Start
) -> None:
    stray, other = worker(), worker()
    with daemon.client() as client:
        free_mb = gpu(client)["memory_free_mb"]
        assert not stray.do("take", memory_mb=BLOCK_MB)["out_of_memory"]
        wait_until(
            lambda: (gpu(client)["memory_unleased_mb"] or 0) >= BLOCK_MB, "the stray is seen"
        )
        assert not other.do("lease", memory_mb=free_mb - BLOCK_MB // 2)["granted"]
        # Once it leases what it has, the rest is still there for others.
        assert stray.do("lease", memory_mb=BLOCK_MB + 1_500)["granted"]
        assert other.do("lease", memory_mb=free_mb - BLOCK_MB - 3_000)["granted"]


def test_exclusive_takes_the_whole_card_and_nobody_joins(
    daemon: DaemonProcess, worker: Start
) -> None:
    owner, other = worker(), worker()
    with daemon.client() as client:
        card = gpu(client)
        grant = owner.do("lease", memory_mb=0, exclusive=True)
        assert grant["granted"], grant
        assert grant["gpus"][0]["memory_mb"] >= card["memory_free_mb"] - 1_000
        assert grant["env"]["CUDA_VISIBLE_DEVICES"] == card["uuid"]
        assert not other.do("lease", memory_mb=100)["granted"]


def test_the_daemon_never_opens_the_driver_and_safe_mode_ends_its_child(
    daemon: DaemonProcess,
) -> None:
    def opened(pid: int) -> list[str]:
        folder = Path(f"/proc/{pid}/fd")
        links = [os.readlink(entry) for entry in folder.iterdir() if entry.is_symlink()]
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        mapped = [line.split()[-1] for line in maps if "/" in line]
        return [name for name in links + mapped if "nvidia" in name]

    def children() -> list[int]:
        path = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    assert any(opened(pid) for pid in children()), "no child reads the card"
    assert opened(daemon.pid) == []
    with daemon.client() as client:
        client.ask("policy_set", changes={"safe_mode": True})
        wait_until(lambda: not any(opened(pid) for pid in children()), "the child is gone")
        info = client.ask("gpu_info")
        assert (info["available"], info["gpus"]) == (False, [])
        client.ask("policy_set", changes={"safe_mode": False})
        wait_until(lambda: bool(client.ask("ready")["ready"]), "the card is back", 30)
        assert client.ask("gpu_info")["available"]
