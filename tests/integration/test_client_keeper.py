"""The library's thread outlives whatever handlers, hooks and connections do to it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import libclient
from libclient.exchange import Exchange
from libclient.keeper import KEEPER
from tests.support.proxy import FakeDaemon, Served, grant_everything, grant_fields, wait_for


def revokes(tell: threading.Event) -> Callable[[Served], None]:
    """Grant one lease; when told to, say that it is to be given back, and then that it is over."""

    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields())
        tell.wait(20)
        conn.event("lease.revoking", lease_id="L1", reason="admin", deadline_s=10.0)
        conn.event("lease.revoked", lease_id="L1", reason="admin")
        conn.wait_for_end()

    return script


def exits(event: dict[str, Any]) -> None:
    sys.exit(3)


def interrupts(event: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def fails(event: dict[str, Any]) -> None:
    raise ValueError(event["event"])


@pytest.fixture
def silent_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


@pytest.mark.usefixtures("silent_hook")
@pytest.mark.parametrize("handler", [exits, interrupts, fails])
def test_no_handler_ends_the_thread_that_others_rely_on(
    tmp_path: Path, handler: Callable[[dict[str, Any]], None]
) -> None:
    tell = threading.Event()
    with (
        FakeDaemon(tmp_path, revokes(tell)) as daemon,
        libclient.connect(daemon.path) as client,
    ):
        called: list[str] = []

        def listen(event: dict[str, Any]) -> None:
            called.append(event["event"])
            handler(event)

        lease = client.lease("analyst", on_event=listen)
        tell.set()
        wait_for(lambda: called == ["lease.revoking", "lease.revoked"], "both events")
        assert lease.ended == "revoked: admin"
        assert KEEPER.running


def test_a_hook_for_exceptions_that_fails_itself_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def hook(args: object) -> None:
        raise RuntimeError("the hook is broken")

    monkeypatch.setattr(threading, "excepthook", hook)
    tell = threading.Event()
    with (
        FakeDaemon(tmp_path, revokes(tell)) as daemon,
        libclient.connect(daemon.path) as client,
    ):
        lease = client.lease("analyst", on_event=fails)
        tell.set()
        wait_for(lambda: lease.ended is not None, "the end of the lease")
        wait_for(lambda: "ValueError: lease.revoked" in capfd.readouterr().err, "the report")
        assert KEEPER.running


def test_a_connection_whose_turn_fails_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(str(args.exc_value)))
    on_ready = Exchange.on_ready

    def fail_once(exchange: Exchange) -> None:
        monkeypatch.setattr(Exchange, "on_ready", on_ready)
        raise MemoryError("no memory for this turn")

    monkeypatch.setattr(Exchange, "on_ready", fail_once)
    tell = threading.Event()
    with (
        FakeDaemon(tmp_path, revokes(tell)) as daemon,
        libclient.connect(daemon.path) as client,
    ):
        lease = client.lease("analyst")
        tell.set()
        wait_for(lambda: lease.ended is not None, "the end of the lease")
    assert reported == ["no memory for this turn"]


def test_a_renewal_whose_turn_fails_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    renew_due = Exchange.renew_due

    def fail_once(exchange: Exchange, now_s: float) -> float | None:
        monkeypatch.setattr(Exchange, "renew_due", renew_due)
        raise MemoryError("no memory for this turn")

    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields(expires_at=1_003.0))
        while True:
            conn.reply(conn.request(), expires_at=1_010.0)

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        monkeypatch.setattr(Exchange, "renew_due", fail_once)
        lease = client.lease("analyst")
        daemon.wait_for_op("renew")
        assert lease.live


def test_a_thread_that_is_gone_is_started_again(tmp_path: Path) -> None:
    tell = threading.Event()
    with (
        FakeDaemon(tmp_path, grant_everything, revokes(tell)) as daemon,
        libclient.connect(daemon.path) as first,
        libclient.connect(daemon.path) as second,
    ):
        first.lease("analyst")
        KEEPER.stop()
        # As if it had died, and not been told to end.
        dead = threading.Thread(target=int)
        dead.start()
        dead.join()
        KEEPER._thread = dead
        lease = second.lease("analyst")
        assert KEEPER.running
        tell.set()
        wait_for(lambda: lease.ended is not None, "the end of the lease")


def test_a_ttl_of_months_is_slept_through(tmp_path: Path) -> None:
    failed: list[object] = []
    tell = threading.Event()
    hundred_days_s = 100 * 86_400.0

    def script(conn: Served) -> None:
        request = conn.expect("lease")
        conn.reply(request, **grant_fields(expires_at=1_000.0 + hundred_days_s))
        tell.wait(20)
        conn.event("lease.revoked", lease_id="L1", reason="admin")
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("analyst", on_event=failed.append)
        # The thread has gone to sleep, and is woken by what comes.
        wait_for(lambda: KEEPER.running, "the thread")
        tell.set()
        wait_for(lambda: lease.ended is not None, "the end of the lease")
        assert KEEPER.running
    assert len(failed) == 1


def test_what_a_caller_left_behind_goes_out_although_the_daemon_says_nothing(
    tmp_path: Path,
) -> None:
    read_on = threading.Event()

    def script(conn: Served) -> None:
        # Silent and deaf, until it reads; and it never says a word.
        read_on.wait(20)
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        # More than the socket takes, and then a wait that its caller gives up.
        for _ in range(20):
            with pytest.raises(libclient.Unavailable):
                client.call("explain", timeout_s=0.02, agent="a", purpose="x" * 60_000)
        with pytest.raises(libclient.Unavailable):
            client.call("lease", timeout_s=0.05, agent="a", wait_s=600)
        assert client.exchange.session.outgoing
        read_on.set()
        daemon.wait_for_op("cancel")


def test_what_a_caller_left_behind_goes_out_while_another_waits(tmp_path: Path) -> None:
    read_on = threading.Event()

    def script(conn: Served) -> None:
        conn.expect("lease")
        read_on.wait(20)
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon:
        client = libclient.connect(daemon.path)
        waits = threading.Thread(target=client.lease, args=("a",), kwargs={"wait_s": 600})
        waits.start()
        daemon.wait_for_op("lease")
        for _ in range(20):
            with pytest.raises(libclient.Unavailable):
                client.call("explain", timeout_s=0.02, agent="a", purpose="x" * 60_000)
        with pytest.raises(libclient.Unavailable):
            client.call("lease", timeout_s=0.05, agent="b", wait_s=600)
        assert client.exchange.session.outgoing
        read_on.set()
        daemon.wait_for_op("cancel")
        client.close()
        waits.join()
