"""Tables and memory bars of plain text, fitted to a width.

A table that is too wide first does without what only goes with it (columns of `EXTRA_RANK` on),
then cuts its flexible columns, then leaves out others, those of the highest rank first. Without a
width (a pipe or a file) nothing is cut or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from libclient.cli.text import Paint, cells, cut

GAP = "  "
# From here on a column is left out before a name of any other is cut.
EXTRA_RANK = 5


class Column(NamedTuple):
    """How a column is shown.

    `least` is the width it may be cut to, None where cutting would change its meaning. `rank` 0 is
    always shown; the higher it is, the sooner the column is left out.
    """

    title: str
    right: bool = False
    least: int | None = None
    rank: int = 0


class Cell(NamedTuple):
    """One value and its style. `painted` is shown in place of the text, at the same width."""

    text: str
    style: str = ""
    painted: str = ""


Row = Sequence[Cell]


def table(
    columns: Sequence[Column],
    rows: Sequence[Row],
    width: int | None,
    paint: Paint,
    ellipsis: str = "…",
) -> list[str]:
    """Return the lines of a table: titles, then one line a row."""
    shown = list(range(len(columns)))
    natural = [
        max([cells(column.title), *(cells(row[place].text) for row in rows)])
        for place, column in enumerate(columns)
    ]
    widths = _fitted(columns, natural, shown, width)
    titles = [Cell(column.title, "dim") for column in columns]
    return [_line(columns, shown, widths, row, paint, ellipsis) for row in (titles, *rows)]


def _fitted(
    columns: Sequence[Column], natural: Sequence[int], shown: list[int], width: int | None
) -> list[int]:
    """Return the width of every column, leaving out of `shown` what cannot be fitted."""
    widths = list(natural)
    if width is None:
        return widths

    def excess() -> int:
        return sum(widths[place] for place in shown) + len(GAP) * (len(shown) - 1) - width

    while (over := excess()) > 0:
        extra = [p for p in shown if columns[p].rank >= EXTRA_RANK]
        flexible = [p for p in extra or shown if widths[p] > max(columns[p].least or widths[p], 1)]
        if flexible:
            widest = max(flexible, key=lambda p: widths[p])
            least = columns[widest].least or 1
            widths[widest] = max(least, widths[widest] - over)
            continue
        droppable = extra or [p for p in shown if columns[p].rank]
        if not droppable:
            break
        shown.remove(max(droppable, key=lambda p: columns[p].rank))
        # What was cut for the column that is gone may be whole again.
        widths = list(natural)
    return widths


def _line(
    columns: Sequence[Column],
    shown: Sequence[int],
    widths: Sequence[int],
    row: Row,
    paint: Paint,
    ellipsis: str,
) -> str:
    parts = []
    for place in shown:
        cell = row[place]
        text = cut(cell.text, widths[place], ellipsis)
        pad = " " * (widths[place] - cells(text))
        body = cell.painted if cell.painted and text == cell.text else paint(text, cell.style)
        parts.append(pad + body if columns[place].right else body + pad)
    return GAP.join(parts).rstrip()


def flow(
    parts: Sequence[Cell], width: int | None, paint: Paint, ellipsis: str = "…", gap: str = GAP
) -> list[str]:
    """Return cells one after another, on as many lines as a width needs; None is one line.

    A cell that has no room on a line of its own is cut.
    """
    lines: list[list[Cell]] = [[]]
    used = 0
    for part in parts:
        cell = part if width is None else part._replace(text=cut(part.text, width, ellipsis))
        size = cells(cell.text)
        if lines[-1] and width is not None and used + cells(gap) + size > width:
            lines.append([])
            used = 0
        used += size + (cells(gap) if lines[-1] else 0)
        lines[-1].append(cell)
    return [gap.join(paint(cell.text, cell.style) for cell in line) for line in lines]


class Segment(NamedTuple):
    """A part of a bar: how much, and the character and style that stand for it."""

    amount: int
    mark: str
    style: str


def bar(segments: Sequence[Segment], width: int, paint: Paint) -> Cell:
    """Return a bar of `width` columns, shared among the segments by their amounts.

    What is not nothing gets a column at least, as far as there are columns: a small lease is seen.
    """
    lengths = bar_lengths([segment.amount for segment in segments], width)
    text = "".join(s.mark * n for s, n in zip(segments, lengths, strict=True))
    painted = "".join(paint(s.mark * n, s.style) for s, n in zip(segments, lengths, strict=True))
    return Cell(text, "", painted)


def bar_lengths(amounts: Sequence[int], width: int) -> list[int]:
    """Share `width` columns among amounts; together they are `width`, unless all are 0."""
    amounts = [max(0, amount) for amount in amounts]
    total = sum(amounts)
    if total == 0:
        return [0] * len(amounts)
    exact = [amount * width / total for amount in amounts]
    lengths = [max(1, int(share)) if share > 0 else 0 for share in exact]
    while (missing := width - sum(lengths)) != 0:
        step = 1 if missing > 0 else -1
        able = [p for p, n in enumerate(lengths) if exact[p] > 0 and n + step >= 1]
        if not able:
            break
        # To whom it is owed most, or from whom least.
        place = max(able, key=lambda p: step * (exact[p] - lengths[p]))
        lengths[place] += step
    return lengths
