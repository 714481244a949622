"""Events: who gets which, in what order and number; and a sealed connection, which gets none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import DaemonProcess, running_daemon
from tests.support.wire import FrameClient


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0.05"}
    with running_daemon(tmp_path, "--simulate", "1x24576", environ=environ) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[FrameClient]:
    with FrameClient(daemon.socket) as client:
        yield client


@pytest.fixture
def other(daemon: DaemonProcess) -> Iterator[FrameClient]:
    with FrameClient(daemon.socket) as other:
        yield other


def next_event(client: FrameClient) -> dict[str, Any]:
    message = client.message()
    assert message is not None
    assert "event" in message, message
    return message


def test_a_subscription_tells_what_happens_in_its_order(
    client: FrameClient, other: FrameClient
) -> None:
    began = time.time()
    assert client.ask("subscribe")["seq"] == 0
    grant = other.ask("lease", agent="x", min_memory_mb=1)
    other.ask("release", token=grant["token"])
    events = [next_event(client) for _ in range(4)]
    assert [event["event"] for event in events] == [
        "lease.granted",
        "lease.released",
        "lease.draining",
        "lease.drained",
    ]
    assert [event["seq"] for event in events] == [1, 2, 3, 4]
    assert {event["subscription"] for event in events} == {1}
    assert {event["lease_id"] for event in events} == {grant["lease_id"]}
    assert all(began - 1 < event["time"] < time.time() + 1 for event in events)
    assert grant["token"] not in str(events)


@pytest.mark.parametrize(
    "topics", [["policy"], ["policy.*"], ["policy.changed"], ["gpu", "policy"]]
)
def test_topics_choose_areas_or_single_events(
    client: FrameClient, other: FrameClient, topics: list[str]
) -> None:
    client.ask("subscribe", topics=topics)
    grant = other.ask("lease", agent="x", min_memory_mb=1)
    other.ask("release", token=grant["token"])
    other.ask("policy_set", changes={"default_memory_mb": 512})
    event = next_event(client)
    assert (event["event"], event["seq"]) == ("policy.changed", 1)


def test_each_subscription_counts_for_itself(client: FrameClient, other: FrameClient) -> None:
    first = client.ask("subscribe", topics=["lease.granted"])["subscription"]
    second = client.ask("subscribe", topics=["lease"])["subscription"]
    assert (first, second) == (1, 2)
    grant = other.ask("lease", agent="x", min_memory_mb=1)
    other.ask("release", token=grant["token"])
    events = [next_event(client) for _ in range(5)]
    seqs = {number: [e["seq"] for e in events if e["subscription"] == number] for number in (1, 2)}
    assert seqs == {1: [1], 2: [1, 2, 3, 4]}


def test_nothing_is_told_after_unsubscribing(client: FrameClient, other: FrameClient) -> None:
    client.ask("subscribe")
    other.ask("lease", agent="x", min_memory_mb=1)
    assert client.event("lease.granted")["seq"] == 1
    assert client.ask("unsubscribe", subscription=1)["ok"] is True
    other.ask("lease", agent="y", min_memory_mb=1)
    assert client.is_silent()
    assert client.ask("unsubscribe", subscription=1)["error"]["code"] == "not_found"


def test_an_owner_hears_of_its_own_lease_without_asking(
    client: FrameClient, other: FrameClient
) -> None:
    grant = client.ask("lease", agent="x", min_memory_mb=1)
    bystander = other.ask("lease", agent="y", min_memory_mb=1)
    assert bystander["granted"] is True
    other.ask("revoke", lease_id=grant["lease_id"], grace_s=0.2, reason="test")
    revoking = client.event("lease.revoking")
    revoked = client.event("lease.revoked")
    assert (revoking["lease_id"], revoking["reason"]) == (grant["lease_id"], "test")
    assert 0 < revoking["deadline_s"] <= 0.2
    assert revoked["seq"] == revoking["seq"] + 1
    assert "subscription" not in revoking
    assert client.ask("release", token=grant["token"])["error"]["code"] == "unknown_token"
    assert other.is_silent()


def test_a_sealed_connection_is_told_nothing_and_holds(
    daemon: DaemonProcess, client: FrameClient, other: FrameClient
) -> None:
    grant = client.ask("lease", agent="x", min_memory_mb=1)
    client.ask("subscribe")
    assert client.ask("seal")["ok"] is True
    client.send("health")
    client.send("release", token=grant["token"])
    client.send_bytes(os.urandom(300_000))
    other.ask("revoke", lease_id=grant["lease_id"], grace_s=60, reason="test")
    other.ask("policy_set", changes={"default_memory_mb": 512})
    assert client.is_silent(0.3)
    (row,) = other.ask("allocations")["allocations"]
    assert (row["lease_id"], row["state"]) == (grant["lease_id"], "revoking")
    client.close()
    waiting = other.ask("lease", agent="y", exclusive=True, wait_s=20)
    assert waiting["granted"] is True


def test_seal_is_refused_while_a_request_is_unanswered(client: FrameClient) -> None:
    grant = client.ask("lease", agent="x", exclusive=True)
    client.send("lease", id="w", agent="x", exclusive=True, wait_s=60)
    client.event("lease.queued")
    assert client.ask("seal")["error"]["code"] == "bad_request"
    client.ask("cancel", request_id="w")
    assert client.reply()["note"] == "CANCELLED"
    assert client.ask("seal", signal="TERM")["ok"] is True
    assert grant["granted"] is True


def test_seal_counts_what_was_sent_before_it_as_answered(client: FrameClient) -> None:
    client.send_all(
        [
            {"id": 1, "op": "lease", "agent": "x", "min_memory_mb": 1},
            {"id": 2, "op": "metrics"},
            {"id": 3, "op": "seal"},
            {"id": 4, "op": "health"},
        ]
    )
    assert [client.reply()["id"] for _ in range(3)] == [1, 2, 3]
    assert client.is_silent()


def test_a_sealed_holder_is_signalled_when_its_lease_is_revoked(
    daemon: DaemonProcess, client: FrameClient
) -> None:
    script = (
        "import signal, sys\n"
        "from tests.support.wire import FrameClient\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        "c = FrameClient(sys.argv[1])\n"
        "c.ask('lease', agent='x', min_memory_mb=1)\n"
        "c.ask('seal', signal='USR1')\n"
        "print('sealed', flush=True)\n"
        "print(signal.sigwait([signal.SIGUSR1]), flush=True)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(daemon.socket)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"sealed\n"
        (row,) = client.ask("allocations")["allocations"]
        client.ask("revoke", lease_id=row["lease_id"], grace_s=60)
        assert int(holder.stdout.readline()) == signal.SIGUSR1
        assert holder.wait(20) == 0
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
