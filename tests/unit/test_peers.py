"""Peers: what is promised to a process needs its end to be seen, and no user has all places."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from gpuorchd.config import Config
from gpuorchd.core.model import Peer, ProcessKey
from gpuorchd.core.policy import Policy
from gpuorchd.core.state import Settings, State
from gpuorchd.devices.processes import ProcessWatch
from gpuorchd.peers import Peers
from gpuorchd.server.services import PeerNotTaken


class Watched:
    """Processes by the descriptor that is asked about."""

    def __init__(self) -> None:
        self.peers: dict[int, Peer] = {}
        self.watched: dict[ProcessKey, int] = {}
        self.error: OSError | None = None

    @property
    def count(self) -> int:
        return len(self.watched)

    def count_of(self, uid: int) -> int:
        return sum(1 for each in self.watched.values() if each == uid)

    def look(self, fd: int) -> Peer:
        if self.error is not None:
            raise self.error
        return self.peers[fd]

    def identify(self, fd: int) -> Peer:
        peer = self.look(fd)
        self.watched[peer.process] = peer.uid
        return peer

    def release_unused(self, process: ProcessKey) -> None:
        del self.watched[process]


@pytest.fixture
def processes() -> Watched:
    processes = Watched()
    for fd in range(1, 9):
        processes.peers[fd] = Peer(ProcessKey(fd, 1), 1_000 + fd // 5)
    return processes


def peers_of(processes: Watched, **bounds: int) -> Peers:
    config = replace(Config(), **bounds)  # type: ignore[arg-type]  # bounds are whole numbers
    return Peers(cast("ProcessWatch", processes), State(Settings("peers"), Policy()), config)


def test_a_peer_of_which_nothing_can_be_known_is_refused(processes: Watched) -> None:
    peers = peers_of(processes)
    processes.peers[1] = Peer(ProcessKey(0, 0), 1_000, alive=False)
    for ask in (peers.look, peers.identify):
        with pytest.raises(PeerNotTaken, match="pid namespace") as refused:
            ask(1)
        assert refused.value.code == "forbidden"


def test_one_user_cannot_have_all_places(processes: Watched) -> None:
    peers = peers_of(processes, max_processes=4, max_processes_per_uid=2)
    for fd in (1, 2):
        peers.identify(fd)
    with pytest.raises(PeerNotTaken, match=r"2 processes of one user .*MAX_PROCESSES_PER_UID"):
        peers.identify(3)
    for fd in (5, 6):
        peers.identify(fd)
    with pytest.raises(PeerNotTaken, match=r"4 processes .*MAX_PROCESSES\)"):
        peers.identify(7)
    assert processes.count == 4


def test_a_look_takes_no_place(processes: Watched) -> None:
    peers = peers_of(processes, max_processes=1)
    for fd in (1, 2, 3):
        peers.look(fd)
    peers.identify(4)


def test_a_process_that_cannot_be_asked_about_is_refused_with_the_reason(
    processes: Watched,
) -> None:
    peers = peers_of(processes)
    for error, code in (
        (PermissionError(13, "hidden"), "forbidden"),
        (OSError(24, "full"), "limit"),
    ):
        processes.error = error
        with pytest.raises(PeerNotTaken, match=str(error.strerror)) as refused:
            peers.identify(1)
        assert refused.value.code == code
