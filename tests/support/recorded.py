"""The table that a daemon would keep, in memory: what was committed, checked against the state.

`saw` after every step: the rows recorded so far are exactly those of the state, and they come
before every answer of their turn. `kept` gives them as another daemon would read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from gpuorchd.core import effects as fx
from gpuorchd.core import rows, snapshot
from gpuorchd.core.events import Kept
from gpuorchd.core.state import State
from tests.support.audit import require

_pack = msgspec.msgpack.Encoder().encode


class Table:
    """Rows by key, as committed."""

    def __init__(self) -> None:
        self.rows: dict[snapshot.Key, tuple[object, ...]] = {}
        self.totals = (0, 0, 0)

    def saw(self, state: State, effects: Sequence[fx.Effect]) -> None:
        """Take in what one step committed, and compare."""
        for place, effect in enumerate(effects):
            if isinstance(effect, fx.Commit):
                require(place == 0, "what is promised is recorded first", effects)
                self._take(effect)
        assert isinstance(effects, list)
        stands = {key: row for key, row in self.rows.items() if key[0] != rows.OUTCOME}
        wanted = snapshot.everything(state)
        require(stands.keys() == wanted.keys(), "recorded is what is there", stands, wanted)
        for key, row in wanted.items():
            require(stands[key] == row, "a row is as it stands", key, stands[key], row)
        require(self.totals[0] >= state.granted_total, "no number is given twice", self.totals)

    def _take(self, effect: fx.Commit) -> None:
        self.totals = effect.totals
        for key, row in effect.rows.items():
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = row

    def kept(self) -> Kept:
        """Give the rows as they would be read."""

        def of(kind: str, shape: type[Any]) -> tuple[Any, ...]:
            packed = [_pack(row) for key, row in self.rows.items() if key[0] == kind]
            return tuple(sorted(msgspec.msgpack.decode(row, type=shape) for row in packed))

        return Kept(
            of(rows.DEVICE, rows.DeviceRow),
            of(rows.CLIENT, rows.ClientRow),
            of(rows.LEASE, rows.LeaseRow),
            of(rows.WAITER, rows.WaiterRow),
            of(rows.OUTCOME, rows.OutcomeRow),
            self.totals,
        )
