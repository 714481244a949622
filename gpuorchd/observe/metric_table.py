"""Every metric that is exported, declared once: name, type, labels, meaning.

docs/metrics.md shows this table and is checked against it. Names begin with `gpu_orchestrator_`;
units are base units (bytes, seconds) and stand in the name. A value that is not known has no
sample: unknown is never zero.
"""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "gpu_orchestrator_"

# Upper bounds of the histograms, in seconds. A wait may last a week; a grant takes microseconds;
# a driver gives memory back after some 70-170 ms; a loop that is a millisecond late shows.
WAIT_BOUNDS_S = (0.001, 0.01, 0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 1_800.0, 7_200.0, 86_400.0)
GRANT_BOUNDS_S = (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.005, 0.02, 0.1)
DRAIN_BOUNDS_S = (0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
LAG_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Spec(NamedTuple):
    """One metric. `kind` is counter, gauge or histogram."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


TABLE: dict[str, Spec] = {}


def _spec(short: str, kind: str, meaning: str, *labels: str) -> Spec:
    spec = TABLE[PREFIX + short] = Spec(PREFIX + short, kind, labels, meaning)
    return spec


GPU = ("index", "uuid")

UPTIME = _spec("uptime_seconds", "gauge", "Time since the daemon started")
SAFE_MODE = _spec("safe_mode", "gauge", "1 while SAFE_MODE is on")
POLICY_REVISION = _spec("policy_revision", "gauge", "Revision of the policy in force")
SETTINGS_DAMAGED = _spec(
    "settings_damaged",
    "gauge",
    "1 while defaults stand for settings that could not be read, until the policy is set",
)
ACTIVE_LEASES = _spec("active_leases", "gauge", "Live leases, draining ones not counted")
LEASES = _spec("leases", "gauge", "Leases by state, those that still keep bytes included", "state")
AGENT_LEASED = _spec(
    "agent_leased_bytes",
    "gauge",
    "Memory of live leases by agent over all GPUs; 64 names, the rest as other",
    "agent",
)
QUEUE_DEPTH = _spec("queue_depth", "gauge", "Waiting requests by priority", "priority")

REQUESTS = _spec(
    "requests_total",
    "counter",
    "Requests answered, by op and outcome: ok, granted, a denial's note, or the error's code",
    "op",
    "outcome",
)
LEASE_REQUESTS = _spec(
    "lease_requests_total",
    "counter",
    "Lease requests decided: granted, denied, timeout or cancelled",
    "outcome",
)
RELEASE_REQUESTS = _spec(
    "release_requests_total", "counter", "Release requests answered, by outcome", "outcome"
)
DENIALS = _spec("lease_denials_total", "counter", "Lease requests not granted, by note", "note")
EXPIRED = _spec("lease_expired_total", "counter", "Leases that were not renewed in time")
EVENTS = _spec("events_total", "counter", "Events announced, by name", "event")
WAIT = _spec(
    "lease_wait_seconds", "histogram", "From a lease request to its grant, waiting included"
)
GRANT = _spec("lease_grant_seconds", "histogram", "From handling the decisive event to the answer")
DRAIN = _spec("lease_drain_seconds", "histogram", "From a lease's end until its bytes were free")
WITHHELD_TOTAL = _spec(
    "leases_withheld_total",
    "counter",
    "Leases whose bytes did not come back within the drain timeout",
)
WITHHELD_BYTES_TOTAL = _spec(
    "leases_withheld_bytes_total",
    "counter",
    "Memory that had not come back at the drain timeout, counted once for each lease",
)
WITHHELD = _spec(
    "withheld_bytes",
    "gauge",
    "Memory of ended leases that is kept back beyond the drain timeout now",
)

GPU_TOTAL = _spec("gpu_memory_total_bytes", "gauge", "Memory of the GPU", *GPU)
GPU_USED = _spec("gpu_memory_used_bytes", "gauge", "Memory in use as the driver shows it", *GPU)
GPU_LEASED = _spec("gpu_memory_leased_bytes", "gauge", "Memory promised to live leases", *GPU)
GPU_DRAINING = _spec(
    "gpu_memory_draining_bytes", "gauge", "Memory of ended leases that is not free yet", *GPU
)
GPU_UNLEASED = _spec("gpu_memory_unleased_bytes", "gauge", "Memory in use outside any lease", *GPU)
GPU_UTILIZATION = _spec("gpu_utilization_ratio", "gauge", "Share of time the GPU was busy", *GPU)
GPU_MEMORY_UTILIZATION = _spec(
    "gpu_memory_utilization_ratio", "gauge", "Share of time the GPU's memory was busy", *GPU
)
GPU_TEMPERATURE = _spec("gpu_temperature_celsius", "gauge", "Temperature of the GPU", *GPU)
GPU_POWER = _spec("gpu_power_watts", "gauge", "Power that the GPU draws", *GPU)

NVML_SUPPORTED = _spec("nvml_supported", "gauge", "1 while NVML answers")
NVML_ERROR = _spec(
    "nvml_error_info", "gauge", "1 with the driver's word why NVML did not start", "error"
)
MPS_ENABLED = _spec("mps_enabled", "gauge", "1 while CUDA MPS runs and is used")
NVML_CALLS = _spec(
    "nvml_call_duration_seconds", "histogram", "Time that driver calls took", "function"
)
NVML_FAILURES = _spec("nvml_call_failures_total", "counter", "Driver calls that failed", "function")

CONNECTIONS = _spec("connections_open", "gauge", "Open connections on the Unix socket")
UNSENT = _spec("unsent_bytes", "gauge", "Replies and events that clients have not taken yet")
ACCEPT_FAILURES = _spec(
    "accept_failures_total",
    "counter",
    "Times that no connection could be accepted for want of descriptors or memory",
)
SUBSCRIBERS = _spec("subscribers", "gauge", "Subscriptions to events")
EVENTS_LOST = _spec(
    "events_lost_total", "counter", "Events dropped for subscribers that read too slowly"
)
LIMITS = _spec(
    "limits_reached_total", "counter", "Requests and connections refused, by bound", "bound"
)
LOOP_LAG = _spec("event_loop_lag_seconds", "histogram", "How late the event loop ran a timer")
LOG_SUPPRESSED = _spec(
    "log_lines_suppressed_total", "counter", "Log lines left out by the rate bound"
)
LOG_LOST = _spec("log_lines_lost_total", "counter", "Log lines lost because nobody took the output")
