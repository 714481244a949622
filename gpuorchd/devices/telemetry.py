"""What every source of devices offers, and the readings that are for people.

A source finds the GPUs, reads them, and hands what it learns to the engine as events
(`DevicesFound`, `DevicesLost`, `ReadingsTaken`). What decisions are made from goes that way and no
other. Utilisation, temperature and power are for people: they are asked for here, they may be
missing, and no decision depends on them. Nothing in this file does I/O.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from gpuorchd.core.effects import CloseDevices, OpenDevices, TakeReading
from gpuorchd.core.events import Event
from gpuorchd.core.model import DeviceUuid
from gpuorchd.core.state import State

# Upper bounds of the call-duration histogram, in seconds: most calls take 1-20 us, a few sample
# inside the driver for tens of ms, and a driver in trouble takes seconds.
CALL_BUCKETS_S = (0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0)

NS_PER_S = 1_000_000_000


class Telemetry(NamedTuple):
    """Readings of one GPU for people. None is a value that could not be read, never zero."""

    utilization_gpu_pct: float | None = None
    memory_utilization_pct: float | None = None
    temperature_c: float | None = None
    power_draw_w: float | None = None


class DeviceStatus(NamedTuple):
    """How the devices are being read.

    `nvml_supported`: NVML started and answers. `nvml_enriched`: telemetry is read besides what
    admission needs. `nvml_init_error` is the driver's own word where it did not start.
    `sampled_ns` is the monotonic time at which the newest good reading began. `message` says in
    plain words why there is no GPU, None where there is one.
    """

    nvml_supported: bool
    nvml_enriched: bool
    nvml_init_error: str | None
    sampled_ns: int | None
    mps_enabled: bool
    mps_pipe_dir: str
    mps_control_process: bool
    message: str | None


class DeviceChecks(NamedTuple):
    """What readiness asks of the devices; `detail` is for people.

    `answering` is False for a driver that has stopped answering, and True where there is none to
    ask.
    """

    first_probe_running: bool
    answering: bool
    detail: str


class CallHistogram:
    """Durations and failures of one driver call. Counts only rise."""

    __slots__ = ("counts", "failures", "sum_ns")

    def __init__(self) -> None:
        # One per bucket of CALL_BUCKETS_S, not cumulative; the last is everything slower.
        self.counts = [0] * (len(CALL_BUCKETS_S) + 1)
        self.sum_ns = 0
        self.failures = 0

    def add(self, duration_ns: int, failed: bool) -> None:
        """Count one call."""
        self.counts[bisect_left(CALL_BUCKETS_S, duration_ns / NS_PER_S)] += 1
        self.sum_ns += duration_ns
        self.failures += failed


class DeviceSource(Protocol):
    """Where devices and their readings come from. Not thread-safe; nothing here blocks."""

    def open(self) -> None:
        """Start looking for GPUs. Does nothing where it already looks."""

    def close(self) -> None:
        """Let go of the driver at once; `open` starts anew."""

    def take_reading(self) -> None:
        """Take one more reading that starts after now. Several wishes make one reading."""

    def telemetry(self) -> Mapping[DeviceUuid, Telemetry]:
        """Give the newest readings for people, by GPU; a GPU may be missing."""

    def status(self) -> DeviceStatus:
        """Say how the devices are being read."""

    def checks(self) -> DeviceChecks:
        """Say what readiness needs to know."""

    def call_stats(self) -> Mapping[str, CallHistogram]:
        """Give the driver calls by function, their durations and failures. Do not keep it."""

    async def stop(self) -> None:
        """End for good: every child process and descriptor is given back."""


class EventSink(Protocol):
    """The part of the engine that a source of events needs."""

    def submit(self, event: Event) -> None:
        """Handle an event now, or after the one that is being handled."""

    def now_ns(self) -> int:
        """Give the clock that every time in the state is measured by."""


class DeviceEngine(EventSink, Protocol):
    """An engine whose state can be read: how often to look depends on who waits."""

    @property
    def state(self) -> State:
        """The state, to be read and never changed."""


class Report(Protocol):
    """Write one log event, by its declared name and fields."""

    def __call__(self, event: str, /, **fields: object) -> None: ...


def report_nothing(_event: str, /, **_fields: object) -> None:
    """Stand in where nobody keeps a log."""


class EffectRegistry(Protocol):
    """The part of the engine that lets a room carry out effects."""

    def on(self, kind: type[Any], actor: Callable[[Any], None]) -> None:
        """Let `actor` carry out every effect of `kind`."""


def attach_source(engine: EffectRegistry, source: DeviceSource) -> None:
    """Let `source` carry out the effects about devices."""
    engine.on(OpenDevices, lambda _effect: source.open())
    engine.on(CloseDevices, lambda _effect: source.close())
    engine.on(TakeReading, lambda _effect: source.take_reading())
