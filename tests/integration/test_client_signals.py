"""Signal handlers that use the client while the main thread is inside it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import libclient
from libclient.errors import Unavailable
from libclient.exchange import Exchange
from libclient.keeper import KEEPER
from tests.support.interrupts import interrupt_at
from tests.support.proxy import FakeDaemon, Served, denial_fields, grant_fields, wait_for

# recvfrom and poll, by their numbers on the two architectures that have such GPUs.
WAITING = {"x86_64": {"45", "7"}, "aarch64": {"207", "73"}}[os.uname().machine]

SENDING = Exchange._flush.__code__


def system_call(thread_id: int) -> str:
    """Return the number of the system call that a thread of this process is in."""
    return Path(f"/proc/self/task/{thread_id}/syscall").read_text().split()[0]


@contextmanager
def on_signal(handler: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Call `handler` in the main thread for a signal; give what sends it."""
    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: handler())
    try:
        yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_releases_during_a_wait_is_not_held_up_for_good(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields())
        waiting = conn.expect("lease")
        wait_for(lambda: system_call(thread_id) in WAITING, "the wait for the answer")
        send()
        conn.reply(conn.expect("release"))
        conn.reply(waiting, **denial_fields("TIMEOUT"))
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("held")
        thread_id = threading.get_native_id()
        start_s = time.monotonic()
        with on_signal(lease.release) as send:
            assert client.lease("more", wait_s=60).reason == "TIMEOUT"
        assert time.monotonic() - start_s < 5
        assert lease.ended == "released"


def test_a_handler_that_strikes_in_the_middle_of_the_client_is_told(tmp_path: Path) -> None:
    faults: list[Unavailable] = []

    def use_it() -> None:
        try:
            client.call("health")
        except Unavailable as fault:
            faults.append(fault)

    with FakeDaemon(tmp_path) as daemon, libclient.connect(daemon.path) as client:
        encode = client.exchange.session._encode

        def strike(message: object) -> bytes:
            client.exchange.session._encode = encode
            use_it()
            return encode(message)  # type: ignore[arg-type]  # whatever it was

        client.exchange.session._encode = strike
        # The call inside takes its whole 2 s; the one around it has more.
        assert client.call("health", timeout_s=20.0) == {}
    assert [fault.reason for fault in faults] == ["TIMEOUT"]
    assert "interrupted" in str(faults[0])


def test_an_interrupt_at_any_step_of_sending_ends_no_lease_and_sends_nothing_twice(
    tmp_path: Path,
) -> None:
    with FakeDaemon(tmp_path) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("analyst")
        steps = 0
        while True:
            with suppress(KeyboardInterrupt), interrupt_at(steps, SENDING) as struck:
                client.call("health", step=steps)
            if not struck():
                break
            steps += 1
            client.call("ready")
            assert lease.live
        assert steps > 40
        asked = [request["step"] for request in daemon.requests if request["op"] == "health"]
        assert asked == sorted(set(asked))
        assert client.exchange.session.ended is None
        lease.release()
        assert lease.ended == "released"


def test_an_interrupted_caller_holds_nothing(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        waiting = conn.expect("lease")
        signal.pthread_kill(main, signal.SIGINT)
        cancel = conn.expect("cancel")
        assert cancel["request_id"] == waiting["id"]
        conn.wait_for_end()

    main = threading.get_ident()
    with FakeDaemon(tmp_path, script) as daemon, libclient.connect(daemon.path) as client:
        with pytest.raises(KeyboardInterrupt):
            client.lease("analyst", wait_s=60)
        daemon.wait_for_op("cancel")


def test_an_interrupted_caller_closes_the_connection_that_was_its_own(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.expect("lease")
        signal.pthread_kill(main, signal.SIGINT)
        conn.wait_for_end()

    main = threading.get_ident()
    with FakeDaemon(tmp_path, script) as daemon:
        with pytest.raises(KeyboardInterrupt):
            libclient.lease("analyst", wait_s=60, socket=daemon.path)
        daemon.wait_for_hangup()


def test_a_handler_may_take_a_lease_while_the_librarys_thread_is_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[libclient.Lease] = []
    start = threading.Thread.start

    def start_and_strike(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "gpuorch-keeper":
            monkeypatch.setattr(threading.Thread, "start", start)
            send()

    with FakeDaemon(tmp_path) as daemon:
        # Before the daemon's threads are started it would strike for them.
        monkeypatch.setattr(threading.Thread, "start", start_and_strike)
        start_s = time.monotonic()
        with (
            on_signal(lambda: taken.append(libclient.lease("b", socket=daemon.path))) as send,
            libclient.lease("a", socket=daemon.path) as lease,
        ):
            assert lease.granted
        assert time.monotonic() - start_s < 1.5
        assert [one.granted for one in taken] == [True]
        assert len([one for one in threading.enumerate() if one.name == "gpuorch-keeper"]) == 1
        taken[0].release()


def test_a_handler_that_strikes_in_the_middle_of_the_keeper_is_for_the_cpu_in_time(
    tmp_path: Path,
) -> None:
    taken: list[libclient.Lease] = []

    def use_it() -> None:
        taken.append(libclient.lease("b", socket=daemon.path))

    with FakeDaemon(tmp_path) as daemon, on_signal(use_it) as send:
        # As if the thread were inside `adopt`.
        with KEEPER._lock:
            start_s = time.monotonic()
            send()
            wait_for(lambda: bool(taken), "the handler")
            assert time.monotonic() - start_s < 5
        assert [one.granted for one in taken] == [False]
        assert (taken[0].device, taken[0].reason) == ("cpu", "TIMEOUT")
        assert taken[0].env == {"CUDA_VISIBLE_DEVICES": ""}
        daemon.wait_for_hangup()


def test_a_handler_that_has_a_lock_for_long_holds_up_no_other_clients_renewals(
    tmp_path: Path,
) -> None:
    def script(conn: Served) -> None:
        now = 1_000.0
        conn.reply(conn.expect("lease"), **grant_fields(timestamp=now, expires_at=now + 0.6))
        while True:
            request = conn.request()
            now += 0.2
            conn.reply(request, expires_at=now + 0.6)

    with (
        FakeDaemon(tmp_path, script) as daemon,
        libclient.connect(daemon.path) as first,
        libclient.connect(daemon.path) as second,
    ):
        lease, other = first.lease("a"), second.lease("b")
        # As if a handler had struck in the middle of the first.
        with first.exchange._lock:
            daemon.wait_for_op("renew", 4)
            assert other.live
        assert lease.granted


def test_what_an_interrupted_thread_had_sent_is_not_sent_again_by_another(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, libclient.connect(daemon.path) as client:
        exchange = client.exchange
        lease = client.lease("analyst")
        with exchange._lock:
            # As an interrupt leaves it that strikes right after the sending.
            session = exchange.session
            ticket = session.ask("health", {})
            session.sending = session.outgoing
            session.sent[:] = [exchange._send(session.outgoing)]
        # The library's thread has the next turn, and the interrupted one comes after it.
        exchange.on_ready()
        client.call("ready")
        assert ticket.done
        assert daemon.ops() == ["lease", "health", "ready"]
        assert lease.live


def test_what_was_asked_since_an_interrupt_goes_out_once_and_whole(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, libclient.connect(daemon.path) as client:
        exchange = client.exchange
        with exchange._lock:
            session = exchange.session
            session.ask("health", {})
            session.sending = session.outgoing
            session.sent[:] = [exchange._send(session.outgoing[:3])]
        client.call("ready")
        assert daemon.ops() == ["health", "ready"]
