"""The page about metrics, made from the table that the daemon exports from.

`python -m tests.support.metric_page` writes the table of docs/metrics.md anew; a test fails while
it differs from what this makes.
"""

from __future__ import annotations

from gpuorchd.observe.metric_table import TABLE
from tests.support.sources import ROOT

PAGE = ROOT / "docs" / "metrics.md"
BEGIN = "<!-- metrics: made from gpuorchd/observe/metric_table.py -->"
END = "<!-- end of metrics -->"


def metric_table() -> str:
    """Make the table of docs/metrics.md."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for spec in TABLE.values():
        labels = ", ".join(f"`{label}`" for label in spec.labels) or "none"
        lines.append(f"| `{spec.name}` | {spec.kind} | {labels} | {spec.meaning} |")
    return "\n".join(lines)


def page_with_table(page: str) -> str:
    """Put the table between the marks of the page."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{metric_table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
