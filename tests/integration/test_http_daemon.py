"""The side port of a whole daemon: what it shows of a lease, and what it shows of nothing."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpuorchd.observe.metric_table import TABLE
from tests.support.daemon_process import DaemonProcess, running_daemon, wait_until
from tests.support.http_client import Answer, fetch, request_bytes

CARD = ("--simulate", "1x8192")


class Port:
    """A daemon's side port, asked one page at a time."""

    def __init__(self, daemon: DaemonProcess, number: int) -> None:
        self.daemon = daemon
        self.address = ("127.0.0.1", number)

    def get(self, path: str, method: str = "GET") -> Answer:
        return asyncio.run(fetch(self.address, path, method))

    def samples(self) -> dict[tuple[str, str], float]:
        """Read the samples without labels, and those of an op by name and outcome."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics").body.decode()):
            for sample in family.samples:
                name = sample.name.removeprefix("gpu_orchestrator_")
                found[name, sample.labels.get("outcome", "")] = sample.value
        return found

    def counts(self, metric: str, label: str) -> dict[str, float]:
        """Read one metric by one of its labels."""
        return {
            sample.labels.get(label, ""): sample.value
            for family in text_string_to_metric_families(self.get("/metrics").body.decode())
            for sample in family.samples
            if sample.name == f"gpu_orchestrator_{metric}"
        }


@contextmanager
def port_of_daemon(folder: Path, *flags: str) -> Iterator[Port]:
    # A port that was free a moment ago: nothing else on this machine asks for ports in between.
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    with running_daemon(folder, *flags, "--http-port", str(number)) as daemon:
        daemon.wait_for_log("http.bound")
        yield Port(daemon, number)


def test_a_lease_is_to_be_seen_and_its_token_is_not(tmp_path: Path) -> None:
    with port_of_daemon(tmp_path, *CARD) as port, port.daemon.client() as client:
        before = port.samples()
        grant = client.ask("lease", agent="scout", min_memory_mb=1_000)
        token = grant["token"]
        (shown,) = port.get("/allocations").json()["allocations"]
        assert (shown["agent"], shown["lease_id"]) == ("scout", grant["lease_id"])
        live = port.samples()
        assert live["active_leases", ""] - before["active_leases", ""] == 1
        assert live["lease_requests_total", "granted"] == 1
        pages = b"".join(
            port.get(path).body
            for path in ("/", "/metrics", "/gpu/info", "/policy", "/allocations", "/ready")
        )
        client.ask("release", token=token)
        wait_until(lambda: port.samples()["lease_drain_seconds_count", ""] == 1, "the drain")
        port.daemon.wait_for_log("lease.drained")
        assert token.encode() not in pages
        assert token not in port.daemon.output()
        (granted,) = port.daemon.logged("lease.granted")
        assert granted["agent"] == "scout"
        assert granted["cause_id"] > 0


# What simulated cards have no value for: nobody asks a driver, and none has failed.
OF_DRIVERS = {
    "gpu_orchestrator_gpu_utilization_ratio",
    "gpu_orchestrator_gpu_memory_utilization_ratio",
    "gpu_orchestrator_gpu_temperature_celsius",
    "gpu_orchestrator_gpu_power_watts",
    "gpu_orchestrator_nvml_error_info",
    "gpu_orchestrator_nvml_call_duration_seconds",
    "gpu_orchestrator_nvml_call_failures_total",
}


def test_a_daemon_that_was_just_started_has_every_metric_of_the_table(tmp_path: Path) -> None:
    with port_of_daemon(tmp_path, *CARD) as port, port.daemon.client() as client:
        assert client.ask("lease", agent="scout", min_memory_mb=1)["granted"]
        page = port.get("/metrics").body.decode()
    exported = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    assert exported - set(TABLE) == set()
    assert set(TABLE) - exported <= OF_DRIVERS
    assert 'gpu_orchestrator_release_requests_total{outcome="ok"} 0.0' in page
    assert 'gpu_orchestrator_events_total{event="daemon.started"} 1.0' in page


def test_subscribers_lost_events_and_bounds_are_counted(tmp_path: Path) -> None:
    flags = (*CARD, "--max-leases-per-connection", "2", "--max-subscriptions-per-connection", "1")
    with port_of_daemon(tmp_path, *flags) as port, port.daemon.client() as client:
        assert client.ask("subscribe", topics=["daemon"])["ok"]
        for _ in range(2):
            assert client.ask("lease", agent="scout", min_memory_mb=1)["granted"]
        assert client.ask("lease", agent="scout", min_memory_mb=1)["error"]["code"] == "limit"
        assert client.ask("subscribe")["error"]["code"] == "limit"
        found = port.counts("limits_reached_total", "bound")
        assert found["leases_per_connection"] == 1
        assert found["subscriptions_per_connection"] == 1
        assert found["connections"] == 0
        assert port.counts("subscribers", "") == {"": 1}
        assert port.counts("events_lost_total", "") == {"": 0}


def test_a_post_is_shown_the_daemons_own_socket(tmp_path: Path) -> None:
    with port_of_daemon(tmp_path, *CARD) as port:
        answer = port.get("/lease", "POST")
        assert answer.status == 405
        assert answer.json()["socket"] == str(port.daemon.socket)


def test_the_port_and_the_socket_say_the_same(tmp_path: Path) -> None:
    with port_of_daemon(tmp_path, *CARD) as port, port.daemon.client() as client:
        for path, op in (("/health", "health"), ("/policy", "policy_get"), ("/ready", "ready")):
            by_socket = {k: v for k, v in client.ask(op).items() if k not in {"ok", "id"}}
            by_http = port.get(path).json()
            # The loop's lateness is another figure each time.
            for answer in (by_socket, by_http):
                answer.get("checks", {}).get("loop", {}).pop("detail", None)
            assert by_http == by_socket
        text = client.ask("metrics")
        assert "gpu_orchestrator_uptime_seconds" in json.dumps(text)


def test_safe_mode_is_ready_and_looks_at_nothing(tmp_path: Path) -> None:
    with port_of_daemon(tmp_path, *CARD, "--safe-mode", "true") as port:
        answer = port.get("/ready")
        assert answer.status == 200
        assert answer.json()["checks"]["nvml"]["detail"] == "not looked at: SAFE_MODE is on"
        assert port.get("/gpu/info").json()["available"] is False


@pytest.mark.parametrize("sent", [request_bytes("/metrics") * 500, b"GET /metrics HTTP/1.1\r\n"])
def test_clients_that_read_nothing_keep_no_lease_from_anybody(tmp_path: Path, sent: bytes) -> None:
    with port_of_daemon(tmp_path, *CARD) as port, port.daemon.client() as client:
        slow = [socket.create_connection(port.address) for _ in range(70)]
        try:
            for one in slow:
                one.setblocking(False)
                try:
                    one.send(sent)
                except (ConnectionResetError, BrokenPipeError):
                    # One connection too many: it was told so and closed.
                    pass
            for _ in range(50):
                grant = client.ask("lease", agent="scout", min_memory_mb=10)
                assert grant["granted"]
                assert client.ask("release", token=grant["token"])["released"]
        finally:
            for one in slow:
                one.close()
        assert len(port.daemon.logged("http.connection_refused")) <= 1
        assert not port.daemon.logged("daemon.bug_met")
        assert not port.daemon.logged("http.request_failed")
        assert port.daemon.stop() == 0
