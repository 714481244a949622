"""The outbox sends everything in order, knows what the kernel took, and never waits or raises."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gpuorchd.server.outbox import Outbox, Unsent
from libclient.wire.framing import WHOLE_FRAME_BYTES, frame


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def read_some(sock: socket.socket, most: int = 65_536) -> bytes:
    """What is there to be read, empty for nothing."""
    try:
        return sock.recv(most)
    except BlockingIOError:
        return b""


def test_what_the_kernel_takes_is_sent_in_one_write(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours.fileno(), Unsent())
    for number in range(100):
        outbox.put(b"%d," % number)
    assert read_some(theirs) == b""
    outbox.flush()
    assert read_some(theirs) == b"".join(b"%d," % number for number in range(100))
    assert (outbox.unsent_bytes, outbox.blocked, outbox.partial) == (0, False, False)


@pytest.mark.parametrize("size", [10, 3_000, 30_000, 40_000, 300_000])
def test_everything_arrives_in_order_through_a_full_socket(
    pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    ours, theirs = pair
    shared = Unsent()
    outbox = Outbox(ours.fileno(), shared)
    sent = b"".join(frame(bytes([number % 256]) * size) for number in range(3_000_000 // size))
    for at in range(0, len(sent), size + 4):
        outbox.put(sent[at : at + size + 4])
    outbox.flush()
    assert outbox.blocked
    assert shared.total_bytes == outbox.unsent_bytes > 0
    received = bytearray()
    while len(received) < len(sent):
        received += read_some(theirs, 50_000)
        outbox.flush()
    assert received == sent
    assert (outbox.unsent_bytes, outbox.blocked, shared.total_bytes) == (0, False, 0)


def test_frames_that_fit_whole_are_never_left_in_part(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours.fileno(), Unsent())
    for _ in range(200):
        outbox.put(bytes(WHOLE_FRAME_BYTES // 7))
    for _ in range(400):
        outbox.flush()
        assert not outbox.partial
        read_some(theirs, 10_000)
    assert outbox.unsent_bytes == 0


def test_a_frame_left_in_part_is_known(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outbox = Outbox(ours.fileno(), Unsent())
    outbox.put(bytes(4_000_000))
    outbox.flush()
    assert outbox.blocked
    assert outbox.partial
    while outbox.unsent_bytes:
        read_some(theirs)
        outbox.flush()
    assert not outbox.partial


def test_what_is_put_while_blocked_counts_over_all(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, _theirs = pair
    shared = Unsent()
    outbox = Outbox(ours.fileno(), shared)
    outbox.put(bytes(1_000_000))
    outbox.flush()
    before = shared.total_bytes
    outbox.put(bytes(5_000))
    assert shared.total_bytes == before + 5_000 == outbox.unsent_bytes
    outbox.drop()
    assert (shared.total_bytes, outbox.unsent_bytes, outbox.partial) == (0, 0, False)


def test_a_peer_that_is_gone_does_not_raise(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    shared = Unsent()
    outbox = Outbox(ours.fileno(), shared)
    outbox.put(bytes(1_000_000))
    outbox.flush()
    theirs.close()
    outbox.flush()
    assert outbox.broken
    assert (shared.total_bytes, outbox.unsent_bytes) == (0, 0)
    outbox.put(b"late")
    outbox.flush()
    assert outbox.broken


def test_a_guard_is_told_before_what_may_be_cut_leaves_and_when_all_of_it_has(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours.fileno(), Unsent())
    told: list[tuple[bool, bytes]] = []
    outbox.set_guard(lambda on: told.append((on, read_some(theirs))))
    outbox.put(b"small" * 10)
    assert outbox.flush()
    assert told == []
    assert len(read_some(theirs)) == 50
    outbox.put(b"x" * (WHOLE_FRAME_BYTES + 1))
    outbox.put(b"y" * (WHOLE_FRAME_BYTES + 1))
    # Once for both, and nothing of them is out yet.
    assert told == [(True, b"")]
    while not outbox.flush():
        assert len(told) == 1
        read_some(theirs)
    assert [on for on, _ in told] == [True, False]


def test_a_guard_that_comes_later_hears_of_what_is_there(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours.fileno(), Unsent())
    told: list[bool] = []
    outbox.put(b"x" * 1_000_000)
    assert not outbox.flush()
    assert outbox.partial
    outbox.set_guard(told.append)
    assert told == [True]
    # Whoever guards no more is told that it is over for it.
    outbox.set_guard(None)
    assert told == [True, False]
    while not outbox.flush():
        read_some(theirs)
    assert told == [True, False]
