"""Rows of every metric, made of counts, state and other rooms' figures when a scrape asks.

One method makes the rows of a few metrics that belong together: nothing here waits, formats
or keeps anything. A source that is missing, or a value that is not known, gives no row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING, NamedTuple

from gpuorchd.core.model import Priority
from gpuorchd.observe import metric_table as table
from gpuorchd.observe.metric_table import Spec
from gpuorchd.observe.sources import ObservedEngine, Sources
from gpuorchd.observe.survey import GpuMemory, Survey
from gpuorchd.observe.tally import NS_PER_S, Histogram
from libclient.wire.vocabulary import ADMIN_OPS, OPEN_OPS

if TYPE_CHECKING:
    from gpuorchd.observe.metrics import Counts

BYTES_PER_MIB = 1_048_576
OPS = frozenset((*OPEN_OPS, *ADMIN_OPS))
# Driver functions and other names that come from our own code: the bound is for surprises.
NAMES_MAX = 64
# Of the driver's word for its failure.
ERROR_CHARS = 200
# What PCT readings are divided by: ratios are the base unit.
PCT = 100.0

INF = "+Inf"


class Row(NamedTuple):
    """One sample: what its name adds to the metric's, its labels, its value."""

    suffix: str
    labels: Mapping[str, str]
    value: float


Family = tuple[Spec, list[Row]]
NO_LABELS: Mapping[str, str] = {}


def _single(spec: Spec, value: float | None) -> Family:
    return spec, [] if value is None else [Row("", NO_LABELS, value)]


def _labelled(spec: Spec, values: Mapping[str, float]) -> Family:
    label = spec.labels[0]
    return spec, [Row("", {label: name}, value) for name, value in values.items()]


def _histogram(
    bounds_s: Sequence[float], counts: Sequence[int], sum_ns: int, labels: Mapping[str, str]
) -> list[Row]:
    cumulative = list(accumulate(counts))
    bounds = (*(f"{bound_s:g}" for bound_s in bounds_s), INF)
    rows = [
        Row("_bucket", {**labels, "le": bound}, count)
        for bound, count in zip(bounds, cumulative, strict=True)
    ]
    rows.append(Row("_sum", labels, sum_ns / NS_PER_S))
    rows.append(Row("_count", labels, cumulative[-1]))
    return rows


def _own_histogram(spec: Spec, histogram: Histogram) -> Family:
    return spec, _histogram(histogram.bounds_s, histogram.counts, histogram.sum_ns, NO_LABELS)


class Families:
    """Make all families for one scrape."""

    def __init__(
        self, engine: ObservedEngine, counts: Counts, sources: Sources, survey: Survey
    ) -> None:
        self._engine = engine
        self._counts = counts
        self._sources = sources
        self._survey = survey

    def slices(self) -> list[Callable[[], Iterator[Family]]]:
        """The parts of a scrape in the order of the page; each is made in one go."""
        return [
            self.daemon,
            self.leases,
            self.requests,
            self.lease_outcomes,
            self.durations,
            self.gpu_memory,
            self.gpu_readings,
            self.driver,
            self.server,
        ]

    def daemon(self) -> Iterator[Family]:
        """How the daemon itself is."""
        state, counts = self._engine.state, self._counts
        yield _single(table.UPTIME, (self._engine.now_ns() - counts.started_ns) / NS_PER_S)
        yield _single(table.SAFE_MODE, int(state.safe_mode))
        yield _single(table.POLICY_REVISION, state.revision)
        if self._sources.settings_damaged is not None:
            yield _single(table.SETTINGS_DAMAGED, int(self._sources.settings_damaged()))
        yield _own_histogram(table.LOOP_LAG, counts.lag)

    def leases(self) -> Iterator[Family]:
        """Who holds and who waits."""
        state, survey = self._engine.state, self._survey
        yield _single(table.ACTIVE_LEASES, state.live_leases)
        yield _labelled(table.LEASES, survey.by_state)
        agents = self._counts.agents
        shown = agents.assign(survey.leased_mb_by_agent, self._engine.now_ns())
        leased: Counter[str] = Counter(dict.fromkeys(agents.names(), 0))
        for agent, memory_mb in survey.leased_mb_by_agent.items():
            leased[shown[agent]] += memory_mb * BYTES_PER_MIB
        yield _labelled(table.AGENT_LEASED, leased)
        depth = {priority.word: state.queue.depth(priority) for priority in Priority}
        yield _labelled(table.QUEUE_DEPTH, depth)
        yield _single(table.WITHHELD, survey.withheld_mb * BYTES_PER_MIB)

    def requests(self) -> Iterator[Family]:
        """What was asked and how it was answered."""
        read = self._sources.request_counts
        if read is None:
            return
        answered: Counter[tuple[str, str]] = Counter()
        # There from the start: what appears only with its first count has no rate before it.
        releases: Counter[str] = Counter({"ok": 0})
        for (op, outcome), count in read().items():
            answered[op if op in OPS else "unknown", outcome] += count
            if op == "release":
                releases[outcome] += count
        rows = [
            Row("", {"op": op, "outcome": outcome}, count)
            for (op, outcome), count in sorted(answered.items())
        ]
        yield table.REQUESTS, rows
        yield _labelled(table.RELEASE_REQUESTS, releases)

    def lease_outcomes(self) -> Iterator[Family]:
        """How lease requests and leases ended."""
        counts = self._counts
        yield _labelled(table.LEASE_REQUESTS, counts.lease_outcomes())
        yield _labelled(table.DENIALS, counts.denials)
        yield _single(table.EXPIRED, self._engine.state.expired_total)
        yield _single(table.WITHHELD_TOTAL, counts.events.get("lease.withheld", 0))
        yield _single(table.WITHHELD_BYTES_TOTAL, counts.withheld_mb * BYTES_PER_MIB)
        yield _labelled(table.EVENTS, counts.events)

    def durations(self) -> Iterator[Family]:
        """How long things took."""
        counts = self._counts
        yield _own_histogram(table.WAIT, counts.wait)
        yield _own_histogram(table.GRANT, counts.grant)
        yield _own_histogram(table.DRAIN, counts.drain)

    def gpu_memory(self) -> Iterator[Family]:
        """Each GPU's memory."""
        yield self._per_gpu(table.GPU_TOTAL, lambda gpu: gpu.total_mb)
        yield self._per_gpu(table.GPU_USED, lambda gpu: gpu.used_mb)
        yield self._per_gpu(table.GPU_LEASED, lambda gpu: gpu.leased_mb)
        yield self._per_gpu(table.GPU_DRAINING, lambda gpu: gpu.draining_mb)
        yield self._per_gpu(table.GPU_UNLEASED, lambda gpu: gpu.unleased_mb)

    def _per_gpu(self, spec: Spec, read: Callable[[GpuMemory], int | None]) -> Family:
        rows = []
        for gpu in self._survey.gpus:
            memory_mb = read(gpu)
            if memory_mb is not None:
                rows.append(Row("", _gpu_labels(gpu), memory_mb * BYTES_PER_MIB))
        return spec, rows

    def gpu_readings(self) -> Iterator[Family]:
        """Each GPU's readings for people."""
        read = self._sources.telemetry
        if read is None:
            return
        telemetry = read()
        columns: dict[Spec, list[Row]] = {
            table.GPU_UTILIZATION: [],
            table.GPU_MEMORY_UTILIZATION: [],
            table.GPU_TEMPERATURE: [],
            table.GPU_POWER: [],
        }
        for gpu in self._survey.gpus:
            entry = telemetry.get(gpu.uuid)
            if entry is None:
                continue
            values = (
                _ratio(entry.utilization_gpu_pct),
                _ratio(entry.memory_utilization_pct),
                entry.temperature_c,
                entry.power_draw_w,
            )
            for rows, value in zip(columns.values(), values, strict=True):
                if value is not None:
                    rows.append(Row("", _gpu_labels(gpu), value))
        yield from columns.items()

    def driver(self) -> Iterator[Family]:
        """How the driver answers."""
        if self._sources.driver_status is not None:
            status = self._sources.driver_status()
            yield _single(table.NVML_SUPPORTED, int(status.nvml_supported))
            error = status.nvml_init_error
            yield _labelled(table.NVML_ERROR, {} if error is None else {error[:ERROR_CHARS]: 1})
            yield _single(table.MPS_ENABLED, int(status.mps_enabled))
        if self._sources.driver_calls is not None:
            calls = list(islice(self._sources.driver_calls().items(), NAMES_MAX))
            bounds_s = self._sources.driver_call_buckets_s
            rows: list[Row] = []
            for function, stats in calls:
                labels = {"function": function}
                rows += _histogram(bounds_s, stats.counts, stats.sum_ns, labels)
            # Made before the first yield: the loop may run in between, and the source moves on.
            failures = {name: stats.failures for name, stats in calls}
            yield table.NVML_CALLS, rows
            yield _labelled(table.NVML_FAILURES, failures)

    def server(self) -> Iterator[Family]:
        """What the server and the log carry."""
        sources = self._sources
        for spec, read in (
            (table.CONNECTIONS, sources.connections_open),
            (table.UNSENT, sources.unsent_bytes),
            (table.ACCEPT_FAILURES, sources.accept_failures),
            (table.SUBSCRIBERS, sources.subscribers),
            (table.EVENTS_LOST, sources.events_lost),
            (table.LOG_SUPPRESSED, sources.log_suppressed),
            (table.LOG_LOST, sources.log_lost),
        ):
            if read is not None:
                yield _single(spec, read())
        if sources.limits_reached is not None:
            bounds = dict(islice(sources.limits_reached().items(), NAMES_MAX))
            yield _labelled(table.LIMITS, bounds)


def _gpu_labels(gpu: GpuMemory) -> Mapping[str, str]:
    return {"index": str(gpu.index), "uuid": gpu.uuid}


def _ratio(pct: float | None) -> float | None:
    return None if pct is None else pct / PCT
