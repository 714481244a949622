"""One client for many threads, and the one thread that the library has of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import libclient
from libclient.errors import Unavailable
from libclient.keeper import KEEPER
from tests.support.proxy import FakeDaemon, Served, denial_fields, grant_fields, wait_for
from tests.support.sources import ROOT


def makes_leases_wait(answer: threading.Event) -> Any:
    """Answer everything at once but a lease that waits: that one when told to."""

    def script(conn: Served) -> None:
        waiting: list[dict[str, Any]] = []

        def answer_waiters() -> None:
            answer.wait(20)
            for request in waiting:
                try:
                    conn.reply(request, **grant_fields(99))
                except OSError:
                    # Those who waited have gone.
                    return

        thread = threading.Thread(target=answer_waiters, name="fake-waiters")
        thread.start()
        try:
            number = 0
            while True:
                request = conn.request()
                if request["op"] == "lease" and request.get("wait_s"):
                    waiting.append(request)
                    continue
                number += 1
                fields = grant_fields(number) if request["op"] == "lease" else {"number": number}
                conn.reply(request, **fields)
        finally:
            answer.set()
            thread.join()

    return script


def keeper_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "gpuorch-keeper"]


def test_a_thread_that_waits_for_memory_holds_no_other_up(tmp_path: Path) -> None:
    answer = threading.Event()
    with (
        FakeDaemon(tmp_path, makes_leases_wait(answer)) as daemon,
        libclient.connect(daemon.path) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.lease, "analyst", wait_s=600)
        daemon.wait_for_op("lease")
        for _ in range(50):
            assert client.call("health", timeout_s=1.5)["number"] > 0
        assert not waiting.done()
        answer.set()
        assert waiting.result(10).lease_id == "L99"


def test_many_threads_each_get_their_own_answers(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        while True:
            request = conn.request()
            conn.reply(request, same=request.get("ours"))

    def ask(client: libclient.Client, thread: int) -> None:
        for turn in range(200):
            ours = [thread, turn]
            assert client.call("echo", ours=ours)["same"] == ours

    with (
        FakeDaemon(tmp_path, script) as daemon,
        libclient.connect(daemon.path) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        for done in [pool.submit(ask, client, thread) for thread in range(8)]:
            done.result(60)


def test_the_lead_goes_on_when_its_thread_gives_up(tmp_path: Path) -> None:
    answer = threading.Event()
    with (
        FakeDaemon(tmp_path, makes_leases_wait(answer)) as daemon,
        libclient.connect(daemon.path) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        # The first leads, the second follows; the first runs out of time.
        first = pool.submit(client.call, "lease", timeout_s=0.3, agent="a", wait_s=60)
        daemon.wait_for_op("lease")
        second = pool.submit(client.call, "lease", agent="b", wait_s=60)
        daemon.wait_for_op("lease", 2)
        with pytest.raises(Unavailable) as late:
            first.result(10)
        assert late.value.reason == "TIMEOUT"
        answer.set()
        assert second.result(10)["granted"] is True


def test_a_thread_that_follows_runs_out_of_time_by_itself(tmp_path: Path) -> None:
    answer = threading.Event()
    with (
        FakeDaemon(tmp_path, makes_leases_wait(answer)) as daemon,
        libclient.connect(daemon.path) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        leads = pool.submit(client.lease, "analyst", wait_s=60)
        daemon.wait_for_op("lease")
        start_s = time.monotonic()
        with pytest.raises(Unavailable, match="in time"):
            client.call("lease", timeout_s=0.3, agent="b", wait_s=60)
        assert time.monotonic() - start_s < 2
        answer.set()
        assert leads.result(10).granted
        daemon.wait_for_op("release")


def test_closing_a_client_wakes_the_threads_inside_it(tmp_path: Path) -> None:
    answer = threading.Event()
    with (
        FakeDaemon(tmp_path, makes_leases_wait(answer)) as daemon,
        ThreadPoolExecutor(2) as pool,
    ):
        client = libclient.connect(daemon.path)
        waiting = [pool.submit(client.lease, "analyst", wait_s=600) for _ in range(2)]
        daemon.wait_for_op("lease", 2)
        client.close()
        assert [lease.result(10).reason for lease in waiting] == ["CLOSED", "CLOSED"]
        assert client.closed
        daemon.wait_for_hangup()
        assert client.fileno() == -1


def test_a_client_that_never_held_anything_has_no_thread(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        while True:
            conn.reply(conn.request(), **denial_fields())

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        client.call("health")
        assert not client.lease("analyst").granted
        assert keeper_threads() == []


def test_a_process_has_one_thread_for_all_its_leases(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        with libclient.lease("a", socket=daemon.path), libclient.lease("b", socket=daemon.path):
            assert keeper_threads() == ["gpuorch-keeper"]
        KEEPER.stop()
        assert keeper_threads() == []


def test_the_thread_reads_while_the_caller_computes(tmp_path: Path) -> None:
    revoke = threading.Event()

    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields())
        revoke.wait(20)
        conn.event("lease.revoking", lease_id="L1", reason="admin", deadline_s=10.0)
        conn.reply(conn.expect("release"))
        conn.wait_for_end()

    events: list[dict[str, Any]] = []
    with FakeDaemon(tmp_path, script) as daemon:
        with libclient.lease("analyst", socket=daemon.path, on_event=events.append) as lease:
            assert (lease.revoking, lease.deadline) == (False, None)
            revoke.set()
            wait_for(lambda: bool(events), "the event")
            assert (lease.revoking, lease.deadline) == (True, 1_010.0)
        assert lease.ended == "released"


def test_a_handler_may_release_its_lease(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields())
        conn.event("lease.revoking", lease_id="L1", reason="admin", deadline_s=10.0)
        conn.reply(conn.expect("release"))
        conn.wait_for_end()

    lease: libclient.Lease
    asked = threading.Event()

    def yield_it(event: dict[str, Any]) -> None:
        asked.wait(20)
        lease.release()

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("analyst", on_event=yield_it)
        asked.set()
        daemon.wait_for_op("release")
        wait_for(lambda: lease.ended == "released", "the release")


def test_a_handler_that_fails_is_reported_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields())
        conn.event("lease.over_limit", lease_id="L1", used_mb=2, leased_mb=1)
        conn.event("lease.revoking", lease_id="L1", reason="admin", deadline_s=10.0)
        conn.wait_for_end()

    reported: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(str(args.exc_value)))

    def fail(event: dict[str, Any]) -> None:
        raise ValueError(event["event"])

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        client.lease("analyst", on_event=fail)
        wait_for(lambda: len(reported) == 2, "both reports")
    assert reported == ["lease.over_limit", "lease.revoking"]


def test_a_ttl_is_renewed_while_the_caller_computes(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        now = 1_000.0
        conn.reply(conn.expect("lease"), **grant_fields(timestamp=now, expires_at=now + 0.3))
        while True:
            request = conn.request()
            now += 0.1
            conn.reply(request, expires_at=now + 0.3)

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("analyst")
        daemon.wait_for_op("renew", 3)
        assert lease.live
        assert lease.expires_at is not None
        assert lease.expires_at > 1_000.3
        lease.release()
        before = daemon.ops().count("renew")
        client.call("health")
        assert daemon.ops().count("renew") == before


def test_a_ttl_is_renewed_while_another_thread_waits(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        now = 1_000.0
        conn.reply(conn.expect("lease"), **grant_fields(timestamp=now, expires_at=now + 0.3))
        waiting = conn.expect("lease")
        for _ in range(3):
            now += 0.1
            conn.reply(conn.expect("renew"), expires_at=now + 0.3)
        conn.reply(waiting, **denial_fields("TIMEOUT"))
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("analyst")
        assert client.lease("analyst", wait_s=60).reason == "TIMEOUT"
        assert lease.live


def test_a_ttl_that_begins_while_another_thread_waits_is_renewed(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        now = 1_000.0
        waiting = conn.expect("lease")
        conn.reply(conn.expect("lease"), **grant_fields(timestamp=now, expires_at=now + 0.3))
        for _ in range(3):
            now += 0.1
            conn.reply(conn.expect("renew"), expires_at=now + 0.3)
        conn.reply(waiting, **denial_fields("TIMEOUT"))
        conn.wait_for_end()

    with (
        FakeDaemon(tmp_path, script) as daemon,
        libclient.connect(daemon.path) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(client.lease, "analyst", wait_s=60)
        daemon.wait_for_op("lease")
        lease = client.lease("analyst")
        assert waiting.result(20).reason == "TIMEOUT"
        assert lease.live


def test_events_are_iterated_while_other_threads_ask(tmp_path: Path) -> None:
    more = threading.Event()

    def script(conn: Served) -> None:
        conn.reply(conn.expect("subscribe"), subscription=1, seq=0)
        conn.send(event="gpu.cordoned", subscription=1, seq=1, time=0.0)
        conn.reply(conn.expect("health"))
        more.wait(20)
        conn.send(event="gpu.uncordoned", subscription=1, seq=2, time=0.0)
        conn.reply(conn.expect("unsubscribe"))
        conn.wait_for_end()

    with (
        FakeDaemon(tmp_path, script) as daemon,
        libclient.connect(daemon.path) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        with client.events(["gpu.*"]) as events:
            assert next(events)["event"] == "gpu.cordoned"
            waiting = pool.submit(next, events)
            client.call("health")
            more.set()
            assert waiting.result(10)["event"] == "gpu.uncordoned"
        assert daemon.requests[0]["topics"] == ["gpu.*"]
        with pytest.raises(Unavailable):
            next(events)


def test_an_iterator_ends_with_its_connection(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("subscribe"), subscription=1, seq=0)

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        events = client.events()
        with pytest.raises(Unavailable, match="closed the connection"):
            next(events)


def test_leases_end_with_the_last_object_that_knows_of_them(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        code = (
            "import gc, libclient, select, sys, warnings\n"
            "warnings.simplefilter('ignore', ResourceWarning)\n"
            "lease = libclient.lease('analyst', socket=sys.argv[1])\n"
            "assert lease.granted\n"
            "del lease\n"
            "print('dropped', flush=True)\n"
            "while not select.select([sys.stdin], [], [], 0.02)[0]:\n"
            "    gc.collect()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, daemon.path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"dropped\n"
            daemon.wait_for_hangup()
            child.communicate()


EXITS = {
    "holding": "lease = libclient.lease('a', socket=sys.argv[1]); assert lease.granted",
    "holding and waiting in a thread": (
        "client = libclient.connect(sys.argv[1]); lease = client.lease('a')\n"
        "waits = threading.Thread(target=client.lease, args=('b',), kwargs={'wait_s': 600},"
        " daemon=True)\n"
        "waits.start()"
    ),
    "with a handler that never returns": (
        "inside = threading.Event()\n"
        "def handler(event):\n"
        "    inside.set(); threading.Event().wait()\n"
        "lease = libclient.lease('a', socket=sys.argv[1], on_event=handler)\n"
        "inside.wait(20)"
    ),
    "releasing at exit": (
        "import atexit\n"
        "lease = libclient.lease('a', socket=sys.argv[1])\n"
        "atexit.register(lease.release)"
    ),
}


@pytest.mark.parametrize("code", EXITS.values(), ids=EXITS)
def test_a_process_ends_when_its_program_does(tmp_path: Path, code: str) -> None:
    def script(conn: Served) -> None:
        while True:
            request = conn.request()
            if request["op"] == "release":
                conn.reply(request)
            elif not request.get("wait_s"):
                conn.reply(request, **grant_fields())
                conn.event("lease.over_limit", lease_id="L1", used_mb=2, leased_mb=1)

    with FakeDaemon(tmp_path, script) as daemon:
        done = subprocess.run(
            [sys.executable, "-c", f"import libclient, sys, threading\n{code}", daemon.path],
            cwd=ROOT,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        daemon.wait_for_hangup()
