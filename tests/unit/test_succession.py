"""What becomes of the connections of an earlier daemon, by what is left of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gpuorchd.core.events import Kept
from gpuorchd.core.model import ConnectionId, ProcessKey
from gpuorchd.core.rows import ClientRow
from gpuorchd.succession import fates_of

FIRST, SECOND = ConnectionId(1), ConnectionId(2)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def kept(*numbers: ConnectionId) -> Kept:
    rows = tuple(
        ClientRow(number, ProcessKey(7, 70), 0, 0, None, False, None, False) for number in numbers
    )
    return Kept(clients=rows)


def test_a_connection_that_is_gone_has_ended_where_others_are_there(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    fate = fates_of({FIRST: pair[0]}, kept(FIRST, SECOND), frozenset())
    assert fate.attached == {FIRST: pair[0]}
    assert fate.lost == frozenset()


def test_of_an_emptied_store_every_owner_may_come_back() -> None:
    fate = fates_of({}, kept(FIRST, SECOND), frozenset())
    assert fate.lost == {FIRST, SECOND}


def test_the_owner_of_half_a_frame_may_come_back_on_another_connection(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    fate = fates_of({FIRST: pair[0]}, kept(FIRST), frozenset({FIRST}))
    assert fate.attached == {}
    assert fate.lost == {FIRST}
    assert pair[1].recv(1) == b""


def test_it_may_also_when_the_daemon_that_ended_its_connection_was_killed_at_once(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """The store drops what has hung up, and that daemon had recorded nothing yet."""
    fate = fates_of({FIRST: pair[0]}, kept(FIRST, SECOND), frozenset({SECOND}))
    assert fate.attached == {FIRST: pair[0]}
    assert fate.lost == {SECOND}
