"""The state as people and programs see it: the answers that change nothing.

Pure functions of the state, of what is read for people besides, and of a moment in time. Every
answer is a plain map in the words of the wire; the socket and the side HTTP port show the same. A
value that could not be read is None and never 0. No token is in any of them, but for
`allocations` with `own`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from gpuorchd.core.ledger import unleased_mb
from gpuorchd.core.model import (
    NS_PER_S,
    PRIORITY_WORDS,
    ConnectionId,
    Denial,
    Device,
    DeviceUuid,
    Lease,
    LeaseId,
    LeaseState,
    Reason,
    RequestId,
    Waiter,
)
from gpuorchd.core.placement import place, unreadable
from gpuorchd.core.state import State
from gpuorchd.core.usage import UsedByLease
from libclient.wire.vocabulary import PAGE_MAX

T = TypeVar("T")

LIVE = (LeaseState.ACTIVE, LeaseState.REVOKING)
STATE_WORDS = {state: state.value for state in LeaseState}


class Moment(NamedTuple):
    """A point in time on both clocks: monotonic, as the state counts, and what people read."""

    now_ns: int
    unix_ns: int

    def unix_s(self, at_ns: int) -> float:
        """Turn a point of the monotonic clock into unix seconds."""
        return (self.unix_ns - self.now_ns + at_ns) / NS_PER_S

    def age_s(self, at_ns: int) -> float:
        """Say how long ago a point of the monotonic clock was."""
        return max(0, self.now_ns - at_ns) / NS_PER_S


class GpuShare(msgspec.Struct, gc=False):
    """What a lease may use on one GPU."""

    index: int
    uuid: str
    memory_mb: int


class Allocation(msgspec.Struct, gc=False):
    """One lease among `allocations`: a struct, for a page has a thousand of them.

    `token` is not shown where it is unset.
    """

    lease_id: str
    agent: str
    pid: int
    uid: int
    gpus: list[GpuShare]
    state: str
    timestamp: float
    used_mb: int | None
    priority: str
    preemptible: bool
    purpose: str | None
    token: str | UnsetType = UNSET


class Telemetry(Protocol):
    """Readings of one GPU that no decision depends on; None where they could not be read."""

    @property
    def utilization_gpu_pct(self) -> float | None: ...
    @property
    def memory_utilization_pct(self) -> float | None: ...
    @property
    def temperature_c(self) -> float | None: ...
    @property
    def power_draw_w(self) -> float | None: ...


class DeviceStatus(Protocol):
    """How the GPUs are being read. `sampled_ns` is on the monotonic clock."""

    @property
    def nvml_supported(self) -> bool: ...
    @property
    def nvml_enriched(self) -> bool: ...
    @property
    def nvml_init_error(self) -> str | None: ...
    @property
    def sampled_ns(self) -> int | None: ...
    @property
    def mps_enabled(self) -> bool: ...
    @property
    def mps_pipe_dir(self) -> str: ...
    @property
    def mps_control_process(self) -> bool: ...
    @property
    def message(self) -> str | None: ...


class BadCursor(ValueError):  # reads as what the peer sent
    """`after` is not the name of anything that a page could have ended with."""


def health(state: State) -> dict[str, object]:
    """Show that the daemon answers."""
    return {"status": "ok", "safe_mode": state.safe_mode}


def gpu_info(
    state: State,
    telemetry: Mapping[DeviceUuid, Telemetry],
    status: DeviceStatus,
    moment: Moment,
) -> dict[str, object]:
    """Show every GPU, or say why there is none."""
    devices = () if state.safe_mode else state.order
    answer: dict[str, object] = {
        "available": bool(devices),
        "gpus": [_gpu(state, device, telemetry.get(device.uuid), moment) for device in devices],
        "nvml_supported": status.nvml_supported,
        "nvml_enriched": status.nvml_enriched,
        "mps_enabled": status.mps_enabled,
        "mps": {
            "enabled": status.mps_enabled,
            "pipe_dir": status.mps_pipe_dir,
            "control_process": status.mps_control_process,
        },
        "sampled_s": _sampled_s(devices, moment),
    }
    if not devices:
        answer["message"] = _why_none(state, status)
    if status.nvml_init_error is not None:
        answer["nvml_init_error"] = status.nvml_init_error
    return answer


def policy_get(state: State) -> dict[str, object]:
    """Show the policy in force."""
    return {
        "revision": state.revision,
        "safe_mode": state.safe_mode,
        "safe_mode_read_only": state.safe_mode,
        "policy": state.policy.document(),
    }


def allocations(
    state: State,
    moment: Moment,
    after: str | None = None,
    limit: int | None = None,
    own: ConnectionId | None = None,
) -> dict[str, object]:
    """Show a page of leases in order of their grant, those that drain too.

    `after` may be a lease that has ended meanwhile: its number is in its name. `own` is a
    connection that sees the tokens of its leases. Raises `BadCursor`.
    """
    number = -1
    if after is not None:
        known = state.leases.get(LeaseId(after))
        number = _number_in(after) if known is None else known.number
    page, more = _page((x for x in state.leases.values() if x.number > number), limit)
    used = UsedByLease(state, moment.now_ns)
    rows = [_allocation(lease, used.of(lease), own) for lease in page]
    return {"next": page[-1].lease_id if more else None, "allocations": rows}


def queue(
    state: State,
    moment: Moment,
    after: str | None = None,
    limit: int | None = None,
    own: ConnectionId | None = None,
) -> dict[str, object]:
    """Show a page of those who wait, in the order in which they are served.

    A page goes on behind the place that the last waiter of the one before has, or had: waiters come
    and go between pages. `own` is a connection that sees its request ids. Raises `BadCursor`.
    """
    waiting: Iterable[tuple[int, Waiter]] = enumerate(state.queue, 1)
    if after is not None:
        waiting = _behind(state, after)
    page, more = _page(waiting, limit)
    rows = [_waiting(waiter, position, moment, own) for position, waiter in page]
    if page and page[0][0] == 1:
        # As `lease.queued` does: an estimate for the first, for whom nobody else is in the way.
        rows[0]["eta_s"] = _eta_s(state, page[0][1], moment)
    last = page[-1][1] if more else None
    cursor = None if last is None else f"{last.priority.value}.{last.queue_id}"
    return {"next": cursor, "waiting": rows}


def leases_of(state: State, conn: ConnectionId) -> list[LeaseId]:
    """List the live leases of one connection."""
    client = state.clients.get(conn)
    if client is None:
        return []
    return [x.lease_id for x in client.requests.values() if isinstance(x, Lease)]


def reasons_shown(reasons: Iterable[Reason]) -> list[dict[str, object]]:
    """Show why each GPU did not serve a request."""
    return [{"gpu": x.index, "reason": x.note.value, "detail": x.detail} for x in reasons]


def seconds(duration_ns: int | None) -> float | None:
    """Turn a duration into seconds; None stays None."""
    return None if duration_ns is None else duration_ns / NS_PER_S


def device_state(state: State, device: Device, now_ns: int) -> str:
    """Say how a GPU stands, in the wire's words; the gravest that applies comes first."""
    if device.cordon is not None:
        return "cordoned"
    # `unhealthy` is for a GPU that its driver reports as failed; no source reports that yet.
    return "ok" if _fresh(state, device, now_ns) else "unknown"


def _fresh(state: State, device: Device, now_ns: int) -> bool:
    return unreadable(state, device, now_ns) is None


def _gpu(
    state: State, device: Device, telemetry: Telemetry | None, moment: Moment
) -> dict[str, object]:
    used_mb: int | None = None
    free_mb: int | None = None
    outside_mb: int | None = None
    if device.facts.drain_ns is not None:
        used_mb = device.claim_mb + device.draining_mb
        free_mb = device.capacity_mb - used_mb
        outside_mb = 0
    elif device.reading is not None and _fresh(state, device, moment.now_ns):
        used_mb = device.reading.used_mb
        free_mb = device.reading.free_mb
        outside_mb = unleased_mb(device)
    return {
        "index": device.index,
        "uuid": device.uuid,
        "name": device.facts.name,
        "memory_total_mb": device.facts.total_mb,
        "memory_used_mb": used_mb,
        "memory_free_mb": free_mb,
        "memory_leased_mb": device.claim_mb,
        "memory_draining_mb": device.draining_mb,
        "memory_unleased_mb": outside_mb,
        "utilization_gpu_pct": telemetry.utilization_gpu_pct if telemetry else None,
        "memory_utilization_pct": telemetry.memory_utilization_pct if telemetry else None,
        "temperature_c": telemetry.temperature_c if telemetry else None,
        "power_draw_w": telemetry.power_draw_w if telemetry else None,
        "state": device_state(state, device, moment.now_ns),
        "leases": list(device.parts),
    }


def _sampled_s(devices: Iterable[Device], moment: Moment) -> float | None:
    ages = []
    for device in devices:
        if device.facts.drain_ns is not None:
            # A simulated card is known at every moment.
            ages.append(0.0)
        elif device.reading is not None:
            ages.append(moment.age_s(device.reading_ns))
    return max(ages, default=None)


def _why_none(state: State, status: DeviceStatus) -> str:
    if state.safe_mode:
        return "SAFE_MODE is on: no GPU is touched and none is granted"
    if state.probing:
        return "the first look for GPUs has not ended yet"
    return state.unavailable or status.message or "no GPU was found"


def _allocation(lease: Lease, used_mb: int | None, own: ConnectionId | None) -> Allocation:
    ask = lease.ask
    state = lease.state
    return Allocation(
        lease.lease_id,
        ask.agent,
        lease.holder.process.pid,
        lease.uid,
        [GpuShare(x.device.facts.index, x.device.facts.uuid, x.memory_mb) for x in lease.parts],
        STATE_WORDS[state],
        lease.granted_unix_ns / NS_PER_S,
        used_mb,
        PRIORITY_WORDS[lease.priority],
        ask.preemptible,
        ask.purpose,
        lease.token if lease.conn == own and state in LIVE else UNSET,
    )


def _waiting(
    waiter: Waiter, position: int, moment: Moment, own: ConnectionId | None
) -> dict[str, object]:
    row: dict[str, object] = {
        "queue_id": waiter.queue_id,
        "agent": waiter.ask.agent,
        "position": position,
        "priority": waiter.priority.word,
        "waited_s": moment.age_s(waiter.queued_ns),
        "eta_s": None,
        "gpus": waiter.ask.gpus,
        "min_memory_mb": waiter.ask.memory_mb,
        "exclusive": waiter.ask.exclusive,
    }
    if own is not None and waiter.conn == own:
        request_id: RequestId = waiter.request_id
        row["request_id"] = request_id
    return row


def _eta_s(state: State, waiter: Waiter, moment: Moment) -> float | None:
    found = place(state, waiter.ask, waiter.holder.process, moment.now_ns)
    if isinstance(found, Denial) and found.eta_ns is not None:
        return found.eta_ns / NS_PER_S
    return None


def _page(items: Iterable[T], limit: int | None) -> tuple[list[T], bool]:
    size = PAGE_MAX if limit is None else limit
    page = list(islice(items, size + 1))
    return page[:size], len(page) > size


def _number_in(name: str) -> int:
    digits = name[len(name.rstrip("0123456789")) :]
    if not digits or not digits.isascii() or len(digits) > 19:
        raise BadCursor(name)
    return int(digits)


def _behind(state: State, after: str) -> Iterator[tuple[int, Waiter]]:
    lane, dot, name = after.partition(".")
    number = _number_in(name if dot else after)
    if dot:
        priority = _number_in(lane)
    else:
        # A queue id, as people copy it from a table: it says nothing of the priority.
        found = next((x for x in state.queue if x.number == number), None)
        priority = -1 if found is None else found.priority.value
    for position, waiter in enumerate(state.queue, 1):
        if priority < 0:
            if waiter.number > number:
                yield position, waiter
        elif (waiter.priority, waiter.number) > (priority, number):
            yield position, waiter
