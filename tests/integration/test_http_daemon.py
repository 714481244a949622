"""The side port of a whole daemon: what it shows of a lease, and what it shows of nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

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
