"""The blocking client while its daemon is killed, absent, and started again."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import libclient
from libclient import absence
from libclient.errors import Unavailable
from libclient.keeper import KEEPER
from tests.integration.test_client_fork import in_forked_child
from tests.support.proxy import (
    FakeDaemon,
    Script,
    Served,
    denial_fields,
    grant_everything,
    grant_fields,
    wait_for,
)


def reattaches(conn: Served, number: int = 1) -> None:
    """Give one lease back to its owner."""
    request = conn.expect("reattach")
    assert request["token"] == f"secret-{number}"
    conn.reply(request, **grant_fields(number))


def grants_and_goes(go: threading.Event) -> Script:
    """Grant one lease; end the connection when told to."""

    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields(1))
        go.wait(20)

    return script


def grants_and_stays(conn: Served) -> None:
    """Grant one lease; the connection ends with the daemon, which is not there any more then."""
    conn.reply(conn.expect("lease"), **grant_fields(1))
    conn.wait_for_end()


def reattaches_and_stays(conn: Served) -> None:
    reattaches(conn)
    grant_everything(conn, held=1)


# -- the connection was lost


def test_a_lease_comes_back_with_nobody_asking(tmp_path: Path) -> None:
    gone = threading.Event()
    events: list[str] = []
    with (
        FakeDaemon(tmp_path, grants_and_goes(gone), reattaches_and_stays) as daemon,
        libclient.connect(daemon.path) as client,
    ):
        lease = client.lease("analyst", on_event=lambda event: events.append(event["event"]))
        gone.set()
        daemon.wait_for_op("reattach")
        wait_for(lambda: not lease.detached, "the lease")
        assert lease.live
        wait_for(lambda: bool(events), "the news")
        assert events == ["connection.resumed"]
        assert not client.closed
        lease.release()
        assert daemon.ops() == ["lease", "reattach", "release"]


def test_a_lease_lives_while_no_daemon_is_there_and_is_reattached_when_one_is(
    tmp_path: Path,
) -> None:
    with FakeDaemon(tmp_path, grants_and_stays) as daemon:
        client = libclient.connect(daemon.path)
        leases = [client.lease("analyst")]
    wait_for(lambda: leases[0].detached, "the news")
    (tmp_path / "fake.sock").unlink()
    away = client.exchange.session.away
    # The first tries follow each other closely; it is a patient one that finds the daemon.
    wait_for(lambda: away is not None and away.tries >= 8, "the first tries")
    assert leases[0].live
    assert not client.closed
    with FakeDaemon(tmp_path, reattaches_and_stays) as daemon:
        daemon.wait_for_op("reattach")
        wait_for(lambda: not leases[0].detached, "the lease")
        assert client.call("health") == {}
        client.close()
    assert leases[0].ended == "closed"


@pytest.mark.parametrize("code", ["unknown_token", "not_owner"])
def test_a_lease_that_is_not_given_back_is_over_and_the_client_goes_on(
    tmp_path: Path, code: str
) -> None:
    gone = threading.Event()

    def refuses(conn: Served) -> None:
        conn.refuse(conn.expect("reattach"), code)
        grant_everything(conn)

    events: list[dict[str, Any]] = []
    with (
        FakeDaemon(tmp_path, grants_and_goes(gone), refuses) as daemon,
        libclient.connect(daemon.path) as client,
    ):
        lease = client.lease("analyst", on_event=events.append)
        gone.set()
        wait_for(lambda: bool(events), "the news")
        assert str(lease.ended).startswith("lost: ")
        assert events[0]["event"] == "connection.lost"
        lease.release()
        assert client.lease("analyst").granted
        assert daemon.ops() == ["lease", "reattach", "lease"]


def test_threads_that_wait_are_asked_for_again_beside_the_leases(tmp_path: Path) -> None:
    def first(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields(1))
        for _ in range(3):
            assert conn.expect("lease")["wait_s"] == 60

    def second(conn: Served) -> None:
        reattaches(conn)
        for number in range(2, 5):
            request = conn.expect("lease")
            assert 50 < request["wait_s"] <= 60
            conn.reply(request, **grant_fields(number))
        grant_everything(conn, held=4)

    with (
        FakeDaemon(tmp_path, first, second) as daemon,
        libclient.connect(daemon.path) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        held = client.lease("analyst")
        waiting = [pool.submit(client.lease, "analyst", wait_s=60) for _ in range(3)]
        leases = [one.result(20) for one in waiting]
        assert all(lease.live for lease in leases)
        assert held.live
        assert {lease.lease_id for lease in leases} == {"L2", "L3", "L4"}


def test_a_question_is_answered_by_the_next_daemon_and_a_change_is_not_made_twice(
    tmp_path: Path,
) -> None:
    def asked_for(conn: Served) -> None:
        conn.request()

    with (
        FakeDaemon(tmp_path, asked_for, asked_for, grant_everything) as daemon,
        libclient.connect(daemon.path) as client,
    ):
        assert client.call("health") == {}
    with (
        FakeDaemon(tmp_path, asked_for, grant_everything) as daemon,
        libclient.connect(daemon.path) as client,
    ):
        with pytest.raises(Unavailable, match="closed the connection"):
            client.call("cordon", gpu=0)
        assert daemon.ops() == ["cordon"]
        assert client.call("cordon", gpu=0) == {}


def test_a_client_whose_daemon_went_away_unseen_is_answered_by_the_next(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        client = libclient.connect(daemon.path)
        client.call("health")
    with FakeDaemon(tmp_path) as daemon:
        assert client.call("cordon", gpu=0) == {}
        assert client.lease("analyst").granted
        assert daemon.ops() == ["cordon", "lease"]
        client.close()


def test_a_lease_that_is_released_while_the_daemon_is_away_does_not_come_back(
    tmp_path: Path,
) -> None:
    def first(conn: Served) -> None:
        for number in (1, 2):
            conn.reply(conn.expect("lease"), **grant_fields(number))
        conn.wait_for_end()

    with FakeDaemon(tmp_path, first) as daemon:
        client = libclient.connect(daemon.path)
        kept, given_back = client.lease("a"), client.lease("b")
    wait_for(lambda: given_back.detached, "the news")
    start_s = time.monotonic()
    given_back.release()
    assert time.monotonic() - start_s < 0.5
    assert given_back.ended == "released"
    with FakeDaemon(tmp_path, reattaches_and_stays) as daemon:
        daemon.wait_for_op("release")
        assert {"op": "release", "token": "secret-2"}.items() <= daemon.requests[1].items()
        assert daemon.ops() == ["reattach", "release"]
        assert kept.live
        client.close()


def test_the_callers_close_ends_the_search(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, grants_and_stays) as daemon:
        client = libclient.connect(daemon.path)
        lease = client.lease("analyst")
    wait_for(lambda: lease.detached, "the news")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.lease, "other", wait_s=600)
        wait_for(lambda: len(client.exchange.session.pending) == 1, "the one who waits")
        client.close()
        assert waiting.result(10).reason == "CLOSED"
    assert lease.ended == "closed"
    with FakeDaemon(tmp_path) as daemon:
        with pytest.raises(Unavailable, match="was closed"):
            client.call("health")
        assert daemon.ops() == []


def test_a_forked_child_does_not_look_for_its_parents_daemon(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, grants_and_stays) as daemon:
        client = libclient.connect(daemon.path)
        lease = client.lease("analyst")
    wait_for(lambda: lease.detached, "the news")

    def check() -> None:
        with pytest.raises(libclient.ForkedClient):
            client.call("health")
        assert not KEEPER.running
        assert client.closed

    in_forked_child(check)
    with FakeDaemon(tmp_path, reattaches_and_stays) as daemon:
        daemon.wait_for_op("reattach")
        client.close()


# -- in time


@pytest.mark.serial
def test_no_daemon_is_the_cpu_within_two_seconds_and_at_once_when_it_is_long_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeDaemon(tmp_path) as daemon:
        client = libclient.connect(daemon.path)
        client.call("health")
    start_s = time.monotonic()
    assert client.lease("analyst").reason == "NO_DAEMON"
    assert 1.9 < time.monotonic() - start_s < 2.8
    monkeypatch.setattr(absence, "RESTART_S", 0.0)
    start_s = time.monotonic()
    lease = client.lease("analyst", wait_s=60)
    assert (lease.reason, lease.device) == ("NO_DAEMON", "cpu")
    assert "nobody answers" in lease.detail
    with pytest.raises(Unavailable, match="nobody answers"):
        client.call("health")
    assert time.monotonic() - start_s < 1
    assert client.exchange.session.outgoing == b""
    with FakeDaemon(tmp_path):
        assert client.lease("analyst").granted
        client.close()


def test_a_daemon_that_comes_back_within_the_time_limit_answers(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        client = libclient.connect(daemon.path)
        client.call("health")
    with ThreadPoolExecutor(2) as pool:
        calls: list[Future[Any]] = [
            pool.submit(client.lease, "analyst"),
            pool.submit(client.call, "health"),
        ]
        wait_for(lambda: len(client.exchange.session.pending) == 2, "both")
        with FakeDaemon(tmp_path) as daemon:
            for call in calls:
                call.result(10)
            assert sorted(daemon.ops()) == ["health", "lease"]
            client.close()


def test_a_silent_socket_costs_the_caller_its_two_seconds_and_no_lease(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, grants_and_stays) as daemon:
        client = libclient.connect(daemon.path)
        lease = client.lease("analyst")
        path = daemon.path
    wait_for(lambda: lease.detached, "the news")
    os.unlink(path)
    # As the service manager's socket is while the daemon does not start.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(8)
        assert client.lease("other").reason == "TIMEOUT"
        assert lease.live
        conn, _ = listener.accept()
        with conn:
            served = Served(conn, [])
            reattaches(served)
            late = served.expect("lease")
            assert served.expect("cancel")["request_id"] == late["id"]
            served.reply(late, **denial_fields("CANCELLED"))
            wait_for(lambda: not lease.detached, "the lease")
            client.close()


@pytest.mark.serial
def test_waiting_for_a_daemon_costs_no_work(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, grants_and_stays) as daemon:
        client = libclient.connect(daemon.path)
        lease = client.lease("analyst")
    wait_for(lambda: lease.detached, "the news")
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(client.lease, "waits", wait_s=600)
        wait_for(lambda: len(client.exchange.session.pending) == 1, "the one who waits")
        start_s, used_s = time.monotonic(), time.process_time()
        # Others come and go meanwhile, which stirs the one who looks for the daemon.
        for _ in range(3):
            with pytest.raises(Unavailable):
                client.call("health", timeout_s=0.3)
        took_s = time.monotonic() - start_s
        assert time.process_time() - used_s < took_s / 10
        client.close()
        assert waiting.result(10).reason == "CLOSED"
