"""Keeping what must outlive the daemon: carries out `Commit`, and gives back what was kept.

Joins the table and, where the service manager keeps descriptors, the store. Rows of the core go
through as they come. Besides, the table holds rows of this room's own: marks of connections on
which half a frame may have left, and the configuration that the daemon runs on. Answers that may
have to be repeated are remembered here too, so that a table begun anew has them.

    start   open -> read -> typed rows, or set aside after the second try that fails
    run     Commit -> table            keep(connection) -> store
    stop    freeze: what happens from now on is not recorded
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from gpuorchd.core import rows as kinds
from gpuorchd.core import snapshot
from gpuorchd.core.effects import Commit
from gpuorchd.core.events import Kept
from gpuorchd.core.model import Token
from gpuorchd.core.rows import ClientRow, DeviceRow, LeaseRow, OutcomeRow, WaiterRow
from gpuorchd.core.state import State
from gpuorchd.host.descriptors import DescriptorStore, Teller
from gpuorchd.host.settings_file import boot_id
from gpuorchd.host.start import Report, StartError
from gpuorchd.host.table import TRIES, Contents, Damaged, Key, Table, TableFull, set_aside

TABLE_NAME = "leases"
# Rows of this room: connections with half a frame, and the configuration in force.
HALF_SENT = "p"
CONFIG = "k"
# How a token's digest begins, which may be shown.
DIGEST = "sha256:"
_MOUNTS = Path("/proc/self/mountinfo")
# What one request and what follows from it may need at most; less room than that grants nothing.
ROOM_BYTES_MIN = 512 * 1024


class Found(NamedTuple):
    """What an earlier daemon left: the epoch, its rows, and what this room kept beside them."""

    epoch: str
    kept: Kept
    half_sent: frozenset[int]
    config: Mapping[str, str]


class Keeper:
    """The table and the store of one daemon. Call it on the loop; `close` gives both back."""

    def __init__(
        self, path: Path, boot: str, report: Report, digest_of: Callable[[Token], Token]
    ) -> None:
        """Open the table. Raises StartError where it cannot be had.

        Where it lies on a disk `digest_of` names leases in place of their tokens.
        """
        self._report = report
        self._digest_of = digest_of
        # Where secrets must not be kept, and connections not outlive the daemon.
        self.on_disk = not lies_in_memory(path)
        try:
            self._table = Table(path, boot)
        except Damaged as fault:
            self._tell_set_aside(path, set_aside(path), str(fault))
            self._table = Table(path, boot)
        self._epoch = ""
        self._state: State | None = None
        self._own: dict[Key, Any] = {}
        self._frozen = True
        self._store: DescriptorStore | None = None
        # Why nothing can be recorded any more, None where all is well.
        self.failure: str | None = None

    def read(self) -> Found | None:
        """Read what was left. A table that cannot be read twice is set aside and reported.

        Raises the fault of the first try: the service manager starts the daemon again.
        """
        try:
            contents = self._table.read()
            if contents is None:
                return None
            found = _typed(contents)
        except Damaged as fault:
            self._set_aside(str(fault))
            return None
        except Exception as fault:  # whatever it is, it must not be met again and again
            self.failed(fault)
            return None
        # Answers that may still have to be given again are kept until their connection ends.
        self._own = {key: row for key, row in contents.rows.items() if key[0] == kinds.OUTCOME}
        return found

    def failed(self, fault: Exception) -> None:
        """Take note that this daemon could not go on from the table; raise, or set it aside."""
        self._table.count_failure()
        if self._table.failures < TRIES:
            raise fault
        self._set_aside(f"{type(fault).__name__}: {fault}")

    def begin(self, state: State, config: Mapping[str, str]) -> None:
        """Write everything anew as it stands, and record every change from now on."""
        self._state = state
        self._epoch = state.settings.epoch
        self._own[CONFIG, 0] = dict(config)
        self._frozen = False
        try:
            self._table.begin(self._epoch, self._everything()[1], snapshot.totals(state))
        except TableFull as fault:
            self._fail(fault)

    def went_on(self) -> None:
        """Take note that this daemon has gone on from what was left."""
        self._table.clear_failures()

    def serve_store(
        self,
        teller: Teller,
        loop: asyncio.AbstractEventLoop,
        bound: int,
        stored: tuple[int, ...],
    ) -> None:
        """Use the service manager's descriptor store from now on."""
        self._store = DescriptorStore(teller, loop, bound, stored)

    @property
    def path(self) -> Path:
        """Where the table lies."""
        return self._table.path

    @property
    def has_store(self) -> bool:
        """Whether connections outlive this process."""
        return self._store is not None

    @property
    def stored(self) -> int:
        """How many connections are in the descriptor store."""
        return 0 if self._store is None else self._store.count

    def commit(self, effect: Commit) -> None:
        """Record what a turn changed."""
        own = self._own
        for key, row in effect.rows.items():
            if key[0] == kinds.OUTCOME:
                if row is None:
                    own.pop(key, None)
                else:
                    own[key] = row
        if not self._frozen:
            self._write(effect.rows, effect.totals)

    def mark_half_sent(self, conn: int, on: bool) -> None:
        """Note that a part of a frame may be about to leave on a connection, or that all has."""
        key = (HALF_SENT, conn)
        if on:
            self._own[key] = (conn,)
        else:
            self._own.pop(key, None)
        if not self._frozen and self._state is not None:
            self._write({key: (conn,) if on else None}, snapshot.totals(self._state))

    def refusal(self, stored: bool) -> str | None:
        """Say why no new lease or wait could outlive this daemon, None where one can.

        `stored`: its connection is in the store already.
        """
        if self.failure is not None:
            self._compact()
        if self.failure is not None:
            return f"the lease table cannot be written: {self.failure}"
        if self._table.room_bytes < ROOM_BYTES_MIN:
            self._compact()
            if self._table.room_bytes < ROOM_BYTES_MIN:
                return f"the lease table is full: {self._table.used_bytes} bytes"
        if self._store is not None and not stored:
            full = self._store.full()
            return None if full is None else f"{full}; this bound is reached"
        return None

    def keep(self, conn: int, fd: int, then: Callable[[str | None], None]) -> None:
        """Put a connection into the store; `then` is called with None or why it is not there."""
        assert self._store is not None, "there is no store"
        self._store.keep(conn, fd, then)

    def drop(self, conn: int) -> None:
        """Forget a connection that has ended."""
        if self._store is not None:
            self._store.drop(conn)
        if (HALF_SENT, conn) in self._own:
            self.mark_half_sent(conn, on=False)

    def freeze(self) -> None:
        """Record nothing from now on: another daemon goes on from what is there."""
        self._frozen = True

    def close(self) -> None:
        """Give back what is open. The table stays, and so do the descriptors in the store."""
        self._frozen = True
        if self._store is not None:
            self._store.close()
        self._table.close()

    def _write(
        self, rows: Mapping[Key, tuple[object, ...] | None], totals: tuple[int, int, int]
    ) -> None:
        if self.failure is not None:
            # What could not be recorded is part of everything by now.
            self._compact()
            return
        if self.on_disk:
            rows = self._without_secrets(rows)
        try:
            self._table.commit(rows, totals, self._everything)
        except TableFull as fault:
            self._fail(fault)

    def _compact(self) -> None:
        assert self._state is not None, "asked before anything was begun"
        try:
            self._table.begin(self._epoch, self._everything()[1], snapshot.totals(self._state))
        except TableFull as fault:
            self._fail(fault)
        else:
            self._mend()

    def _everything(self) -> tuple[str, Mapping[Key, object]]:
        assert self._state is not None, "asked before anything was begun"
        rows: Mapping[Key, Any] = {**snapshot.everything(self._state), **self._own}
        return self._epoch, self._without_secrets(rows) if self.on_disk else rows

    def _without_secrets(self, rows: Mapping[Key, Any]) -> Mapping[Key, Any]:
        """Leave out what lets anybody in: nobody who needs it comes back without a store."""
        found = {k: row for k, row in rows.items() if k[0] not in (kinds.WAITER, kinds.OUTCOME)}
        for key, row in found.items():
            if type(row) is LeaseRow and row.token and not row.token.startswith(DIGEST):
                found[key] = row._replace(token=self._digest_of(row.token))
        return found

    def _fail(self, fault: TableFull) -> None:
        if self.failure is None:
            self._report("host.table_failed", path=str(self._table.path), error=str(fault))
        self.failure = str(fault)

    def _mend(self) -> None:
        if self.failure is not None:
            self.failure = None
            self._report("host.table_mended", path=str(self._table.path))

    def _set_aside(self, why: str) -> None:
        path, boot = self._table.path, self._table.boot
        self._table.close()
        self._tell_set_aside(path, set_aside(path), why)
        self._table = Table(path, boot)

    def _tell_set_aside(self, path: Path, aside: Path, why: str) -> None:
        self._report("host.table_set_aside", path=str(path), kept_as=str(aside), damage=why)


def lies_in_memory(path: Path) -> bool:
    """Whether a file there is gone with the machine's power: on a memory file system."""
    where = os.path.realpath(path.parent)
    best, kind = "", ""
    for line in _MOUNTS.read_text().splitlines():
        # Mount point, and the type behind a lone dash; octal escapes stand for odd characters.
        fields = line.split(" ")
        point = fields[4].encode().decode("unicode_escape")
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[fields.index("-") + 1]
    return kind in ("tmpfs", "ramfs")


def kept_config(folder: str) -> Mapping[str, str]:
    """Read the configuration that the daemon before ran on; empty where none can be read."""
    path = Path(folder) / TABLE_NAME
    if not folder or not path.is_file():
        return {}
    try:
        table = Table(path, boot_id())
    except (StartError, Damaged):
        return {}
    try:
        contents = table.read()
        return {} if contents is None else _typed(contents).config
    except Exception:  # it is met again, and told, by the daemon that opens it to go on
        return {}
    finally:
        table.close()


def _typed(contents: Contents) -> Found:
    """Give the rows their types. Raises `msgspec.ValidationError` for what is none."""
    found: dict[str, list[Any]] = {}
    for (kind, _), row in sorted(contents.rows.items(), key=lambda item: item[0][0]):
        found.setdefault(kind, []).append(row)

    def rows_of(kind: str, shape: type[Any]) -> tuple[Any, ...]:
        typed = [msgspec.convert(row, shape) for row in found.get(kind, ())]
        # By number, outcomes within their connection; devices by name.
        return tuple(sorted(typed, key=lambda row: (row[1], row[0]) if kind == "o" else row[0]))

    kept = Kept(
        rows_of(kinds.DEVICE, DeviceRow),
        rows_of(kinds.CLIENT, ClientRow),
        rows_of(kinds.LEASE, LeaseRow),
        rows_of(kinds.WAITER, WaiterRow),
        rows_of(kinds.OUTCOME, OutcomeRow),
        contents.totals,
    )
    half_sent = frozenset(int(row[0]) for row in found.get(HALF_SENT, ()))
    configs = msgspec.convert(found.get(CONFIG, []), list[dict[str, str]])
    return Found(contents.epoch, kept, half_sent, configs[0] if configs else {})
