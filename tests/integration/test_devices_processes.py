"""Peers are identified by the kernel, and a process's end is told once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gpuorchd.core.effects import ForgetProcess, WatchProcess
from gpuorchd.core.events import ProcessEnded
from gpuorchd.core.model import ProcessKey
from gpuorchd.devices import processes
from gpuorchd.devices.proc_facts import read_stat, read_unit
from gpuorchd.devices.processes import SO_PEERPIDFD, ProcessWatch
from tests.support.opened_sources import until
from tests.support.recording_engine import RecordingEngine

# Connects as often as its input has lines, answers each with a line, and ends with its input.
CLIENT = """
import socket, sys
held = []
for line in sys.stdin:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(sys.argv[1])
    held.append(peer)
    print("connected", flush=True)
"""

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
OPTIONS = [SO_PEERPIDFD, None]


@pytest.fixture(autouse=True, scope="module")
def loop_library_started() -> None:
    """Let the loop's library open what it opens once in a process: it is no test's leak."""
    uvloop.new_event_loop().close()


class Peers:
    """A listening socket, and processes that connect to it."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "s")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen()
        self._sockets = [self._listener]
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        """Start a process that can connect."""
        child = subprocess.Popen(
            [sys.executable, "-c", CLIENT, self._path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._children.append(child)
        return child

    def connect(self, child: subprocess.Popen[bytes]) -> int:
        """Let a process connect, and give the accepted descriptor."""
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"connect\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"connected\n"
        accepted, _ = self._listener.accept()
        self._sockets.append(accepted)
        return accepted.fileno()

    def kill(self, child: subprocess.Popen[bytes]) -> None:
        """Kill a process and reap it."""
        child.kill()
        child.wait()

    def end(self) -> None:
        """End all of them."""
        for child in self._children:
            with child:
                child.kill()
        for one in self._sockets:
            one.close()


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    made = Peers(tmp_path)
    yield made
    made.end()


def key_of(pid: int) -> ProcessKey:
    facts = read_stat(pid)
    assert facts is not None
    return ProcessKey(pid, facts.start_ticks)


@pytest.fixture
async def watch() -> Any:
    engine = RecordingEngine()
    made = ProcessWatch(engine, asyncio.get_running_loop())
    yield made, engine
    made.close()
    assert made.count == 0


Watch = tuple[ProcessWatch, RecordingEngine]


@pytest.mark.parametrize("option", OPTIONS, ids=["pidfd", "fallback"])
@pytest.mark.parametrize("new_loop", LOOPS, ids=["asyncio", "uvloop"])
def test_a_peer_is_identified_and_its_end_is_told_once(
    peers: Peers, option: int | None, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def live() -> None:
        engine = RecordingEngine()
        watch = ProcessWatch(engine, asyncio.get_running_loop(), option)
        child = peers.start()
        first, second = peers.connect(child), peers.connect(child)
        peer = watch.identify(first)
        assert peer.process == key_of(child.pid)
        assert (peer.uid, peer.gid, peer.alive) == (os.getuid(), os.getgid(), True)
        assert peer.unit == read_unit(child.pid)
        assert watch.identify(second) == peer
        assert watch.count == 1, "one pidfd for a process, however many connections"
        child.kill()
        await engine.first(ProcessEnded)
        assert watch.count == 0
        await until(lambda: child.poll() is not None)
        assert engine.events == [ProcessEnded(peer.process)]
        watch.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(live())


@pytest.mark.parametrize("option", OPTIONS, ids=["pidfd", "fallback"])
@pytest.mark.parametrize("reaped", [True, False])
def test_a_peer_that_is_dead_already_is_an_answer(
    peers: Peers, option: int | None, reaped: bool
) -> None:
    child = peers.start()
    fd = peers.connect(child)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        child.wait()
    engine = RecordingEngine()
    with asyncio.Runner() as runner:
        watch = ProcessWatch(engine, runner.get_loop(), option)
        peer = watch.identify(fd)
    assert (peer.process.pid, peer.uid, peer.alive) == (child.pid, os.getuid(), False)
    assert (watch.count, engine.events) == (0, [])


async def test_a_look_watches_nothing(peers: Peers, watch: Watch) -> None:
    made, _ = watch
    child = peers.start()
    fd = peers.connect(child)
    assert made.look(fd).process == key_of(child.pid)
    assert (made.count, made.count_of(os.getuid())) == (0, 0)


async def test_processes_are_counted_by_the_user_they_belong_to(peers: Peers, watch: Watch) -> None:
    made, engine = watch
    first, second = peers.start(), peers.start()
    for child in (first, first, second):
        made.identify(peers.connect(child))
    assert (made.count_of(os.getuid()), made.count_of(os.getuid() + 1)) == (2, 0)
    made.release_unused(key_of(first.pid))
    made.release_unused(key_of(first.pid))
    assert made.count_of(os.getuid()) == 1
    peers.kill(second)
    await engine.first(ProcessEnded)
    assert made.count_of(os.getuid()) == 0


async def test_what_is_forgotten_is_not_told(peers: Peers, watch: Watch) -> None:
    made, engine = watch
    made.attach(engine)
    forgotten, kept = peers.start(), peers.start()
    peer = made.identify(peers.connect(forgotten))
    made.identify(peers.connect(kept))
    engine.actors[ForgetProcess](ForgetProcess(peer.process))
    assert made.count == 1
    peers.kill(forgotten)
    peers.kill(kept)
    await engine.first(ProcessEnded)
    assert [event.process.pid for event in engine.of(ProcessEnded)] == [kept.pid]


async def test_any_process_can_be_watched_by_pid_and_start(peers: Peers, watch: Watch) -> None:
    made, engine = watch
    made.attach(engine)
    child = peers.start()
    key = key_of(child.pid)
    engine.actors[WatchProcess](WatchProcess(key))
    engine.actors[WatchProcess](WatchProcess(key))
    assert made.count == 1
    assert made.identify(peers.connect(child)).process == key
    assert made.count == 1
    peers.kill(child)
    assert (await engine.first(ProcessEnded)).process == key
    assert len(engine.events) == 1


async def test_a_process_that_is_gone_has_ended_at_once(peers: Peers, watch: Watch) -> None:
    made, engine = watch
    child = peers.start()
    key = key_of(child.pid)
    peers.kill(child)
    made.watch(WatchProcess(key))
    assert engine.events == [ProcessEnded(key)]


async def test_another_process_with_the_same_number_is_not_mistaken_for_it(
    peers: Peers, watch: Watch
) -> None:
    made, engine = watch
    child = peers.start()
    earlier = ProcessKey(child.pid, key_of(child.pid).start_ticks - 1)
    made.watch(WatchProcess(earlier))
    made.watch(WatchProcess(ProcessKey(child.pid, 0)))
    assert engine.events == [ProcessEnded(earlier), ProcessEnded(ProcessKey(child.pid, 0))]
    assert made.count == 0


async def test_without_a_descriptor_left_nobody_is_declared_dead(
    peers: Peers, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_pid: int) -> int:
        raise OSError(24, "Too many open files")

    made, engine = watch
    monkeypatch.setattr(processes, "RETRY_S", 0.02)
    child = peers.start()
    key = key_of(child.pid)
    with monkeypatch.context() as without:
        without.setattr(os, "pidfd_open", none_left)
        made.watch(WatchProcess(key))
        assert (made.count, engine.events) == (0, [])
    await until(lambda: made.count == 1)
    peers.kill(child)
    assert (await engine.first(ProcessEnded)).process == key


async def test_a_peer_that_cannot_be_asked_about_is_an_error_and_not_dead(
    peers: Peers, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = watch
    fd = peers.connect(peers.start())
    with monkeypatch.context() as hidden:
        hidden.setattr(processes, "read_stat", lambda _pid: None)
        with pytest.raises(PermissionError, match="/proc"):
            made.identify(fd)
    assert made.count == 0
    assert made.identify(fd).alive


async def test_an_older_kernel_is_noticed(
    peers: Peers, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = watch
    child = peers.start()
    # An option that no kernel has.
    monkeypatch.setattr(made, "_option", 30_000)
    assert made.identify(peers.connect(child)).process == key_of(child.pid)
    assert made.count == 1


async def test_a_signal_reaches_only_the_process_that_was_meant(peers: Peers, watch: Watch) -> None:
    made, engine = watch
    child, stranger = peers.start(), peers.start()
    peer = made.identify(peers.connect(child))
    assert not made.signal(key_of(stranger.pid), os.getuid(), "TERM"), "it is not watched"
    assert not made.signal(peer.process, os.getuid() + 1, "TERM"), "it has another uid"
    assert child.poll() is None
    assert made.signal(peer.process, os.getuid(), "TERM")
    await engine.first(ProcessEnded)
    assert child.wait() == -signal.SIGTERM
    assert not made.signal(peer.process, os.getuid(), "TERM"), "it is gone"


async def test_identifying_leaves_no_descriptor_open(peers: Peers, watch: Watch) -> None:
    made, _ = watch
    child = peers.start()
    fd = peers.connect(child)
    made.identify(fd)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        made.identify(fd)
        made.look(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.fstat(fd), "the caller's own is still open"


async def test_the_end_of_a_killed_process_is_seen_while_its_child_holds_the_connection(
    watch: Watch,
) -> None:
    made, engine = watch
    ours, theirs = socket.socketpair()
    source = (
        "import os, sys\n"
        "if os.fork() == 0: sys.stdin.read(); os._exit(0)\n"
        "print('forked', flush=True); sys.stdin.read()\n"
    )
    with (
        ours,
        theirs,
        subprocess.Popen(
            [sys.executable, "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        ) as holder,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"forked\n"
        made.watch(WatchProcess(key_of(holder.pid)))
        theirs.close()
        holder.kill()
        await engine.first(ProcessEnded)
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)


def test_identifying_is_cheap(peers: Peers) -> None:
    async def live() -> float:
        watch = ProcessWatch(RecordingEngine(), asyncio.get_running_loop())
        fd = peers.connect(peers.start())
        watch.identify(fd)
        times = []
        for _ in range(200):
            began = time.perf_counter()
            watch.identify(fd)
            times.append(time.perf_counter() - began)
        watch.close()
        return sorted(times)[len(times) // 2]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        # It measures 30 us; this is what would hurt a connection's first lease.
        assert runner.run(live()) < 0.001
