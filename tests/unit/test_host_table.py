"""The table: whatever is cut off, what is read is the state after some whole turn, or is told."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpuorchd.host.table import (
    BOOT_BYTES,
    FAILURES_AT,
    HALF_HEAD,
    HEAD,
    HEAD_BYTES,
    RECORD_HEAD,
    Damaged,
    Key,
    Table,
    TableFull,
)

BOOT = "0f1e2d3c-0000-4000-8000-123456789abc"
EPOCH = "0123456789abcdef"
HALF_BYTES = 16_384
TOTALS = (1, 2, 3)
ROWS: dict[Key, Any] = {("l", 1): [1, "one"], ("w", 2): [2, "two"], ("d", "GPU-a"): ["GPU-a", 0]}


class Killed(Exception):
    """The process that wrote is gone."""


class Dying:
    """A mapping whose writer is killed after so many bytes."""

    def __init__(self, mapped: Any, bytes_left: int) -> None:
        self._mapped = mapped
        self.left = bytes_left

    def __getitem__(self, at: slice) -> bytes:
        found: bytes = self._mapped[at]
        return found

    def __setitem__(self, at: slice, data: bytes) -> None:
        start = at.start or 0
        taken = min(len(data), self.left)
        self._mapped[start : start + taken] = data[:taken]
        self.left -= taken
        if taken < len(data):
            raise Killed

    def close(self) -> None:
        self._mapped.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leases"


def opened(path: Path, boot: str = BOOT) -> Table:
    return Table(path, boot, HALF_BYTES)


def nothing_more() -> tuple[str, Mapping[Key, object]]:
    raise AssertionError("the half is not full yet")


def found(path: Path, boot: str = BOOT) -> tuple[dict[Key, Any], tuple[int, int, int]] | None:
    table = opened(path, boot)
    try:
        contents = table.read()
        return None if contents is None else (contents.rows, contents.totals)
    finally:
        table.close()


def begun(path: Path, rows: Mapping[Key, object] = ROWS) -> Table:
    table = opened(path)
    table.read()
    table.begin(EPOCH, rows, TOTALS)
    return table


def cut(table: Table, bytes_left: int) -> Dying:
    dying = Dying(table._map, bytes_left)
    table._map = dying  # type: ignore[assignment]  # it is written to as the mapping is
    return dying


def every_cut(path: Path, act: Any, whole: int = 100_000) -> Iterator[int]:
    """Do something once for each byte after which it can be cut off, from the same file."""
    before = path.read_bytes()
    for size in range(whole):
        path.write_bytes(before)
        table = opened(path)
        table.read()
        cut(table, size)
        try:
            act(table)
        except Killed:
            yield size
        else:
            return
        finally:
            table.close()
    raise AssertionError("it is never written whole")


def test_what_was_begun_and_recorded_is_read(path: Path) -> None:
    table = begun(path)
    table.commit({("l", 1): None, ("l", 3): [3, "three"]}, (4, 5, 6), nothing_more)
    table.close()
    again = opened(path)
    contents = again.read()
    again.close()
    assert contents is not None
    assert contents.epoch == EPOCH
    assert contents.totals == (4, 5, 6)
    assert contents.rows == {
        ("w", 2): [2, "two"],
        ("d", "GPU-a"): ["GPU-a", 0],
        ("l", 3): [3, "three"],
    }


def test_an_empty_file_has_nothing(path: Path) -> None:
    assert found(path) is None
    assert found(path) is None


def test_a_record_cut_at_any_byte_is_not_there_and_what_was_before_it_is(path: Path) -> None:
    table = begun(path)
    table.commit({("l", 7): [7]}, TOTALS, nothing_more)
    table.close()
    before = found(path)

    def act(table: Table) -> None:
        # As a daemon goes on: what it found is what its half begins with.
        at = HALF_HEAD.size + size_of_rows(path)
        table._at, table._end = at, HALF_BYTES
        table._seed = table._generation
        table.commit({("l", 8): [8, "x" * 40]}, (9, 9, 9), nothing_more)

    cuts = 0
    # Over the record that is there: what is older must not show through either.
    for _ in every_cut(path, act):
        rows_and_totals = found(path)
        assert rows_and_totals is not None
        rows, totals = rows_and_totals
        assert ("l", 8) not in rows
        assert (rows, totals) in (before, (ROWS, TOTALS))
        cuts += 1
    assert cuts > 40


def size_of_rows(path: Path) -> int:
    data = path.read_bytes()
    size: int = max(
        HALF_HEAD.unpack_from(data, HEAD_BYTES + half * HALF_BYTES)[1:] for half in (0, 1)
    )[1]
    return size


def test_a_half_begun_and_cut_at_any_byte_leaves_the_old_one(path: Path) -> None:
    table = begun(path)
    table.commit({("l", 7): [7]}, (7, 7, 7), nothing_more)
    table.close()
    before = found(path)
    after = ({("l", 9): [9]}, TOTALS)
    seen = []
    for _ in every_cut(path, lambda table: table.begin(EPOCH, {("l", 9): [9]}, TOTALS)):
        seen.append(found(path))
    # The last bytes of its head are zeros that lie there already: without them it counts.
    old = seen.count(before)
    assert old > HALF_HEAD.size
    assert seen == [before] * old + [after] * (len(seen) - old)
    assert found(path) == after


def test_the_first_that_is_begun_and_cut_is_nothing_or_told(path: Path) -> None:
    opened(path).close()
    for _ in every_cut(path, lambda table: table.begin(EPOCH, ROWS, TOTALS)):
        try:
            seen = found(path)
        except Damaged:
            continue
        # The name of the table is written last of all; nothing is promised before it is.
        assert seen in (None, (ROWS, TOTALS))
    assert found(path) == (ROWS, TOTALS)


def test_counting_a_failure_and_being_cut_loses_no_row(path: Path) -> None:
    begun(path).close()
    for _ in every_cut(path, lambda table: table.count_failure()):
        assert found(path) == (ROWS, TOTALS)


def test_failures_are_counted_until_they_are_cleared(path: Path) -> None:
    table = begun(path)
    for count in (1, 2):
        table.count_failure()
        table.close()
        table = opened(path)
        assert table.failures == 0
        table.read()
        assert table.failures == count
    # What is begun anew keeps the count: only who went on may clear it.
    table.begin(EPOCH, ROWS, TOTALS)
    table.close()
    table = opened(path)
    table.read()
    assert table.failures == 2
    table.clear_failures()
    table.close()
    table = opened(path)
    table.read()
    assert table.failures == 0
    table.close()
    assert struct.calcsize("=16sI") == FAILURES_AT


@pytest.mark.parametrize("at", [HALF_HEAD.size + 5, 6, 14])
def test_a_byte_that_changed_is_found(path: Path, at: int) -> None:
    table = begun(path)
    table.begin(EPOCH, {("l", 9): [9]}, TOTALS)
    table.close()
    data = bytearray(path.read_bytes())
    # The second that was begun lies in the first half.
    data[HEAD_BYTES + at] ^= 1
    path.write_bytes(data)
    assert found(path) == (ROWS, TOTALS)
    data[HEAD_BYTES + HALF_BYTES + at] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match="neither of its halves is whole"):
        found(path)


def test_a_record_that_changed_ends_what_is_read(path: Path) -> None:
    table = begun(path)
    at = table.used_bytes
    table.commit({("l", 7): [7]}, TOTALS, nothing_more)
    table.commit({("l", 8): [8]}, TOTALS, nothing_more)
    table.close()
    data = bytearray(path.read_bytes())
    data[HEAD_BYTES + HALF_BYTES + at + RECORD_HEAD.size + 3] ^= 1
    path.write_bytes(data)
    assert found(path) == (ROWS, TOTALS)


def test_a_table_of_another_boot_is_nothing_and_never_comes_back(path: Path) -> None:
    table = begun(path)
    # Its halves have counted for long.
    for number in range(5):
        table.begin(EPOCH, {("l", number): [number]}, TOTALS)
    table.close()
    other = "another boot".ljust(BOOT_BYTES, "x")
    table = opened(path, other)
    assert table.read() is None
    table.begin("fedcba9876543210", {}, (0, 0, 0))
    table.close()
    assert found(path, other) == ({}, (0, 0, 0))


def test_another_version_is_damage_that_is_named(path: Path) -> None:
    begun(path).close()
    data = bytearray(path.read_bytes())
    magic, version, failures, boot, epoch = HEAD.unpack_from(data)
    HEAD.pack_into(data, 0, magic, version + 1, failures, boot, epoch)
    path.write_bytes(data)
    with pytest.raises(Damaged, match=f"version {version + 1}"):
        found(path)


def test_it_grows_and_flips_and_keeps_everything(path: Path) -> None:
    table = begun(path, {})
    everything: dict[Key, Any] = {}
    halves = set()
    for number in range(400):
        row: dict[Key, Any] = {("l", number % 20): [number, "x" * 60]}
        everything.update(row)
        table.commit(row, (number, 0, 0), lambda: (EPOCH, everything))
        halves.add(table._half)
        # Somebody else may read it meanwhile.
        if number % 13 == 0:
            assert found(path) == (everything, (number, 0, 0))
    assert halves == {0, 1}
    assert table.used_bytes <= HALF_BYTES
    table.close()
    assert found(path) == (everything, (399, 0, 0))


def test_what_does_not_fit_leaves_it_as_it_was(path: Path) -> None:
    table = begun(path)
    with pytest.raises(TableFull, match=f"at most {HALF_BYTES} fit"):
        table.begin(EPOCH, {("l", 1): "x" * HALF_BYTES}, TOTALS)
    huge: dict[Key, object] = {("l", 1): "x" * HALF_BYTES}
    with pytest.raises(TableFull):
        table.commit(huge, TOTALS, lambda: (EPOCH, huge))
    assert found(path) == (ROWS, TOTALS)
    # And it goes on.
    table.commit({("l", 5): [5]}, TOTALS, nothing_more)
    table.close()
    assert found(path) == ({**ROWS, ("l", 5): [5]}, TOTALS)


def test_without_memory_it_stays_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = begun(path)

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(TableFull, match="No space left"):
            table.begin(EPOCH, {}, TOTALS)
    assert found(path) == (ROWS, TOTALS)
    table.begin(EPOCH, {}, TOTALS)
    table.close()
    assert found(path) == ({}, TOTALS)


def test_with_little_memory_it_has_less_room_to_grow(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(path, BOOT, 256 * 1024)
    allocate = os.posix_fallocate

    def scarce(fd: int, offset: int, size: int) -> None:
        if size > 64 * 1024:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", scarce)
    table.begin(EPOCH, ROWS, TOTALS)
    row: dict[Key, Any] = {}
    for number in range(100):
        row[("l", 9)] = [number, "x" * 500]
        table.commit(row, TOTALS, lambda: (EPOCH, {**ROWS, **row}))
    table.close()
    table = Table(path, BOOT, 256 * 1024)
    contents = table.read()
    table.close()
    assert contents is not None
    assert contents.rows == {**ROWS, **row}


def test_closing_twice_closes_once(path: Path) -> None:
    table = begun(path)
    table.close()
    table.close()
