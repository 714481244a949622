"""Keeping: what is recorded is what comes back, no more than may, and never what cannot be used."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import Ask, ConnectionId, Peer, Token
from gpuorchd.core.state import Settings
from gpuorchd.host import keeping, table
from gpuorchd.host.keeping import Keeper
from gpuorchd.host.table import Table
from gpuorchd.server.tokens import TokenPool, digest_of
from tests.support.succeeding import process
from tests.support.world import MS, SECOND, card

BOOT = "0f1e2d3c-0000-4000-8000-123456789abc"
EPOCH = "0123456789abcdef"
CONFIG = {"lease_ttl_s": "60"}
ONE, TWO = ConnectionId(1), ConnectionId(2)


class Daemons:
    """One daemon after another on one table. `on_disk`: secrets must not lie there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reports: list[tuple[str, Mapping[str, object]]] = []
        self.now_ns = SECOND
        self.tokens = TokenPool()
        self.known: list[Token] = []
        self.open()

    def report(self, event: str, /, **fields: object) -> None:
        self.reports.append((event, fields))

    @property
    def reported(self) -> list[str]:
        return [name for name, _ in self.reports]

    def open(self, boot: str = BOOT) -> None:
        """Begin as the next daemon does, up to reading."""
        self.keeper = Keeper(self.path, boot, self.report, digest_of)

    def begin(self, found: keeping.Found | None = None) -> None:
        """Go on from what was found."""
        epoch = EPOCH if found is None else found.epoch
        self.machine = Machine(Settings(epoch, keeps=True))
        if found is not None:
            here = frozenset(client.conn for client in found.kept.clients)
            self.submit(ev.Restored(found.kept, here, frozenset(), SECOND))
        self.keeper.begin(self.machine.state, CONFIG)
        self.keeper.went_on()
        self.submit(ev.DevicesFound((card(0, 10_000, drain_ms=0),)))

    def submit(self, event: ev.Event) -> list[fx.Effect]:
        effects = self.machine.handle(event, self.now_ns)
        for effect in effects:
            if isinstance(effect, fx.Commit):
                self.keeper.commit(effect)
        return effects

    def lease(self, conn: ConnectionId, name: str, memory_mb: int, wait_ns: int = 0) -> Token:
        if conn not in self.machine.state.clients:
            self.submit(ev.ClientArrived(conn, Peer(process(conn), 1_000)))
        token = self.tokens.take()
        self.known.append(token)
        self.submit(ev.LeaseAsked(conn, name, Ask("a", memory_mb, wait_ns=wait_ns), token))
        return token

    def die(self) -> keeping.Found | None:
        """Let the daemon be gone and the next one read what it left."""
        self.keeper.close()
        self.open()
        return self.keeper.read()

    def close(self) -> None:
        self.keeper.close()


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests' own folder lies on."""
    monkeypatch.setattr(keeping, "lies_in_memory", lambda path: True)


@pytest.fixture
def daemons(tmp_path: Path, in_memory: None) -> Iterator[Daemons]:
    found = Daemons(tmp_path / "leases")
    yield found
    found.close()


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemons]:
    monkeypatch.setattr(keeping, "lies_in_memory", lambda path: False)
    found = Daemons(tmp_path / "leases")
    yield found
    found.close()


@pytest.fixture
def flipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the table begun anew every few records."""
    monkeypatch.setattr(table, "GROWTH_BYTES_MIN", 500)


def something(daemons: Daemons) -> tuple[Token, Token]:
    """Record a lease, a wait and an answer; return their tokens."""
    assert daemons.keeper.read() is None
    daemons.begin()
    gone = daemons.lease(TWO, "gone", 100)
    held = daemons.lease(ONE, "held", 6_000)
    daemons.lease(TWO, "waits", 6_000, wait_ns=60 * SECOND)
    daemons.now_ns += MS
    daemons.submit(ev.ReleaseAsked(TWO, "release", gone))
    return gone, held


def test_what_was_recorded_comes_back(daemons: Daemons) -> None:
    gone, held = something(daemons)
    found = daemons.die()
    assert found is not None
    assert found.epoch == EPOCH
    assert found.config == CONFIG
    kept = found.kept
    assert [row.conn for row in kept.clients] == [1, 2]
    assert [(row.token, row.ask.memory_mb) for row in kept.leases] == [(held, 6_000)]
    assert [(row.request_id, row.deadline_ns) for row in kept.waiters] == [("waits", 61 * SECOND)]
    (outcome,) = kept.outcomes
    assert (outcome.request_id, outcome.said) == ("release", {"released": True, "token": gone})
    assert kept.totals == (2, 1, 0)
    assert daemons.reported == []


def test_answers_are_kept_when_the_table_is_begun_anew(daemons: Daemons, flipping: None) -> None:
    gone, _ = something(daemons)
    daemons.keeper.mark_half_sent(1, on=True)
    halves = set()
    for _ in range(40):
        daemons.submit(ev.SealTold(ONE))
        halves.add(daemons.keeper._table._half)
    assert halves == {0, 1}
    for _ in range(3):
        found = daemons.die()
        assert found is not None
        (outcome,) = found.kept.outcomes
        assert outcome.said == {"released": True, "token": gone}
        daemons.begin(found)
    # They leave with their connection.
    daemons.submit(ev.ClientLeft(TWO))
    found = daemons.die()
    assert found is not None
    assert found.kept.outcomes == ()


def test_half_a_frame_is_marked_until_the_rest_has_left(daemons: Daemons) -> None:
    something(daemons)
    for conn in (1, 2, 3):
        daemons.keeper.mark_half_sent(conn, on=True)
    daemons.keeper.mark_half_sent(2, on=False)
    # Who has ended is marked no more.
    daemons.keeper.drop(3)
    found = daemons.die()
    assert found is not None
    assert found.half_sent == {1}
    daemons.begin(found)
    # The next daemon has ended that connection.
    found = daemons.die()
    assert found is not None
    assert found.half_sent == frozenset()


def test_on_a_disk_no_secret_lies_anywhere_in_the_file(on_disk: Daemons, flipping: None) -> None:
    _, held = something(on_disk)
    for _ in range(10):
        on_disk.submit(ev.SealTold(ONE))
    for _ in range(2):
        data = on_disk.path.read_bytes()
        for token in on_disk.known:
            assert token.encode() not in data
        assert digest_of(held).encode() in data
        found = on_disk.die()
        assert found is not None
        assert [row.token for row in found.kept.leases] == [digest_of(held)]
        # Nobody could come back to wait, or to be answered again.
        assert (found.kept.waiters, found.kept.outcomes) == ((), ())
        on_disk.begin(found)


def test_what_is_reattached_on_a_disk_stays_no_secret(on_disk: Daemons) -> None:
    _, held = something(on_disk)
    found = on_disk.die()
    assert found is not None
    on_disk.machine = Machine(Settings(found.epoch, keeps=True))
    lost = frozenset(client.conn for client in found.kept.clients)
    on_disk.submit(ev.Restored(found.kept, frozenset(), lost, SECOND))
    on_disk.keeper.begin(on_disk.machine.state, CONFIG)
    on_disk.submit(ev.ClientArrived(ConnectionId(9), Peer(process(1), 1_000)))
    event = ev.ReattachAsked(ConnectionId(9), "back", held, digest_of(held))
    assert any(isinstance(effect, fx.AnswerGrant) for effect in on_disk.submit(event))
    assert held.encode() not in on_disk.path.read_bytes()


def test_nothing_is_recorded_once_another_daemon_is_to_go_on(daemons: Daemons) -> None:
    something(daemons)
    daemons.keeper.freeze()
    daemons.submit(ev.ClientLeft(ONE))
    daemons.submit(ev.ClientLeft(TWO))
    daemons.keeper.mark_half_sent(1, on=True)
    found = daemons.die()
    assert found is not None
    assert (len(found.kept.leases), len(found.kept.waiters)) == (1, 1)
    assert found.half_sent == frozenset()


def unusable(path: Path) -> None:
    """Leave a whole table with a row that no daemon can have written."""
    found = Table(path, BOOT)
    found.begin(EPOCH, {("l", 1): ["no such lease"]}, (1, 0, 0))
    found.close()


def test_what_cannot_be_used_is_tried_twice_and_then_set_aside(daemons: Daemons) -> None:
    unusable(daemons.path)
    daemons.close()
    daemons.open()
    # The first try ends the daemon, and the service manager starts it again.
    with pytest.raises(msgspec.ValidationError):
        daemons.keeper.read()
    assert daemons.reported == []
    assert daemons.die() is None
    assert daemons.reported == ["host.table_set_aside"]
    fields = daemons.reports[0][1]
    aside = Path(str(fields["kept_as"]))
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert "ValidationError" in str(fields["damage"])
    # It begins with an empty one, which counts from now on.
    daemons.begin()
    assert daemons.die() is not None
    assert len(daemons.reports) == 1


def test_a_fault_of_going_on_counts_like_one_of_reading(daemons: Daemons) -> None:
    something(daemons)
    assert daemons.die() is not None
    with pytest.raises(RuntimeError, match="the first"):
        daemons.keeper.failed(RuntimeError("the first"))
    found = daemons.die()
    assert found is not None
    daemons.keeper.failed(RuntimeError("the second"))
    assert daemons.reported == ["host.table_set_aside"]
    assert daemons.reports[0][1]["damage"] == "RuntimeError: the second"
    assert daemons.die() is None


def test_who_goes_on_after_all_begins_to_count_anew(daemons: Daemons) -> None:
    something(daemons)
    for _ in range(3):
        assert daemons.die() is not None
        with pytest.raises(RuntimeError):
            daemons.keeper.failed(RuntimeError("now and then"))
        found = daemons.die()
        daemons.begin(found)
    assert daemons.reported == []


def test_a_signal_is_no_failure(daemons: Daemons) -> None:
    something(daemons)
    # Killed after it has read, before it goes on; and after it has begun.
    for _ in range(5):
        assert daemons.die() is not None
    for _ in range(5):
        found = daemons.die()
        assert found is not None
        assert len(found.kept.leases) == 1
        daemons.begin(found)
    assert daemons.reported == []


def test_a_damaged_file_is_set_aside_at_once(daemons: Daemons) -> None:
    daemons.close()
    daemons.path.write_bytes(b"not a table")
    daemons.open()
    assert daemons.keeper.read() is None
    assert daemons.reported == ["host.table_set_aside"]
    assert daemons.path.with_name("leases.damaged").read_bytes() == b"not a table"
    something(daemons)
    assert daemons.die() is not None


def test_another_boots_leases_are_nobodys(daemons: Daemons) -> None:
    something(daemons)
    daemons.close()
    daemons.open("another boot")
    assert daemons.keeper.read() is None
    assert daemons.reported == []


def no_memory(fd: int, offset: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_where_nothing_can_be_recorded_nothing_more_is_granted_until_it_can(
    daemons: Daemons, flipping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    something(daemons)
    assert daemons.keeper.refusal(stored=False) is None
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", no_memory)
        for _ in range(40):
            daemons.submit(ev.SealTold(ONE))
        daemons.submit(ev.ClientLeft(ONE))
        assert daemons.reported == ["host.table_failed"]
        refusal = daemons.keeper.refusal(stored=True)
        assert refusal is not None
        assert "cannot be written: no memory for" in refusal
    # Whoever asks next finds it mended, with all that could not be recorded.
    assert daemons.keeper.refusal(stored=True) is None
    assert daemons.reported == ["host.table_failed", "host.table_mended"]
    found = daemons.die()
    assert found is not None
    assert [row.conn for row in found.kept.clients] == [2]


def test_too_little_room_in_the_table_is_a_bound_like_any_other(
    daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    something(daemons)
    monkeypatch.setattr(keeping, "ROOM_BYTES_MIN", table.HALF_BYTES)
    refusal = daemons.keeper.refusal(stored=True)
    assert refusal is not None
    assert refusal.startswith("the lease table is full: ")
    assert daemons.keeper.failure is None


class Silent:
    """A service manager that takes everything and says nothing."""

    def send(self, text: str, fds: tuple[int, ...] = ()) -> bool:
        return True


async def test_a_full_store_refuses_those_who_are_not_in_it(daemons: Daemons) -> None:
    something(daemons)
    daemons.keeper.serve_store(Silent(), asyncio.get_running_loop(), 2, (1, 2))
    assert daemons.keeper.has_store
    assert daemons.keeper.stored == 2
    assert daemons.keeper.refusal(stored=True) is None
    refusal = daemons.keeper.refusal(stored=False)
    assert refusal == "at most 2 connections in the descriptor store; this bound is reached"
    daemons.keeper.drop(1)
    assert daemons.keeper.refusal(stored=False) is None
