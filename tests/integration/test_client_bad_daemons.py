"""What a caller gets when the daemon is absent, silent, slow, mad or gone: the CPU, in time."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import libclient
from libclient.errors import NotGranted, Unavailable
from libclient.wire.framing import HEADER, MAX_REPLY_BYTES
from tests.support.proxy import (
    FakeDaemon,
    Script,
    Served,
    grant_everything,
    grant_fields,
    wait_for,
)

# The promise is 2 s in all. What the machine adds while it is busy with other tests is not the
# client's; where time itself is the question, the test runs alone and the slack is small.
IN_ALL_S = 2.0
SLACK_S = 2.0
SMALL_SLACK_S = 0.8


class Answer(NamedTuple):
    """What a caller sees of a lease."""

    granted: bool
    device: str
    reason: str
    env: dict[str, str]


def blocking_lease(path: str, **fields: Any) -> Answer:
    with libclient.lease("analyst", "2GiB", socket=path, **fields) as lease:
        return Answer(lease.granted, lease.device, lease.reason, lease.env)


def async_lease(path: str, **fields: Any) -> Answer:
    async def ask() -> Answer:
        async with libclient.aio.lease("analyst", "2GiB", socket=path, **fields) as lease:
            return Answer(lease.granted, lease.device, lease.reason, lease.env)

    return asyncio.run(ask())


Ask = Callable[..., Answer]
both = pytest.mark.parametrize("ask", [blocking_lease, async_lease], ids=["blocking", "async"])


class Clock(NamedTuple):
    """Since when."""

    start_s: float

    def assert_within(self, least_s: float, most_s: float) -> None:
        took_s = time.monotonic() - self.start_s
        assert least_s <= took_s <= most_s, f"took {took_s:.3f} s"


@pytest.fixture
def clock() -> Clock:
    return Clock(time.monotonic())


def silent(conn: Served) -> None:
    conn.wait_for_end()


def garbage(conn: Served) -> None:
    conn.request()
    conn.sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    conn.wait_for_end()


def huge(conn: Served) -> None:
    conn.request()
    conn.sock.sendall(HEADER.pack(MAX_REPLY_BYTES + 1))
    conn.wait_for_end()


def closes_unasked(conn: Served) -> None:
    conn.sock.close()


def closes_on_request(conn: Served) -> None:
    conn.request()


def closes_midway(conn: Served) -> None:
    conn.request()
    conn.sock.sendall(HEADER.pack(300) + b"\x83")


def answers_another(conn: Served) -> None:
    request = conn.request()
    conn.send(id=request["id"] + 1, ok=True, **grant_fields())
    conn.wait_for_end()


def half_a_grant(conn: Served) -> None:
    request = conn.request()
    conn.reply(request, granted=True, lease_id="L1")
    conn.wait_for_end()


def test_scripts_grant_when_nothing_is_wrong(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        assert blocking_lease(daemon.path).granted
        assert async_lease(daemon.path).granted
        assert daemon.ops() == ["lease", "release"] * 2


@both
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (garbage, "GARBAGE"),
        (huge, "GARBAGE"),
        (answers_another, "GARBAGE"),
        (half_a_grant, "GARBAGE"),
        (closes_unasked, "NO_DAEMON"),
        (closes_on_request, "NO_DAEMON"),
        (closes_midway, "NO_DAEMON"),
    ],
)
def test_an_answer_that_is_none_means_the_cpu_at_once(
    tmp_path: Path, clock: Clock, ask: Ask, script: Script, reason: str
) -> None:
    with FakeDaemon(tmp_path, script) as daemon:
        answer = ask(daemon.path, wait_s=60)
        assert answer == (False, "cpu", reason, {"CUDA_VISIBLE_DEVICES": ""})
        daemon.wait_for_hangup()
    clock.assert_within(0, IN_ALL_S)


@both
def test_no_socket_means_the_cpu_at_once(tmp_path: Path, clock: Clock, ask: Ask) -> None:
    assert ask(str(tmp_path / "none")).reason == "NO_DAEMON"
    clock.assert_within(0, 1)


@both
def test_a_socket_that_nobody_listens_on_means_the_cpu_at_once(
    tmp_path: Path, clock: Clock, ask: Ask
) -> None:
    with FakeDaemon(tmp_path) as daemon:
        path = daemon.path
    assert ask(path).reason == "NO_DAEMON"
    clock.assert_within(0, 1)


@both
def test_a_path_that_cannot_be_means_the_cpu_at_once(clock: Clock, ask: Ask) -> None:
    assert ask("/" + "x" * 200).reason == "NO_DAEMON"
    clock.assert_within(0, 1)


@both
def test_silence_means_the_cpu_after_two_seconds(tmp_path: Path, clock: Clock, ask: Ask) -> None:
    with FakeDaemon(tmp_path, silent) as daemon:
        assert ask(daemon.path).reason == "TIMEOUT"
        clock.assert_within(IN_ALL_S - 0.1, IN_ALL_S + SLACK_S)
        daemon.wait_for_hangup()


@both
def test_a_wait_comes_on_top_of_the_two_seconds(tmp_path: Path, clock: Clock, ask: Ask) -> None:
    with FakeDaemon(tmp_path, silent) as daemon:
        assert ask(daemon.path, wait_s=0.5).reason == "TIMEOUT"
    clock.assert_within(IN_ALL_S + 0.4, IN_ALL_S + 0.5 + SLACK_S)


@both
def test_a_byte_now_and_then_does_not_buy_time(tmp_path: Path, clock: Clock, ask: Ask) -> None:
    def drip(conn: Served) -> None:
        conn.request()
        conn.sock.settimeout(0.1)
        for byte in HEADER.pack(10_000) + b"\x85" * 10_000:
            conn.sock.sendall(bytes([byte]))
            try:
                if not conn.sock.recv(1):
                    return
            except TimeoutError:
                # Still there, and still waiting.
                continue

    with FakeDaemon(tmp_path, drip) as daemon:
        assert ask(daemon.path).reason == "TIMEOUT"
        clock.assert_within(IN_ALL_S - 0.1, IN_ALL_S + SLACK_S)


@both
def test_a_full_backlog_does_not_buy_time(tmp_path: Path, clock: Clock, ask: Ask) -> None:
    path = str(tmp_path / "full.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(path)
            assert ask(path).reason == "TIMEOUT"
    clock.assert_within(IN_ALL_S - 0.2, IN_ALL_S + SLACK_S)


@both
@pytest.mark.serial
def test_connecting_and_answering_share_one_time_limit(tmp_path: Path, ask: Ask) -> None:
    path = str(tmp_path / "late.sock")
    accepted: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)

        def accept_late() -> None:
            # The first fills the backlog: the second gets in only when it has left.
            accepted.append(listener.accept()[0])
            accepted.append(listener.accept()[0])

        timer = threading.Timer(1.5, accept_late)
        start_s = time.monotonic()
        timer.start()
        assert ask(path).reason == "TIMEOUT"
        Clock(start_s).assert_within(IN_ALL_S - 0.1, IN_ALL_S + SMALL_SLACK_S)
        timer.join()
    for sock in accepted:
        sock.close()


@pytest.fixture
def steady_signals() -> Iterator[list[int]]:
    """Deliver a signal with a handler every 20 ms."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    yield seen
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_signals_do_not_buy_time(tmp_path: Path, clock: Clock, steady_signals: list[int]) -> None:
    with FakeDaemon(tmp_path, silent) as daemon:
        assert blocking_lease(daemon.path).reason == "TIMEOUT"
        clock.assert_within(IN_ALL_S - 0.1, IN_ALL_S + SLACK_S)
    assert len(steady_signals) > 20


def test_required_turns_a_cpu_answer_into_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotGranted, match="NO_DAEMON"):
        libclient.lease("analyst", socket=str(tmp_path / "none"), required=True)

    async def ask() -> None:
        await libclient.aio.lease("analyst", socket=str(tmp_path / "none"), required=True)

    with pytest.raises(NotGranted, match="NO_DAEMON"):
        asyncio.run(ask())


def test_questions_have_answers_without_a_daemon(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    info = libclient.gpu_info(path)
    assert (info["available"], info["gpus"]) == (False, [])
    assert "no such socket" in info["message"]
    policy = libclient.get_policy(path)
    assert (policy["reachable"], policy["safe_mode"]) == (False, True)
    assert asyncio.run(libclient.aio.gpu_info(path)) == info
    assert asyncio.run(libclient.aio.get_policy(path)) == policy


def test_a_hung_daemon_costs_a_policy_its_two_seconds_once(tmp_path: Path, clock: Clock) -> None:
    with FakeDaemon(tmp_path, silent) as daemon:
        for _ in range(3):
            assert libclient.get_policy(daemon.path)["reachable"] is False
    clock.assert_within(IN_ALL_S - 0.1, IN_ALL_S + SLACK_S)


def test_connecting_says_why_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no such socket"):
        libclient.connect(str(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="nobody answers"):
        libclient.connect(str(tmp_path / "file"))


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Be a user to whom permissions apply."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65_534)
    yield
    os.seteuid(uid)


def test_a_socket_of_another_group_is_said_to_be_one(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with FakeDaemon(tmp_path) as daemon:
        os.chmod(daemon.path, 0)
        request.getfixturevalue("ordinary_user")
        with pytest.raises(Unavailable, match="permission denied"):
            libclient.connect(daemon.path)


def test_the_environment_says_where_the_daemon_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeDaemon(tmp_path) as daemon:
        monkeypatch.setenv("GPUORCH_SOCKET", daemon.path)
        with libclient.lease("analyst") as lease:
            assert lease.granted


# -- late grants, on a connection that lives on


def grants_late(release: threading.Event) -> Script:
    """Grant the first lease only when told to; answer everything else at once."""

    def script(conn: Served) -> None:
        late = conn.expect("lease")
        release.wait(20)
        conn.reply(late, **grant_fields(9))
        while True:
            request = conn.request()
            conn.reply(request, **(grant_fields(1) if request["op"] == "lease" else {}))

    return script


def test_a_grant_after_the_time_is_up_is_released_with_nobody_asking(tmp_path: Path) -> None:
    now = threading.Event()
    with FakeDaemon(tmp_path, grants_late(now)) as daemon, libclient.connect(daemon.path) as client:
        assert client.lease("analyst").reason == "TIMEOUT"
        now.set()
        daemon.wait_for_op("release")
        assert {"op": "release", "token": "secret-9"}.items() <= daemon.requests[-1].items()
        assert client.lease("analyst").granted


def test_a_cancelled_task_gives_its_late_grant_back(tmp_path: Path) -> None:
    now = threading.Event()

    async def scenario(daemon: FakeDaemon) -> None:
        async with libclient.aio.connect(daemon.path) as client:
            task = asyncio.ensure_future(client.lease("analyst", wait_s=60))
            await asyncio.to_thread(daemon.wait_for_op, "lease")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            now.set()
            await asyncio.to_thread(daemon.wait_for_op, "release")
            assert (await client.lease("analyst")).granted

    with FakeDaemon(tmp_path, grants_late(now)) as daemon:
        asyncio.run(scenario(daemon))
        assert daemon.ops()[:3] == ["lease", "cancel", "release"]


def test_garbage_ends_a_lease_and_its_release_is_quiet_and_the_next_call_is_answered(
    tmp_path: Path,
) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields())
        conn.expect("health")
        conn.sock.sendall(HEADER.pack(1) + b"\xc1")
        conn.wait_for_end()

    events: list[dict[str, Any]] = []
    with (
        FakeDaemon(tmp_path, script, grant_everything) as daemon,
        libclient.connect(daemon.path) as client,
    ):
        lease = client.lease("analyst", on_event=events.append)
        assert lease.ended is None
        with pytest.raises(Unavailable, match="garbage"):
            client.call("health")
        assert str(lease.ended).startswith("connection lost")
        lease.release()
        assert client.closed
        wait_for(lambda: bool(events), "the news of the lost connection")
        assert events[0]["event"] == "connection.lost"
        assert client.lease("analyst").granted
        assert daemon.ops() == ["lease", "health", "lease"]
