"""Clients that do not read: what they cost is bounded, and nobody else notices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon_process import DaemonProcess, LineClient, running_daemon, wait_until
from tests.support.wire import FrameClient, packed

# What an answer may take while others misbehave: far above what it takes, far below a hang.
ANSWER_S = 2.0
# The default bound on a connection's unsent replies, twice over for what it sent and was not read.
PER_CONNECTION_KB = 700


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
    folder = tmp_path_factory.mktemp("d")
    with running_daemon(folder, "--simulate", "2x24576", environ=environ) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[FrameClient]:
    with FrameClient(daemon.socket) as client:
        yield client


def resident_kb(pid: int) -> int:
    """The resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no such process")


def assert_it_serves(client: FrameClient) -> None:
    """A normal client gets its answers."""
    began = time.monotonic()
    grant = client.ask("lease", agent="normal", min_memory_mb=1)
    assert grant["granted"] is True
    assert client.ask("release", token=grant["token"])["released"] is True
    assert time.monotonic() - began < ANSWER_S


@pytest.mark.serial
@pytest.mark.parametrize("op", ["policy_get", "health", "lease", "nonsense"])
def test_connections_that_never_read_cost_little_and_hold_nobody_up(
    daemon: DaemonProcess, client: FrameClient, op: str
) -> None:
    assert_it_serves(client)
    before_kb = resident_kb(daemon.pid)
    fields = {"agent": "x", "min_memory_mb": 1} if op == "lease" else {}
    requests = b"".join(packed({"id": n, "op": op, **fields}) for n in range(2_000))
    with ExitStack() as stack:
        deaf = [stack.enter_context(FrameClient(daemon.socket)) for _ in range(6)]
        for one in deaf:
            assert one.fill(requests) < 8_000_000
            assert_it_serves(client)
        assert resident_kb(daemon.pid) - before_kb < len(deaf) * PER_CONNECTION_KB + 4_000
    wait_until(lambda: client.ask("allocations")["allocations"] == [], "the end of what they held")


def test_what_was_not_read_is_all_there_when_it_is(client: FrameClient) -> None:
    count = 3_000
    client.socket.setblocking(False)
    wanted = b"".join(packed({"id": n, "op": "policy_get"}) for n in range(count))
    sent = client.socket.send(wanted)
    client.socket.settimeout(20)
    numbers: list[object] = []
    while len(numbers) < count:
        if sent < len(wanted):
            client.socket.setblocking(False)
            try:
                sent += client.socket.send(wanted[sent:])
            except BlockingIOError:
                pass
            client.socket.settimeout(20)
        numbers.append(client.reply()["id"])
    assert numbers == list(range(count))


def test_a_holder_whose_input_is_paused_still_ends_with_its_connection(
    daemon: DaemonProcess, client: FrameClient
) -> None:
    with FrameClient(daemon.socket) as deaf:
        deaf.ask("lease", agent="x", exclusive=True, gpus=2)
        deaf.fill(packed({"id": 9, "op": "policy_get"}))
        waiting = client.send("lease", agent="next", exclusive=True, gpus=2, wait_s=60)
        client.event("lease.queued")
    late = client.reply()
    assert (late["id"], late["granted"]) == (waiting, True)


def test_a_holder_whose_input_is_paused_still_ends_with_its_process(
    daemon: DaemonProcess, client: FrameClient
) -> None:
    script = (
        "import sys, time\n"
        "from tests.support.wire import FrameClient, packed\n"
        "c = FrameClient(sys.argv[1])\n"
        "c.ask('lease', agent='x', exclusive=True, gpus=2)\n"
        "c.fill(packed({'id': 9, 'op': 'policy_get'}))\n"
        "print('full', flush=True)\n"
        "time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(daemon.socket)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"full\n"
        waiting = client.send("lease", agent="next", exclusive=True, gpus=2, wait_s=60)
        client.event("lease.queued")
        holder.send_signal(signal.SIGKILL)
        late = client.reply()
        assert (late["id"], late["granted"]) == (waiting, True)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_waiting_owner_that_does_not_read_is_told_its_latest_place(
    daemon: DaemonProcess, client: FrameClient
) -> None:
    grant = client.ask("lease", agent="x", exclusive=True, gpus=2)
    ahead = [client.send("lease", agent="x", exclusive=True, wait_s=60) for _ in range(5)]
    with FrameClient(daemon.socket) as deaf:
        waiting = deaf.send("lease", agent="x", exclusive=True, wait_s=60)
        assert deaf.event("lease.queued")["position"] == 6
        asked = packed({"id": 10_000, "op": "policy_get"})
        deaf.fill(asked)
        for request_id in ahead:
            client.ask("cancel", request_id=request_id)
            assert client.reply()["note"] == "CANCELLED"
        # Past the quarter of a second in which a place may change without a word.
        with LineClient(daemon.socket) as third:
            wait_until(lambda: third.ask("queue")["waiting"][0]["position"] == 1, "its place")
            time.sleep(0.3)
        places: list[int] = []
        while not places or places[-1] != 1:
            message = deaf.message()
            assert message is not None
            if message.get("event") == "lease.queued":
                assert message["request_id"] == waiting
                places.append(message["position"])
        client.ask("release", token=grant["token"])


def test_a_subscriber_that_does_not_read_loses_events_and_is_told_how_many(
    daemon: DaemonProcess, client: FrameClient
) -> None:
    pairs = 6_000
    with FrameClient(daemon.socket) as deaf, FrameClient(daemon.socket) as reader:
        reader_at = reader.ask("subscribe", topics=["policy"])["seq"]
        deaf_at = deaf.ask("subscribe", topics=["lease.granted", "lease.released"])["seq"]
        assert (reader_at, deaf_at) == (0, 0)
        before_kb = resident_kb(daemon.pid)
        for first in range(0, pairs, 500):
            for _ in range(500):
                grant = client.ask("lease", agent="x", min_memory_mb=1)
                client.ask("release", token=grant["token"])
            assert resident_kb(daemon.pid) - before_kb < 20_000, first
        told = lost = seq = 0
        while told + lost < 2 * pairs:
            event = deaf.message()
            assert event is not None
            seq += 1
            assert (event["subscription"], event["seq"]) == (1, seq)
            if event["event"] == "events.lost":
                lost += event["count"]
            else:
                told += 1
        assert told + lost == 2 * pairs
        assert lost > 0
        assert deaf.is_silent()
        # It goes on from there.
        client.ask("lease", agent="after", min_memory_mb=1)
        event = deaf.event("lease.granted")
        assert (event["agent"], event["seq"]) == ("after", seq + 1)
        assert reader.is_silent(0)


def test_thousands_of_subscribers_do_not_slow_a_lease(tmp_path: Path) -> None:
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
    flags = ("--simulate", "1x24576", "--max-subscriptions-per-connection", "1000")
    with ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(tmp_path, *flags, environ=environ))
        client = stack.enter_context(FrameClient(daemon.socket))
        for _ in range(4):
            subscriber = stack.enter_context(FrameClient(daemon.socket))
            subscriber.send_all([{"id": n, "op": "subscribe"} for n in range(1_000)])
            for _ in range(1_000):
                assert subscriber.reply()["ok"] is True
        for _ in range(50):
            assert_it_serves(client)


def test_large_replies_are_refused_when_too_much_is_unsent(tmp_path: Path) -> None:
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
    flags = ("--simulate", "1x24576", "--max-unsent-bytes", "1000000")
    with ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(tmp_path, *flags, environ=environ))
        client = stack.enter_context(FrameClient(daemon.socket))
        for _ in range(3):
            holder = stack.enter_context(FrameClient(daemon.socket))
            asks = [
                {"id": n, "op": "lease", "agent": "x", "min_memory_mb": 1, "purpose": "p" * 256}
                for n in range(60)
            ]
            holder.send_all(asks)
            for _ in asks:
                assert holder.reply()["granted"] is True
        for _ in range(8):
            deaf = stack.enter_context(FrameClient(daemon.socket))
            deaf.fill(packed({"id": 1, "op": "allocations"}))
        reply = client.ask("allocations")
        assert reply["error"]["code"] == "limit"
        assert reply["error"]["retryable"] is True
        assert "1000000" in reply["error"]["message"]
        assert len(client.ask("allocations", limit=5)["allocations"]) == 5
        assert_it_serves(client)
