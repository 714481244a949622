"""Succession: which connections are there, which may come back, and where all of it is kept."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuorchd.config import Config
from gpuorchd.config_reading import read_config
from gpuorchd.core.events import Kept
from gpuorchd.core.model import Ask, ConnectionId, Token
from gpuorchd.core.rows import ClientRow, LeaseRow
from gpuorchd.succession import fates_of, first_number, table_path, texts_of
from tests.support.succeeding import process


@pytest.fixture
def stored() -> Iterator[dict[ConnectionId, socket.socket]]:
    """Three connections that are here; their other ends are closed with them."""
    pairs = [socket.socketpair() for _ in range(3)]
    yield {ConnectionId(number): ours for number, (ours, _) in enumerate(pairs, start=1)}
    for pair in pairs:
        for sock in pair:
            sock.close()


def client(conn: int) -> ClientRow:
    return ClientRow(ConnectionId(conn), process(conn), 0, 0, None, False, None, False)


def lease(conn: int) -> LeaseRow:
    found = ConnectionId(conn)
    return LeaseRow(
        1, "id", Token("t"), found, 1, Ask("a"), process(1), 0, None, 1, (), False, 0, 0, 0, None,
        "detached", 0, "", None, False, (),
    )  # fmt: skip


def kept(*conns: int, leases: tuple[LeaseRow, ...] = ()) -> Kept:
    return Kept(clients=tuple(client(conn) for conn in conns), leases=leases)


def test_who_is_in_the_store_is_there_and_who_is_not_has_ended(
    stored: dict[ConnectionId, socket.socket],
) -> None:
    # 3 has no slot: it is gone on with all the same. 9 has no descriptor: it died meanwhile.
    fate = fates_of(stored, kept(1, 2, 9), frozenset())
    assert fate.attached == stored
    assert fate.lost == frozenset()


def test_an_emptied_store_loses_everybody() -> None:
    fate = fates_of({}, kept(1, 2), frozenset())
    assert fate.attached == {}
    assert fate.lost == {1, 2}


def test_half_a_frame_ends_its_connection_for_everybody_who_has_it_open(
    stored: dict[ConnectionId, socket.socket],
) -> None:
    # The service manager has it open as well: closing ours would not be enough.
    with stored[ConnectionId(2)].dup():
        fate = fates_of(stored, kept(1, 2, 3), frozenset({2, 77}))
        assert set(fate.attached) == {1, 3}
        assert fate.lost == {2}
        with pytest.raises(BrokenPipeError):
            stored[ConnectionId(2)].send(b"x")
        assert stored[ConnectionId(1)].send(b"x") == 1


def test_one_that_has_ended_by_itself_is_no_fault() -> None:
    with socket.socket(socket.AF_UNIX) as alone:
        fate = fates_of({ConnectionId(5): alone}, kept(5), frozenset({5}))
    assert fate.lost == {5}


def test_no_new_connection_gets_a_number_that_names_an_older_one(
    stored: dict[ConnectionId, socket.socket],
) -> None:
    assert first_number({}, Kept()) == 1
    assert first_number(stored, Kept()) == 4
    assert first_number(stored, kept(2, 8)) == 9
    # Its connection was lost with the daemon before the last: its number names it still, and would
    # show its token to whoever got it.
    assert first_number(stored, kept(2, leases=(lease(30),))) == 31


def config(**fields: str) -> Config:
    return read_config(fields, {"HOME": "/home/x", "XDG_STATE_HOME": "/home/x/state"}).config


def test_the_table_lies_where_memory_is(tmp_path: Path) -> None:
    session = tmp_path / "session"
    session.mkdir()
    every = {"RUNTIME_DIRECTORY": "/run/gpuorchd:/run/more", "XDG_RUNTIME_DIR": str(session)}
    assert table_path(config(runtime_dir="/run/mine"), every) == Path("/run/mine/leases")
    assert table_path(config(), every) == Path("/run/gpuorchd/leases")
    del every["RUNTIME_DIRECTORY"]
    here = table_path(config(), every)
    assert here.parent == session / "gpuorchd"
    # Two daemons of one user have two tables, and each finds its own again.
    assert table_path(config(), every) == here
    assert table_path(config(socket="/run/other.sock"), every) != here
    for session_dir in ("", "relative", str(tmp_path / "nowhere")):
        state = table_path(config(), {"XDG_RUNTIME_DIR": session_dir})
        assert state == Path("/home/x/state/gpuorchd/leases")


def test_a_configuration_comes_back_from_its_texts() -> None:
    ran_on = config(
        lease_ttl_s="90", simulate="2x8000", socket_mode="0600", safe_mode="true", http_port="0"
    )
    texts = texts_of(ran_on)
    assert read_config(texts, {}).config == ran_on


def test_half_a_frame_leaves_its_owner_the_way_back_however_often_daemons_are_killed(
    stored: dict[ConnectionId, socket.socket],
) -> None:
    # The daemon that ended its connection was killed at once: the store dropped what hung up, and
    # nothing was recorded.
    del stored[ConnectionId(2)]
    fate = fates_of(stored, kept(1, 2, 3), frozenset({2}))
    assert fate.attached == stored
    assert fate.lost == {2}
