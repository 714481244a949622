"""What a forked child has of its parent's leases: nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import libclient
from libclient import drive_sync, link_async
from libclient.errors import ForkedClient
from libclient.where import _SOCKETS, connecting, new_socket
from tests.support.proxy import FakeDaemon, Served, grant_fields
from tests.support.sources import ROOT


def in_forked_child(check: Callable[[], None]) -> None:
    """Run a check in a forked child; fail if it fails there."""
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException:
            # The child must not come back into pytest, whatever happens.
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the check failed in the child, see above"


def test_a_child_has_no_copy_of_the_connection(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("analyst")
        fd = client.fileno()

        def check() -> None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
            assert client.closed
            assert client.fileno() == -1

        in_forked_child(check)
        assert lease.live
        assert client.call("health") is not None
        lease.release()
        assert daemon.ops() == ["lease", "health", "release"]


def test_a_child_that_uses_it_is_told(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, libclient.connect(daemon.path) as client:
        lease = client.lease("analyst")

        def check() -> None:
            for use in (lease.release, client.events, lambda: client.call("health")):
                with pytest.raises(ForkedClient, match="connect anew"):
                    use()
            with pytest.raises(ForkedClient):
                client.lease("analyst")
            # What was known of it can still be read.
            assert lease.device == "cuda:0"
            client.close()

        in_forked_child(check)
        assert daemon.ops() == ["lease"]
        assert lease.live


def test_leaving_the_block_in_a_child_releases_nothing(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        with libclient.lease("analyst", socket=daemon.path) as lease:

            def check() -> None:
                lease.__exit__(None, None, None)

            in_forked_child(check)
            assert daemon.ops() == ["lease"]
        assert daemon.ops() == ["lease", "release"]


def test_a_child_may_take_a_lease_of_its_own(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon:
        with libclient.lease("analyst", socket=daemon.path) as lease:

            def check() -> None:
                with libclient.lease("child", socket=daemon.path) as own:
                    assert own.granted

            in_forked_child(check)
            assert lease.live
        agents = [request.get("agent") for request in daemon.requests]
        assert agents == ["analyst", "child", None, None]


def test_the_parents_death_ends_the_lease_though_a_child_lives(tmp_path: Path) -> None:
    code = (
        "import libclient, os, sys\n"
        "lease = libclient.lease('analyst', socket=sys.argv[1])\n"
        "assert lease.granted\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "print('forked', flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with (
        FakeDaemon(tmp_path) as daemon,
        subprocess.Popen(
            [sys.executable, "-c", code, daemon.path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as parent,
    ):
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"forked\n"
        # The child still reads its input, which ends with this block.
        daemon.wait_for_hangup()
        assert parent.stdin is not None
        parent.stdin.close()


def test_a_descriptor_that_is_inherited_on_purpose_keeps_the_lease(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields())
        conn.reply(conn.expect("seal"))
        conn.wait_for_end()

    with FakeDaemon(tmp_path, script) as daemon:
        client = libclient.connect(daemon.path)
        assert client.lease("analyst").granted
        client.call("seal")
        holder = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[client.fileno()],
        )
        client.close()
        with pytest.raises(AssertionError, match="the client to close"):
            daemon.wait_for_hangup(0.3)
        holder.communicate()
        daemon.wait_for_hangup()


def test_an_asyncio_client_leaves_no_copy_either(tmp_path: Path) -> None:
    async def scenario(path: str) -> None:
        async with libclient.aio.connect(path) as client:
            lease = await client.lease("analyst")
            fd = client.fileno()

            def check() -> None:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)
                with pytest.raises(ForkedClient):
                    lease.release().send(None)

            in_forked_child(check)
            assert lease.live
            await lease.release()

    with FakeDaemon(tmp_path) as daemon:
        asyncio.run(scenario(daemon.path))
        assert daemon.ops() == ["lease", "release"]


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_child_has_no_copy_of_a_connection_that_another_thread_was_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    connected, forked = threading.Event(), threading.Event()
    fds: list[int] = []

    def slowly(sock: socket.socket, path: str, deadline_s: float) -> Iterator[float]:
        yield from connecting(sock, path, deadline_s)
        # As if the thread had lost its turn here.
        fds.append(sock.fileno())
        connected.set()
        forked.wait(20)

    def take() -> libclient.Lease | libclient.aio.AsyncLease:
        if kind == "blocking":
            return libclient.lease("analyst", socket=daemon.path)

        async def ask() -> libclient.aio.AsyncLease:
            async with libclient.aio.lease("analyst", socket=daemon.path) as lease:
                return lease

        return asyncio.run(ask())

    def check() -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fds[0])

    module = drive_sync if kind == "blocking" else link_async
    monkeypatch.setattr(module, "connecting", slowly)
    with FakeDaemon(tmp_path) as daemon, ThreadPoolExecutor(1) as pool:
        taken = pool.submit(take)
        assert connected.wait(20)
        in_forked_child(check)
        forked.set()
        lease = taken.result(20)
        assert lease.granted
        if isinstance(lease, libclient.Lease):
            lease.release()
        daemon.wait_for_hangup()


def test_a_fork_waits_for_a_socket_that_is_just_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, go_on = threading.Event(), threading.Event()
    sockets: list[socket.socket] = []

    class Slow(socket.socket):
        """A socket whose maker has lost its turn: made, and known to nobody."""

        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            sockets.append(self)
            made.set()
            go_on.wait(20)

    def check() -> None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    with FakeDaemon(tmp_path) as daemon, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(socket, "socket", Slow)
        connecting = pool.submit(libclient.connect, daemon.path)
        assert made.wait(20)
        monkeypatch.undo()
        fd = sockets[0].fileno()
        forking = pool.submit(in_forked_child, check)
        with pytest.raises(TimeoutError):
            forking.result(0.2)
        go_on.set()
        forking.result(20)
        connecting.result(20).close()


def test_a_signal_handler_may_fork_in_the_middle_of_making_a_socket() -> None:
    with _SOCKETS._lock:
        in_forked_child(lambda: new_socket().close())
    new_socket().close()
