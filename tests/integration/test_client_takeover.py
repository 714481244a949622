"""The blocking client while its daemon is replaced and the connections are kept."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libclient
from libclient.cli.holding import Holding
from tests.support.proxy import FakeDaemon, Served, grant_fields, wait_for


def test_a_restart_is_not_seen_by_the_one_who_waits(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        waiting = conn.expect("lease")
        assert conn.take_over(1) == b""
        assert conn.request() == waiting
        assert conn.take_over(2) == b""
        assert conn.request() == waiting
        conn.reply(waiting, **grant_fields(1))
        conn.reply(conn.expect("release"))
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon:
        with libclient.lease("analyst", socket=daemon.path, wait_s=60) as lease:
            assert lease.granted
        assert daemon.ops() == ["lease"] * 3 + ["release"]


def test_a_holder_that_computes_answers_a_restart_and_holds_on(tmp_path: Path) -> None:
    resumed = threading.Event()

    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields(1))
        for number in range(1, 4):
            assert conn.take_over(number) == b""
        resumed.set()
        conn.reply(conn.expect("release"))
        conn.wait_for_end()

    events: list[str] = []
    with (
        FakeDaemon(tmp_path, script) as daemon,
        libclient.lease(
            "analyst", socket=daemon.path, on_event=lambda event: events.append(event["event"])
        ) as lease,
    ):
        assert resumed.wait(20)
        assert lease.live
        wait_for(lambda: len(events) == 3, "the news")
        assert events == ["daemon.resumed"] * 3


def test_what_was_asked_of_the_old_process_by_all_threads_is_answered_by_the_new_one(
    tmp_path: Path,
) -> None:
    def script(conn: Served) -> None:
        before = [conn.request() for _ in range(4)]
        conn.reply(before[1], ours=before[1]["ours"])
        conn.take_over()
        again = [conn.request() for _ in range(3)]
        assert again == [before[0], before[2], before[3]]
        for request in again:
            conn.reply(request, ours=request["ours"])
        conn.wait_for_end()

    with (
        FakeDaemon(tmp_path, script) as daemon,
        libclient.connect(daemon.path) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        calls = [pool.submit(client.call, "echo", ours=number) for number in range(4)]
        assert [call.result(20)["ours"] for call in calls] == [0, 1, 2, 3]


def test_a_request_that_was_cut_in_two_by_the_restart_is_sent_whole(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        wait_for(lambda: bool(client.exchange.session.outgoing), "a request that does not fit")
        discarded = conn.take_over()
        assert discarded, "nothing had been sent"
        for _ in range(12):
            request = conn.request()
            conn.reply(request, size=len(request["text"]))
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon, ThreadPoolExecutor(12) as pool:
        client = libclient.connect(daemon.path)
        text = "t" * 60_000
        calls = [pool.submit(client.call, "echo", text=text, timeout_s=20.0) for _ in range(12)]
        assert [call.result(20)["size"] for call in calls] == [60_000] * 12
        client.close()


def test_a_thousand_restarts_cost_neither_memory_nor_descriptors(tmp_path: Path) -> None:
    done = threading.Event()

    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields(1))
        for number in range(1_000):
            conn.take_over(number % 200)
        done.set()
        conn.reply(conn.expect("release"))
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("analyst")
        before = len(os.listdir("/proc/self/fd"))
        assert done.wait(60)
        assert lease.live
        assert len(os.listdir("/proc/self/fd")) == before
        # Its answer has come, so whatever the client's own thread did before is done.
        lease.release()
        session = client.exchange.session
        assert (session.pending, session.repeats, session.outgoing) == ({}, {}, b"")


def test_a_command_that_waits_for_its_lease_waits_on_through_a_restart(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        waiting = conn.expect("lease")
        conn.take_over()
        assert conn.request() == waiting
        conn.reply(waiting, **grant_fields(1))
        seal = conn.expect("seal")
        conn.take_over(2)
        assert conn.request() == seal
        conn.reply(seal)
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon:
        holding = Holding(daemon.path, 5.0)
        decision = holding.ask({"agent": "run", "wait_s": 60}, lambda _: None, lambda: None)
        assert decision.granted
        holding.seal(None)
        os.close(holding.hand_on())
        assert decision.live
