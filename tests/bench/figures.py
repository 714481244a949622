"""Figures with their spread, tables for people, JSON for programs, and what was aimed at."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.bench.surroundings import machine, machine_line


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the tenth and ninetieth percentile around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), percentile(values, 10), percentile(values, 90))

    def shown(self, digits: int = 1) -> str:
        """Write it as `median (low to high)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(slots=True)
class Report:
    """What a benchmark found: rows for people, figures for programs, aims that were missed."""

    title: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def add(self, name: str, label: str, shown: str, figure: object) -> None:
        """Add one figure."""
        self.rows.append((label, shown))
        self.figures[name] = figure

    def add_spread(self, name: str, label: str, spread: Spread, unit: str, digits: int = 1) -> None:
        """Add a figure with its spread."""
        shown = f"{spread.shown(digits)} {unit}".rstrip()
        self.add(name, label, shown, [spread.median, spread.low, spread.high])

    def aim(self, what: str, reached: bool) -> None:
        """Say whether an aim was reached."""
        self.rows.append(("aim: " + what, "reached" if reached else "MISSED"))
        if not reached:
            self.missed.append(what)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of the values lie (nearest rank)."""
    ordered = sorted(values)
    rank = min(len(ordered) - 1, int(len(ordered) * percent / 100))
    return ordered[rank]


def run(measure: Callable[[argparse.Namespace], Report], parser: argparse.ArgumentParser) -> int:
    """Measure and print; return 1 where an aim was missed."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    report = measure(options)
    if options.json:
        found = {"title": report.title, "figures": report.figures, "missed": report.missed}
        print(json.dumps({"machine": machine(), **found}))
    else:
        print(f"{report.title}\n  {machine_line()}")
        width = max(len(label) for label, _ in report.rows)
        for label, shown in report.rows:
            print(f"  {label:<{width}}  {shown}")
    return 1 if report.missed else 0
