"""Text for Prometheus, by prometheus_client: some rows of one metric at a time.

Importing this file imports prometheus_client, which is slow: `metrics` does it in a thread when the
first scrape comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric

from gpuorchd.observe.families import Row
from gpuorchd.observe.metric_table import Spec

# HELP and TYPE.
HEADER_LINES = 2


class _One:
    """A collector of one metric: what `generate_latest` asks."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def expose(spec: Spec, rows: Sequence[Row], *, with_header: bool) -> bytes:
    """Write these rows; the first part of a metric has its header, later parts have not."""
    # The text format's names of counters end in _total, which the library adds by itself.
    name = spec.name.removesuffix("_total") if spec.kind == "counter" else spec.name
    metric = Metric(name, spec.meaning, spec.kind)
    for row in rows:
        metric.add_sample(spec.name + row.suffix, dict(row.labels), row.value)
    text = generate_latest(_One(metric))
    if with_header:
        return text
    # A label cannot end a line: the library escapes it. So the header is the first two lines.
    return text.split(b"\n", HEADER_LINES)[HEADER_LINES]
