"""The client and a real daemon with one simulated card."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import libclient
from libclient import aio
from libclient.errors import NotGranted, RequestError, RequestRefused
from tests.support.daemon_process import DaemonProcess, running_daemon
from tests.support.proxy import Proxy, wait_for
from tests.support.sources import ROOT

CARD = ("--simulate", "1x24576")
DRAIN = {"GPUORCH_SIMULATE_DRAIN_S": "0"}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, *CARD, environ=DRAIN) as running:
        yield running


@pytest.fixture
def path(daemon: DaemonProcess) -> str:
    return str(daemon.socket)


@pytest.fixture
def client(path: str) -> Iterator[libclient.Client]:
    with libclient.connect(path) as connected:
        yield connected


def agents_holding(path: str) -> list[str]:
    with libclient.connect(path) as other:
        held = other.call("allocations")["allocations"]
    return [one["agent"] for one in held if one["state"] == "active"]


def test_the_socket_may_be_named_by_a_path(daemon: DaemonProcess) -> None:
    with libclient.lease("analyst", "2GiB", socket=daemon.socket) as lease:
        assert lease.granted
    assert libclient.gpu_info(daemon.socket)["available"]
    assert libclient.get_policy(daemon.socket)["reachable"]


def test_an_event_can_be_waited_for_as_long_as_one_likes(client: libclient.Client) -> None:
    stream = client.events(["policy"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stream.next, 1e19)
        # Read without the lock that guards it: seen a moment later does no harm here.
        wait_for(lambda: waiting.done() or stream._subscription.waiting is not None, "it waits")
        client.call("policy_set", changes={"default_memory_mb": 1_024})
        assert waiting.result(20)["event"] == "policy.changed"


def test_a_lease_holds_memory_until_its_block_ends(client: libclient.Client, path: str) -> None:
    with client.lease("analyst", "2GiB", purpose="test", labels={"run": "7"}) as lease:
        assert lease.granted
        assert lease.memory_mb == 2_048
        assert lease.env == {"CUDA_VISIBLE_DEVICES": lease.gpus[0]["uuid"]}
        assert lease.enforcement == "advisory"
        assert agents_holding(path) == ["analyst"]
    assert agents_holding(path) == []


def test_what_does_not_fit_is_for_the_cpu_and_says_what_is_missing(
    client: libclient.Client,
) -> None:
    lease = client.lease("analyst", "30GiB")
    assert (lease.device, lease.reason) == ("cpu", "INSUFFICIENT_MEMORY")
    assert "24576" in lease.detail
    assert client.explain("analyst", "30GiB")["would_grant"] is False
    assert client.explain("analyst", "2GiB")["would_grant"] is True
    with pytest.raises(NotGranted, match="INSUFFICIENT_MEMORY"):
        client.lease("analyst", "30GiB", required=True)


def test_who_waits_is_told_its_place_and_gets_what_another_gives_back(
    client: libclient.Client, path: str
) -> None:
    places: list[int] = []

    def told(event: dict[str, Any]) -> None:
        if event["event"] == "lease.queued":
            places.append(event["position"])

    with ThreadPoolExecutor(1) as pool:
        first = libclient.lease("first", "20GiB", socket=path)
        waiting = pool.submit(client.lease, "second", "20GiB", wait_s=60, on_event=told)
        wait_for(lambda: places == [1], "the place in the queue")
        first.release()
        second = waiting.result(10)
        assert second.granted
        assert second.waited_s > 0
        second.release()


def test_a_wait_that_ends_without_memory_says_so(client: libclient.Client) -> None:
    with client.lease("first", "20GiB"):
        start_s = time.monotonic()
        assert client.lease("second", "20GiB", wait_s=0.3).reason == "TIMEOUT"
        assert time.monotonic() - start_s < 2.3
        assert client.call("queue")["waiting"] == []


def test_a_cancelled_task_leaves_the_queue_and_the_connection(path: str) -> None:
    async def scenario() -> None:
        async with aio.connect(path) as client, client.lease("first", "20GiB") as first:
            task = asyncio.ensure_future(client.lease("second", "20GiB", wait_s=60))
            while not (await client.call("queue"))["waiting"]:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.call("queue"))["waiting"] == []
            assert first.live

    asyncio.run(scenario())


def test_a_ttl_does_not_end_a_lease_whose_holder_computes(tmp_path: Path) -> None:
    with running_daemon(
        tmp_path, *CARD, environ={**DRAIN, "GPU_ORCHESTRATOR_LEASE_TTL": "1"}
    ) as daemon:
        path = str(daemon.socket)
        with libclient.lease("analyst", "2GiB", socket=path) as lease:
            first_end = lease.expires_at
            assert first_end is not None
            wait_for(lambda: time.time() > first_end + 1, "twice the time limit")
            assert lease.live
            assert agents_holding(path) == ["analyst"]

        async def scenario() -> None:
            async with aio.lease("analyst", "2GiB", socket=path) as held:
                await asyncio.sleep(1.5)
                assert held.live

        asyncio.run(scenario())


def test_events_tell_what_happens_to_others(client: libclient.Client, path: str) -> None:
    with client.events(["lease.*"]) as events:
        with libclient.lease("analyst", "2GiB", socket=path) as lease:
            granted = events.next(10)
            assert (granted["event"], granted["lease_id"]) == ("lease.granted", lease.lease_id)
        assert "token" not in granted
        assert events.next(10)["event"] == "lease.released"

    async def scenario() -> None:
        async with (
            aio.connect(path) as watching,
            watching.events() as seen,
            aio.lease("analyst", "2GiB", socket=path),
        ):
            assert (await anext(seen))["event"] == "lease.granted"

    asyncio.run(scenario())


def test_a_revoked_lease_tells_its_holder_and_ends(client: libclient.Client, path: str) -> None:
    events: list[str] = []
    lease = client.lease("analyst", "2GiB", on_event=lambda event: events.append(event["event"]))
    with libclient.connect(path) as admin:
        admin.call("revoke", lease_id=lease.lease_id, grace_s=0.3, reason="upgrade")
        wait_for(lambda: lease.revoking, "the warning")
        assert lease.deadline is not None
        assert lease.deadline == pytest.approx(time.time() + 0.3, abs=1)
        wait_for(lambda: lease.ended == "revoked: upgrade", "the end")
    wait_for(lambda: events == ["lease.revoking", "lease.revoked"], "both events")
    lease.release()


def test_many_threads_share_one_client(client: libclient.Client, path: str) -> None:
    def work(number: int) -> int:
        granted = 0
        for _ in range(20):
            with client.lease(f"agent-{number}", "2GiB", wait_s=30) as lease:
                granted += lease.granted
        return granted

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(16))) == [20] * 16
    assert agents_holding(path) == []


def test_safe_mode_means_the_cpu(client: libclient.Client) -> None:
    client.call("policy_set", changes={"safe_mode": True})
    lease = client.lease("analyst", "2GiB", wait_s=30)
    assert (lease.device, lease.reason) == ("cpu", "SAFE_MODE")
    assert client.gpu_info()["available"] is False
    client.call("policy_set", changes={"safe_mode": False})
    # The cards have to be found anew: a lease that waits sees to that.
    with client.lease("analyst", "2GiB", wait_s=30) as again:
        assert again.granted


def test_a_name_that_is_anothers_is_for_the_cpu_with_a_warning(client: libclient.Client) -> None:
    client.call("policy_set", changes={"agents": {"analyst": {"users": [65_533]}}})
    with pytest.warns(RequestRefused, match="forbidden"):
        lease = client.lease("analyst", "2GiB")
    assert (lease.device, lease.reason) == ("cpu", "FORBIDDEN")


@pytest.mark.parametrize(("ttl_s", "seen_mb"), [("30", 2_048), ("0", 1_024)])
def test_a_policy_counts_as_long_as_the_environment_says(
    client: libclient.Client,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    ttl_s: str,
    seen_mb: int,
) -> None:
    monkeypatch.setenv("GPU_ORCHESTRATOR_POLICY_TTL", ttl_s)
    first = libclient.get_policy(path)
    assert (first["reachable"], first["safe_mode"]) == (True, False)
    client.call("policy_set", changes={"default_memory_mb": 1_024})
    assert libclient.get_policy(path)["policy"]["default_memory_mb"] == seen_mb
    assert client.get_policy()["policy"]["default_memory_mb"] == seen_mb


def test_a_wrong_request_is_an_error_of_its_own(client: libclient.Client) -> None:
    with pytest.raises(RequestError) as caught:
        client.call("lease", agent="analyst", colour="red")
    assert (caught.value.code, caught.value.field) == ("bad_request", "colour")
    with pytest.raises(RequestError, match="unknown_op"):
        client.call("no_such_op")
    with pytest.raises(RequestError, match="unknown_token"):
        client.release("nonsense")
    assert client.call("health")["status"] == "ok"


def test_a_daemon_that_stops_answering_costs_two_seconds_and_no_lease(
    daemon: DaemonProcess, client: libclient.Client, path: str
) -> None:
    daemon.signal(signal.SIGSTOP)
    start_s = time.monotonic()
    late = client.lease("late", "2GiB")
    own = libclient.lease("own", "2GiB", socket=path)
    took_s = time.monotonic() - start_s
    daemon.signal(signal.SIGCONT)
    assert (late.reason, own.reason) == ("TIMEOUT", "TIMEOUT")
    assert took_s < 5
    # What it grants now is given back with nobody asking.
    wait_for(lambda: not client.exchange.session.expects_input, "the late grant's release")
    assert agents_holding(path) == []


def test_a_daemon_that_is_killed_lets_its_clients_go_on(
    daemon: DaemonProcess, client: libclient.Client, path: str
) -> None:
    lease = client.lease("analyst", "2GiB")
    daemon.signal(signal.SIGKILL)
    daemon.wait()
    wait_for(lambda: lease.detached, "the news")
    assert lease.live
    lease.release()
    assert lease.ended == "released"
    assert client.lease("analyst", "2GiB").reason == "NO_DAEMON"
    assert libclient.lease("analyst", "2GiB", socket=path).reason == "NO_DAEMON"


def test_a_daemon_behind_a_stopped_link_is_out_of_time_and_comes_back(
    path: str, tmp_path: Path
) -> None:
    with Proxy(tmp_path, path) as proxy, libclient.connect(proxy.path) as client:
        held = client.lease("held", "2GiB")
        assert held.granted
        proxy.stop()
        assert client.lease("late", "2GiB").reason == "TIMEOUT"
        proxy.resume()
        wait_for(lambda: client.exchange.session.late == 0, "the late answers")
        assert agents_holding(path) == ["held"]
        proxy.cut()
        wait_for(lambda: held.ended is not None, "the news of the lost link")
    wait_for(lambda: agents_holding(path) == [], "the end of the lease")


def test_a_killed_holders_memory_goes_to_the_one_who_waits(
    client: libclient.Client, path: str
) -> None:
    code = (
        "import libclient, sys\n"
        "lease = libclient.lease('holder', '20GiB', socket=sys.argv[1], required=True)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.lease, "next", "20GiB", wait_s=60)
            wait_for(lambda: len(client.call("queue")["waiting"]) == 1, "the waiter")
            holder.kill()
            with waiting.result(10) as lease:
                assert lease.granted
