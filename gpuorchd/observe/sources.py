"""What this room needs of the others, as shapes: it imports none of them.

`ObservedEngine` is the part of the engine that is watched. `Sources` are the figures that other
rooms keep and that are read at a scrape; each has a default, so that a room that is missing (no
HTTP, no device source yet) leaves its series out instead of showing a zero that nobody measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpuorchd.core.state import State


class ObservedEngine(Protocol):
    """The part of the engine that is watched."""

    @property
    def turns(self) -> int:
        """Turns completed: the cause of what happens now."""

    @property
    def state(self) -> State:
        """The state, to be read and never changed."""

    def now_ns(self) -> int:
        """Give the clock that every time in the state is measured by."""

    def on(self, kind: type[Any], actor: Callable[[Any], None], /) -> None:
        """Let `actor` see every effect of `kind`."""


class CallStats(Protocol):
    """Durations and failures of one driver call.

    `counts` is per bucket, not cumulative, the last for everything above the last bound.
    """

    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def sum_ns(self) -> int: ...
    @property
    def failures(self) -> int: ...


class GpuTelemetry(Protocol):
    """Readings of one GPU for people; None is a value that could not be read."""

    @property
    def utilization_gpu_pct(self) -> float | None: ...
    @property
    def memory_utilization_pct(self) -> float | None: ...
    @property
    def temperature_c(self) -> float | None: ...
    @property
    def power_draw_w(self) -> float | None: ...


class DriverStatus(Protocol):
    """How the devices are being read."""

    @property
    def nvml_supported(self) -> bool: ...
    @property
    def nvml_init_error(self) -> str | None: ...
    @property
    def mps_enabled(self) -> bool: ...
    @property
    def mps_control_process(self) -> bool: ...
    @property
    def mps_pipe_dir(self) -> str: ...


class DriverChecks(Protocol):
    """What readiness asks of the devices."""

    @property
    def first_probe_running(self) -> bool: ...
    @property
    def answering(self) -> bool: ...
    @property
    def detail(self) -> str: ...


@dataclass(slots=True)
class Sources:
    """Figures of other rooms, read at a scrape. None: that room does not run."""

    # Requests answered, by op and outcome: `ok`, `granted`, a denial's note, or an error's code.
    request_counts: Callable[[], Mapping[tuple[str, str], int]] | None = None
    connections_open: Callable[[], int] | None = None
    unsent_bytes: Callable[[], int] | None = None
    accept_failures: Callable[[], int] | None = None
    subscribers: Callable[[], int] | None = None
    events_lost: Callable[[], int] | None = None
    # How often each bound was met, by its name.
    limits_reached: Callable[[], Mapping[str, int]] | None = None
    # Whether settings that could not be read were replaced by defaults.
    settings_damaged: Callable[[], bool] | None = None
    driver_status: Callable[[], DriverStatus] | None = None
    telemetry: Callable[[], Mapping[Any, GpuTelemetry]] | None = None
    driver_calls: Callable[[], Mapping[str, CallStats]] | None = None
    # Upper bounds of the buckets of `driver_calls`, in seconds.
    driver_call_buckets_s: Sequence[float] = ()
    log_suppressed: Callable[[], int] | None = None
    log_lost: Callable[[], int] | None = None
