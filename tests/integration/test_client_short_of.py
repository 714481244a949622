"""What a caller gets when its process has no more descriptors or threads: the CPU."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import libclient
from libclient.keeper import KEEPER
from tests.support.proxy import FakeDaemon, Served, denial_fields, grant_everything, grant_fields
from tests.support.sources import ROOT

# Fills the process's descriptors; `FREE` of them are given back.
FILL = """
import asyncio, os, resource, sys
import libclient, libclient.aio, libclient.blocking
path = sys.argv[1]
loop = asyncio.new_event_loop()
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
for _ in range(FREE):
    os.close(held.pop())

def answer(lease):
    print(lease.granted, lease.device, lease.reason, lease.lease_id)

"""


def outcome(daemon: FakeDaemon, code: str, free: int) -> list[str]:
    """Run code in a process that has so many descriptors left; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FILL.replace("FREE", str(free)) + code, daemon.path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_without_a_descriptor_for_the_socket_it_is_the_cpu(tmp_path: Path) -> None:
    code = (
        "answer(libclient.lease('a', socket=path))\n"
        "async def ask():\n"
        "    answer(await libclient.aio.lease('a', socket=path))\n"
        "loop.run_until_complete(ask())\n"
        "print(libclient.gpu_info(path)['available'])\n"
        "print(libclient.get_policy(path)['reachable'])\n"
        "loop.close()\n"
    )
    with FakeDaemon(tmp_path) as daemon:
        told = outcome(daemon, code, 0)
        assert told == ["False cpu NO_DAEMON None"] * 2 + ["False", "False"]
        assert daemon.requests == []


@pytest.mark.parametrize("free", [1, 2])
def test_a_grant_that_nothing_could_watch_is_given_back(tmp_path: Path, free: int) -> None:
    # The socket has one; then the epoll has none, or what wakes it.
    with FakeDaemon(tmp_path) as daemon:
        code = (
            "answer(libclient.lease('a', socket=path))\n"
            # None of those that were free is taken.
            f"for _ in range({free}):\n"
            "    held.append(os.open('/dev/null', os.O_RDONLY))\n"
            "loop.close()\n"
        )
        assert outcome(daemon, code, free) == ["False cpu NO_DAEMON None"]
        daemon.wait_for_hangup()


def test_without_a_thread_a_grant_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "gpuorch-keeper":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with FakeDaemon(tmp_path) as daemon:
        lease = libclient.lease("analyst", socket=daemon.path)
        assert (lease.granted, lease.device, lease.reason) == (False, "cpu", "NO_DAEMON")
        assert "can't start new thread" in lease.detail
        assert not lease.live
        daemon.wait_for_hangup()
        with libclient.connect(daemon.path) as client:
            assert client.lease("analyst").device == "cpu"
            # A call that holds nothing needs no thread, and the client goes on.
            assert client.call("health") == {}
            monkeypatch.setattr(threading.Thread, "start", start)
            again = client.lease("analyst")
            assert again.granted
            assert KEEPER.running
            again.release()


def test_an_event_that_nobody_could_be_told_of_ends_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "gpuorch-keeper":
            raise RuntimeError("can't start new thread")
        start(thread)

    def script(conn: Served) -> None:
        request = conn.expect("lease")
        conn.event("lease.queued", request_id=request["id"], position=1, ahead=0, eta_s=None)
        conn.wait_for_end()

    monkeypatch.setattr(threading.Thread, "start", refuse)
    heard: list[object] = []
    with FakeDaemon(tmp_path, script, grant_everything) as daemon:
        lease = libclient.lease("a", wait_s=60, on_event=heard.append, socket=daemon.path)
        assert (lease.device, lease.reason) == ("cpu", "NO_DAEMON")
        daemon.wait_for_hangup()
    assert heard == []


def test_a_second_lease_of_a_client_needs_no_more_than_the_first(tmp_path: Path) -> None:
    def script(conn: Served) -> None:
        conn.reply(conn.expect("lease"), **grant_fields(1))
        conn.reply(conn.expect("lease"), **denial_fields())
        conn.reply(conn.expect("lease"), **grant_fields(2))
        conn.wait_for_end()

    code = (
        "client = libclient.connect(path)\n"
        "first = client.lease('a')\n"
        "try:\n"
        "    while True:\n"
        "        held.append(os.open('/dev/null', os.O_RDONLY))\n"
        "except OSError:\n"
        "    pass\n"
        "answer(client.lease('a'))\n"
        "answer(client.lease('a'))\n"
        "assert first.live\n"
        "client.close()\n"
        "loop.close()\n"
    )
    with FakeDaemon(tmp_path, script) as daemon:
        assert outcome(daemon, code, 3) == [
            "False cpu INSUFFICIENT_MEMORY None",
            "True cuda:0  L2",
        ]
