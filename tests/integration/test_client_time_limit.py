"""Two seconds in all, whatever the daemon keeps sending meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

import libclient
from libclient.errors import Unavailable
from libclient.wire.framing import frame
from tests.support.proxy import FakeDaemon, Script, Served, grant_fields

PAUSE_S = 0.001
# More than a call may take and less than the daemon goes on for.
GOES_ON_S = 8.0
IN_ALL_S = 2.0
SLACK_S = 2.0

pytestmark = pytest.mark.serial


def in_crumbs(conn: Served) -> None:
    """Answer a byte at a time."""
    request = conn.request()
    answer = {"id": request["id"], "ok": True, "padding": "x" * 60_000, **grant_fields()}
    for byte in frame(msgpack.packb(answer))[: int(GOES_ON_S / PAUSE_S)]:
        conn.sock.sendall(bytes([byte]))
        time.sleep(PAUSE_S)
    conn.wait_for_end()


def of_others(conn: Served) -> None:
    """Answer nothing, and tell of others without end."""
    conn.request()
    end_s = time.monotonic() + GOES_ON_S
    while time.monotonic() < end_s:
        conn.event("lease.granted", lease_id="another")
        time.sleep(PAUSE_S)
    conn.wait_for_end()


def blocking_lease(path: str) -> str:
    return libclient.lease("analyst", socket=path).reason


def async_lease(path: str) -> str:
    async def ask() -> str:
        async with libclient.aio.lease("analyst", socket=path) as lease:
            return lease.reason

    return asyncio.run(ask())


def question(path: str) -> str:
    answer: dict[str, Any] = libclient.gpu_info(path)
    return "TIMEOUT" if "in time" in answer["message"] else answer["message"]


@pytest.mark.parametrize("script", [in_crumbs, of_others])
@pytest.mark.parametrize("ask", [blocking_lease, async_lease, question])
def test_a_daemon_that_never_stops_sending_buys_no_time(
    tmp_path: Path, ask: Callable[[str], str], script: Script
) -> None:
    with FakeDaemon(tmp_path, script) as daemon:
        start_s = time.monotonic()
        assert ask(daemon.path) == "TIMEOUT"
        assert time.monotonic() - start_s < IN_ALL_S + SLACK_S


def test_a_busy_subscription_holds_no_call_of_its_client(tmp_path: Path) -> None:
    stop = threading.Event()

    def script(conn: Served) -> None:
        conn.reply(conn.expect("subscribe"), subscription=1, seq=0)
        conn.request()
        seq = 0
        while not stop.is_set():
            seq += 1
            conn.send(event="lease.granted", subscription=1, seq=seq, time=0.0)
            time.sleep(PAUSE_S)
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        events = client.events()
        start_s = time.monotonic()
        with pytest.raises(Unavailable, match="in time"):
            client.call("health", timeout_s=0.3)
        assert time.monotonic() - start_s < GOES_ON_S / 2
        # What came meanwhile is there.
        assert next(events)["event"] == "lease.granted"
        stop.set()
