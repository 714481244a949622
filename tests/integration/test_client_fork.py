"""What a forked child has of its parent's leases: nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import libclient
from libclient.errors import ForkedClient
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
