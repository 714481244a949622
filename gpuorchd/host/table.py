"""The table: what must outlive the daemon's process, in one mapped file on a memory file system.

Owns the file, its layout and its checks; knows rows as keys and bytes alone. The file has a head
and two halves. The newest whole half counts: it begins with all rows as they stood when it was
begun, and each record after that holds what one turn changed. When a half is full all rows are
written into the other one, which counts from its head's last write on. So at every moment,
also in the middle of a write, the file holds one consistent state: that after some whole turn.

    commit(rows) -> one record: length, checksum, rows   the last that fits its sum counts
    full         -> rows() -> the other half, generation + 1

A record is written before anything it promises is said. The process may be killed at any
instruction; a write to mapped memory needs no system call to survive that. It does not survive the
machine's end, and need not: nor does what it speaks of. A table of another boot is not read.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from gpuorchd.host.start import StartError

Key = tuple[str, int | str]

MAGIC: Final = b"gpuorchd table\n\0"
# Raised whenever what a row holds changes its meaning: a table of another version is set aside.
VERSION: Final = 1
# magic, version, failures, boot id, epoch
HEAD: Final = struct.Struct("=16sII36s16s")
FAILURES_AT: Final = 20
HEAD_BYTES: Final = 4_096
BOOT_BYTES: Final = 36
# Checksum of what follows, generation, bytes of the rows that it was begun with.
HALF_HEAD: Final = struct.Struct("=IQQ")
CHECKSUM_BYTES: Final = 4
RECORD_HEAD: Final = struct.Struct("=II")
# Mapped for each half; memory is used for what is written alone.
HALF_BYTES: Final = 64 * 1024 * 1024
# A half is begun anew when it has grown by its own size, and by this much at least. Part of the
# format: nothing behind it is read.
GROWTH_BYTES_MIN: Final = 1024 * 1024
# Where there is no memory for so much: it is begun anew more often then.
GROWTH_BYTES_LEAST: Final = 16 * 1024
# How often a table is tried that the daemon cannot go on from.
TRIES: Final = 2

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder().decode


class TableFull(Exception):
    """What has to be kept does not fit; the table stands as it was."""


class Damaged(Exception):
    """The file is none that can be gone on from; `str()` says why."""


class Contents(NamedTuple):
    """What a table held: `rows` by kind and name, undecoded but for msgpack."""

    epoch: str
    rows: dict[Key, Any]
    totals: tuple[int, int, int]


class Table:
    """One open table. Not thread-safe. `close` gives its descriptor and its mapping back.

    `failures`: how often in a row a daemon could not go on from it.
    """

    def __init__(self, path: Path, boot: str, half_bytes: int = HALF_BYTES) -> None:
        """Open or make the file. Raises StartError where it cannot be had.

        Raises `Damaged` for a file that is not as long as a table is.
        """
        self.path = path
        self._boot = boot.encode()[:BOOT_BYTES].ljust(BOOT_BYTES, b"\0")
        self._half_bytes = half_bytes
        self._fd = _open(path)
        self._size = HEAD_BYTES + 2 * half_bytes
        try:
            found_bytes = os.fstat(self._fd).st_size
            if found_bytes not in (0, self._size):
                raise Damaged(f"it has {found_bytes} bytes, a lease table has {self._size}")
            os.ftruncate(self._fd, self._size)
            os.posix_fallocate(self._fd, 0, HEAD_BYTES)
            self._map = mmap.mmap(self._fd, self._size)
        except Damaged:
            os.close(self._fd)
            raise
        except OSError as error:
            os.close(self._fd)
            raise StartError(f"cannot use the lease table {path}: {error.strerror}") from None
        self._generation = 0
        self._half = 0
        # Where the next record goes, and where the half is to be begun anew.
        self._at = 0
        self._end = 0
        self._seed = 0
        # Bytes of all rows when they were last written, and of the records since.
        self._rows_bytes = 0
        self.failures = 0

    @property
    def boot(self) -> str:
        """The boot that it is of, as the kernel names it."""
        return self._boot.rstrip(b"\0").decode()

    @property
    def used_bytes(self) -> int:
        """Bytes of the half that counts: no less than what its rows need."""
        return self._at

    @property
    def room_bytes(self) -> int:
        """How much more can be kept before something has to be refused."""
        return self._half_bytes - HALF_HEAD.size - self._at

    def read(self) -> Contents | None:
        """Read what an earlier daemon of this boot left; None where there is nothing.

        Raises `Damaged` for a file that is none of ours or of another version, and where no half
        is whole.
        """
        magic, version, failures, boot, epoch = HEAD.unpack_from(self._map)
        if magic not in (MAGIC, bytes(len(MAGIC))):
            raise Damaged("it does not begin as a lease table does")
        halves = [found for half in (0, 1) if (found := self._half_written(half)) is not None]
        newest = max(halves, key=lambda found: found.generation, default=None)
        if newest is not None:
            # What is begun anew has to count for more than what lies here, read or not.
            self._half, self._generation = newest.half, newest.generation
        if magic != MAGIC or boot != self._boot:
            return None
        if version != VERSION:
            raise Damaged(f"it is of version {version}, this daemon reads {VERSION}")
        self.failures = failures
        if newest is None:
            raise Damaged("neither of its halves is whole")
        return _contents(newest, epoch.decode())

    def begin(self, epoch: str, rows: Mapping[Key, object], totals: tuple[int, int, int]) -> None:
        """Write all rows into the half that does not count, then let it count.

        Raises `TableFull` where they do not fit; nothing has changed then.
        """
        payload = _encode((totals, [(key, row) for key, row in rows.items()]))
        half = 1 - self._half
        generation = self._generation + 1
        start = HEAD_BYTES + half * self._half_bytes
        size = len(payload)
        end = _end_bytes(size, self._half_bytes)
        if HALF_HEAD.size + size + RECORD_HEAD.size > self._half_bytes:
            raise TableFull(f"{size} bytes of rows, at most {self._half_bytes} fit")
        end = self._allocated(start, end, HALF_HEAD.size + size)
        at = start + HALF_HEAD.size
        self._map[at : at + size] = payload
        head = struct.pack("=QQ", generation, size)
        checksum = zlib.crc32(head, zlib.crc32(payload))
        head_is = HEAD.pack(MAGIC, VERSION, self.failures, self._boot, epoch.encode())
        self._map[start : start + HALF_HEAD.size] = HALF_HEAD.pack(checksum, generation, size)
        if self._map[: HEAD.size] != head_is:
            self._map[: HEAD.size] = head_is
        self._half, self._generation = half, generation
        self._at = HALF_HEAD.size + size
        self._end = end
        self._seed = generation & 0xFFFFFFFF

    def commit(
        self, rows: Mapping[Key, object], totals: tuple[int, int, int], all_rows: AllRows
    ) -> None:
        """Record what changed; a row of None is taken away.

        Where the half is full `all_rows` is asked for everything, these rows included. Raises
        `TableFull` where that does not fit.
        """
        payload = _encode((totals, list(rows.items())))
        size = len(payload)
        at = self._at
        if at + RECORD_HEAD.size + size > self._end:
            epoch, everything = all_rows()
            self.begin(epoch, everything, totals)
            return
        view = HEAD_BYTES + self._half * self._half_bytes + at
        body = view + RECORD_HEAD.size
        self._map[body : body + size] = payload
        # Last, and in one piece: until then the record is not there.
        self._map[view:body] = RECORD_HEAD.pack(size, zlib.crc32(payload, self._seed))
        self._at = at + RECORD_HEAD.size + size

    def count_failure(self) -> None:
        """Note that a daemon could not go on from what is here."""
        self.failures += 1
        self._write_failures()

    def clear_failures(self) -> None:
        """Note that a daemon went on from what is here."""
        if self.failures:
            self.failures = 0
            self._write_failures()

    def close(self) -> None:
        """Let go of the file, which stays. Does nothing the second time."""
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def _write_failures(self) -> None:
        # This field alone: packing the whole head into the map would clear it first.
        self._map[FAILURES_AT : FAILURES_AT + 4] = struct.pack("=I", self.failures)

    def _allocated(self, start: int, wanted: int, needed: int) -> int:
        """Have memory for a half, to grow in where there is enough; return for how many bytes.

        Memory that is not there would be a SIGBUS at the first touch.
        """
        least = min(wanted, needed + GROWTH_BYTES_LEAST)
        for end in (wanted, least):
            try:
                os.posix_fallocate(self._fd, start, end)
            except OSError as error:
                fault = error
            else:
                return end
        raise TableFull(f"no memory for {least} bytes: {fault.strerror}")

    def _half_written(self, half: int) -> _Half | None:
        """Read a half, without touching memory that may not be there: that would be a SIGBUS."""
        start = HEAD_BYTES + half * self._half_bytes
        head = os.pread(self._fd, HALF_HEAD.size, start)
        checksum, generation, size = HALF_HEAD.unpack(head)
        if not generation or size > self._half_bytes - HALF_HEAD.size:
            return None
        written = os.pread(self._fd, _end_bytes(size, self._half_bytes), start)
        sealed = zlib.crc32(memoryview(written)[HALF_HEAD.size :][:size])
        if zlib.crc32(head[CHECKSUM_BYTES:], sealed) != checksum:
            return None
        return _Half(half, generation, size, written)


class _Half(NamedTuple):
    """A half whose checksum is right, with all that may have been recorded behind its rows."""

    half: int
    generation: int
    size: int
    written: bytes


def set_aside(path: Path) -> Path:
    """Move a table out of the way under another name, over an earlier one; return that name."""
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    return aside


AllRows = Callable[[], tuple[str, Mapping[Key, object]]]


def _end_bytes(size: int, half_bytes: int) -> int:
    """Say how far records go in a half that was begun with `size` bytes of rows."""
    return min(half_bytes, HALF_HEAD.size + 2 * size + GROWTH_BYTES_MIN)


def _contents(half: _Half, epoch: str) -> Contents:
    """Go through what a half holds: the rows that it was begun with, and the records since."""
    written = memoryview(half.written)
    seed = half.generation & 0xFFFFFFFF
    rows: dict[Key, Any] = {}
    at = HALF_HEAD.size + half.size
    totals = _apply(written[HALF_HEAD.size : at], rows)
    while at + RECORD_HEAD.size <= len(written):
        size, checksum = RECORD_HEAD.unpack_from(written, at)
        body = at + RECORD_HEAD.size
        if not size or body + size > len(written):
            break
        payload = written[body : body + size]
        if zlib.crc32(payload, seed) != checksum:
            break
        totals = _apply(payload, rows)
        at = body + size
    return Contents(epoch, rows, totals)


def _apply(payload: memoryview, rows: dict[Key, Any]) -> tuple[int, int, int]:
    """Apply one record to the rows; return its totals. The checksum has vouched for it."""
    (leases, waits, expiries), changes = _decode(payload)
    for (kind, name), row in changes:
        if row is None:
            rows.pop((kind, name), None)
        else:
            rows[kind, name] = row
    return leases, waits, expiries


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise StartError(f"cannot open the lease table {path}: {error.strerror}") from None
    found = os.fstat(fd)
    why = None
    if not stat.S_ISREG(found.st_mode):
        why = "it is no file"
    elif found.st_uid != os.geteuid():
        why = f"it belongs to uid {found.st_uid}"
    elif stat.S_IMODE(found.st_mode) != 0o600:
        why = f"its mode is {stat.S_IMODE(found.st_mode):04o}, and it holds secrets; allowed: 0600"
    if why is not None:
        os.close(fd)
        raise StartError(f"cannot use the lease table {path}: {why}")
    return fd
