"""Views show the state as it is: unknown is null, nothing is counted twice, pages miss nothing."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from gpuorchd import views
from gpuorchd.core.events import (
    ClientArrived,
    DevicesFound,
    LeaseAsked,
    PolicyChangeAsked,
    ReadingsTaken,
    SettingsPersisted,
)
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import (
    Ask,
    ConnectionId,
    DeviceFacts,
    DeviceUuid,
    Peer,
    ProcessKey,
    ProcessUse,
    Reading,
    Token,
)
from gpuorchd.core.state import Settings
from gpuorchd.devices.telemetry import DeviceStatus, Telemetry
from gpuorchd.views import BadCursor, Moment

S = 1_000_000_000
CARD = DeviceUuid("GPU-0")
NOTHING: MappingProxyType[DeviceUuid, Telemetry] = MappingProxyType({})
STATUS = DeviceStatus(True, True, None, 5 * S, False, "/tmp/nvidia-mps", False, None)


class Host:
    """A machine with its clock, and what it is told."""

    def __init__(self, *, drain_ns: int | None = None, safe_mode: bool = False) -> None:
        self.machine = Machine(Settings(epoch="abcdef"), safe_mode=safe_mode)
        self.state = self.machine.state
        self.now_ns = 10 * S
        facts = DeviceFacts(CARD, 0, "card", 10_000, 100, drain_ns)
        if not safe_mode:
            self.machine.handle(DevicesFound((facts,)), self.now_ns)

    def read(self, used_mb: int, *uses: tuple[int, int | None]) -> None:
        processes = tuple(ProcessUse(ProcessKey(pid, 1), mb) for pid, mb in uses)
        reading = Reading(CARD, 9_900 - used_mb, used_mb, processes)
        self.machine.handle(ReadingsTaken(self.now_ns, (reading,)), self.now_ns)

    def lease(self, conn: int, pid: int, request_id: int, memory_mb: int, wait_s: int = 0) -> None:
        connection = ConnectionId(conn)
        if connection not in self.state.clients:
            peer = Peer(ProcessKey(pid, 1), 1000)
            self.machine.handle(ClientArrived(connection, peer), self.now_ns)
        ask = Ask(f"agent{conn}", memory_mb, wait_ns=wait_s * S)
        token = Token(f"token-{conn}-{request_id}")
        self.machine.handle(LeaseAsked(connection, request_id, ask, token), self.now_ns)

    def moment(self) -> Moment:
        return Moment(self.now_ns, 1_000 * S)

    def gpu(self) -> dict[str, Any]:
        shown = views.gpu_info(self.state, NOTHING, STATUS, self.moment())["gpus"]
        assert isinstance(shown, list)
        (gpu,) = shown
        assert isinstance(gpu, dict)
        return gpu

    def allocations(self, **options: Any) -> list[dict[str, Any]]:
        shown = views.allocations(self.state, self.moment(), **options)
        rows = msgspec.to_builtins(shown)["allocations"]
        assert isinstance(rows, list)
        return rows


def test_a_gpu_that_was_never_read_is_unknown_and_not_empty() -> None:
    gpu = Host().gpu()
    unknown = ("memory_used_mb", "memory_free_mb", "memory_unleased_mb", "temperature_c")
    assert [gpu[name] for name in unknown] == [None] * 4
    assert (gpu["state"], gpu["memory_total_mb"], gpu["memory_leased_mb"]) == ("unknown", 10_000, 0)


def test_a_reading_that_is_too_old_is_unknown_again() -> None:
    host = Host()
    host.read(500)
    assert (host.gpu()["state"], host.gpu()["memory_used_mb"]) == ("ok", 500)
    host.now_ns += host.state.settings.reading_max_age_ns
    assert host.gpu()["state"] == "ok"
    host.now_ns += 1
    assert (host.gpu()["state"], host.gpu()["memory_used_mb"]) == ("unknown", None)


def test_a_reading_that_failed_is_unknown() -> None:
    host = Host()
    host.read(500)
    failed = ReadingsTaken(host.now_ns, (), ((CARD, "lost"),))
    host.machine.handle(failed, host.now_ns)
    assert (host.gpu()["state"], host.gpu()["memory_free_mb"]) == ("unknown", None)


def test_memory_outside_leases_is_shown_apart() -> None:
    host = Host()
    host.read(0)
    host.lease(1, pid=7, request_id=1, memory_mb=3_000)
    host.read(1_200, (7, 1_000), (99, 200))
    gpu = host.gpu()
    assert gpu["memory_used_mb"] == 1_200
    assert gpu["memory_leased_mb"] == 3_000
    assert gpu["memory_unleased_mb"] == 200
    assert gpu["leases"] == ["abcdef-1"]


def test_a_simulated_card_uses_what_is_leased() -> None:
    host = Host(drain_ns=S)
    host.lease(1, pid=7, request_id=1, memory_mb=3_000)
    gpu = host.gpu()
    assert (gpu["state"], gpu["memory_used_mb"], gpu["memory_free_mb"]) == ("ok", 3_000, 6_900)
    assert gpu["memory_unleased_mb"] == 0
    info = views.gpu_info(host.state, NOTHING, STATUS, host.moment())
    assert (info["sampled_s"], info["available"]) == (0.0, True)


def test_the_age_of_the_readings_is_shown() -> None:
    host = Host()
    info = views.gpu_info(host.state, NOTHING, STATUS, host.moment())
    assert info["sampled_s"] is None
    host.read(500)
    host.now_ns += S // 2
    assert views.gpu_info(host.state, NOTHING, STATUS, host.moment())["sampled_s"] == 0.5


def test_safe_mode_shows_no_gpu_and_says_why() -> None:
    info = views.gpu_info(Host(safe_mode=True).state, NOTHING, STATUS, Moment(0, 0))
    assert (info["available"], info["gpus"], info["sampled_s"]) == (False, [], None)
    assert "SAFE_MODE" in str(info["message"])


def test_what_a_process_uses_is_shared_out_among_its_leases_once() -> None:
    host = Host()
    host.read(0)
    host.lease(1, pid=7, request_id=1, memory_mb=1_000)
    host.lease(2, pid=7, request_id=1, memory_mb=2_000)
    host.lease(3, pid=8, request_id=1, memory_mb=500)
    host.read(4_000, (7, 3_400), (8, None))
    used = {row["lease_id"]: row["used_mb"] for row in host.allocations()}
    assert used == {"abcdef-1": 1_000, "abcdef-2": 2_400, "abcdef-3": None}
    host.read(700, (7, 700))
    used = {row["lease_id"]: row["used_mb"] for row in host.allocations()}
    assert used == {"abcdef-1": 700, "abcdef-2": 0, "abcdef-3": 0}


def test_only_the_own_connection_sees_its_tokens() -> None:
    host = Host(drain_ns=S)
    host.lease(1, pid=7, request_id=1, memory_mb=10)
    host.lease(2, pid=7, request_id=1, memory_mb=10)
    assert ["token" in row for row in host.allocations()] == [False, False]
    own = host.allocations(own=ConnectionId(2))
    assert [row.get("token") for row in own] == [None, "token-2-1"]


def test_pages_of_leases_miss_none_and_repeat_none() -> None:
    host = Host(drain_ns=S)
    for number in range(1, 26):
        host.lease(1, pid=7, request_id=number, memory_mb=1)
    seen: list[str] = []
    after: str | None = None
    pages = 0
    while True:
        page = views.allocations(host.state, host.moment(), after, 10)
        rows = page["allocations"]
        assert isinstance(rows, list)
        seen += [row.lease_id for row in rows]
        pages += 1
        if page["next"] is None:
            break
        after = str(page["next"])
        # The lease that the page ended with may be gone by the time of the next.
        host.state.leases.pop(after)  # type: ignore[call-overload]  # the name is a lease id
    assert pages == 3
    assert seen == [f"abcdef-{number}" for number in range(1, 26)]


@pytest.mark.parametrize("after", ["nonsense", "x-", "", "9" * 30, "abc-\u0663"])
def test_a_cursor_that_is_none_is_refused(after: str) -> None:
    host = Host(drain_ns=S)
    with pytest.raises(BadCursor):
        views.allocations(host.state, host.moment(), after)
    with pytest.raises(BadCursor):
        views.queue(host.state, host.moment(), after)


def test_pages_of_the_queue_follow_the_order_of_serving() -> None:
    host = Host(drain_ns=S)
    host.lease(1, pid=7, request_id=0, memory_mb=9_900)
    for conn, priority in enumerate(["background", "critical", "background", "critical"], 2):
        agents = {f"agent{conn}": {"priority": priority}}
        change = PolicyChangeAsked(ConnectionId(9), 1, {"agents": agents}, None, {})
        host.machine.handle(change, host.now_ns)
        host.machine.handle(SettingsPersisted(), host.now_ns)
        for request_id in range(2):
            host.lease(conn, pid=conn, request_id=request_id, memory_mb=9_000, wait_s=60)
    served = [waiter.queue_id for waiter in host.state.queue]
    assert len(served) == 8
    seen: list[tuple[str, int]] = []
    after: str | None = None
    while True:
        page = views.queue(host.state, host.moment(), after, 3)
        rows = page["waiting"]
        assert isinstance(rows, list)
        seen += [(row["queue_id"], row["position"]) for row in rows]
        if page["next"] is None:
            break
        after = str(page["next"])
    assert seen == [(queue_id, position) for position, queue_id in enumerate(served, 1)]
    page = views.queue(host.state, host.moment(), served[2], 1)
    rows = page["waiting"]
    assert isinstance(rows, list)
    assert rows[0]["queue_id"] == served[3]


def test_only_the_own_requests_have_their_ids_in_the_queue() -> None:
    host = Host(drain_ns=S)
    host.lease(1, pid=7, request_id=0, memory_mb=9_900)
    host.lease(2, pid=8, request_id=5, memory_mb=9_000, wait_s=60)
    host.lease(3, pid=9, request_id=6, memory_mb=9_000, wait_s=60)
    host.now_ns += 2 * S
    rows = views.queue(host.state, host.moment(), own=ConnectionId(3))["waiting"]
    assert isinstance(rows, list)
    assert [row.get("request_id") for row in rows] == [None, 6]
    assert [row["waited_s"] for row in rows] == [2.0, 2.0]


def test_the_read_only_flag_follows_safe_mode() -> None:
    for on in (False, True):
        shown = views.policy_get(Host(safe_mode=on).state)
        assert shown["safe_mode"] is shown["safe_mode_read_only"] is on
        assert "safe_mode" not in str(shown["policy"]).replace("safe_mode_grace_s", "")
