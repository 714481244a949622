"""What admins change: policy, SAFE_MODE, cordons. Kept on disk before it takes effect.

One change is on its way to the disk at a time; those that come meanwhile wait behind it in order,
so that `if_revision` always speaks of what is in force. A change that cannot be kept is refused
and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from gpuorchd.core import drain, leases, placement, serving
from gpuorchd.core.effects import (
    Announce,
    Answer,
    AnswerError,
    AnswerPolicy,
    CloseDevices,
    Effect,
    OpenDevices,
    PersistSettings,
)
from gpuorchd.core.events import CordonAsked, PolicyChangeAsked
from gpuorchd.core.model import Code, Device, DeviceUuid, LeaseState, Note, Refusal
from gpuorchd.core.policy import Policy, PolicyError
from gpuorchd.core.state import State

SAFE_MODE = "safe_mode"
SAFE_MODE_DEFAULT = False
# Changes that wait for the disk behind the one that is being kept.
BEHIND_MAX = 64

Change = PolicyChangeAsked | CordonAsked


class Pending(NamedTuple):
    """A change that is being kept: who asked, and what is in force once it is."""

    asked: Change
    policy: Policy
    revision: int
    safe_mode: bool
    cordons: Mapping[str, str]


class Desk:
    """Changes on their way: the one that is being kept, and those behind it."""

    __slots__ = ("behind", "pending")

    def __init__(self) -> None:
        self.pending: Pending | None = None
        self.behind: deque[Change] = deque()


def document(state: State, pending: Pending) -> Mapping[str, object]:
    """What is kept on disk, with the request that it answers: another daemon may have to do that.

    Between the disk and the answer this one may die. `answer` is null for a change of policy, which
    is answered with the policy.
    """
    asked = pending.asked
    answer = None if isinstance(asked, PolicyChangeAsked) else _cordon_fields(state, pending)
    return {
        "policy": pending.policy.document(),
        "revision": pending.revision,
        SAFE_MODE: pending.safe_mode,
        "cordons": dict(pending.cordons),
        "asked": {
            "epoch": state.settings.epoch,
            "connection": asked.conn,
            "request_id": asked.request_id,
            "answer": answer,
        },
    }


def ask(state: State, desk: Desk, change: Change, out: list[Effect]) -> None:
    """Take up a change, or let it wait for the one before it."""
    if desk.pending is not None:
        if len(desk.behind) < BEHIND_MAX:
            desk.behind.append(change)
        else:
            message = f"at most {BEHIND_MAX} changes wait to be kept on disk; this bound is reached"
            refusal = Refusal(Code.LIMIT, message)
            out.append(AnswerError(change.conn, change.request_id, refusal))
        return
    planned = (
        _plan_policy(state, change, out)
        if isinstance(change, PolicyChangeAsked)
        else _plan_cordon(state, change, out)
    )
    if planned is not None:
        desk.pending = planned
        out.append(PersistSettings(document(state, planned)))


def persisted(
    state: State, desk: Desk, failure: str | None, now_ns: int, out: list[Effect]
) -> None:
    """Put the kept change in force, or refuse it, and take up the next."""
    pending = desk.pending
    assert pending is not None, "settings were kept that nobody asked to keep"
    desk.pending = None
    asked = pending.asked
    if failure is not None:
        refusal = Refusal(Code.INTERNAL, f"the change could not be kept: {failure}")
        out.append(AnswerError(asked.conn, asked.request_id, refusal))
    elif isinstance(asked, PolicyChangeAsked):
        _apply_policy(state, asked, pending, now_ns, out)
    else:
        _apply_cordon(state, asked, pending, out)
    _go_on(state, desk, out)


def _go_on(state: State, desk: Desk, out: list[Effect]) -> None:
    while desk.pending is None and desk.behind:
        ask(state, desk, desk.behind.popleft(), out)


def _plan_policy(state: State, change: PolicyChangeAsked, out: list[Effect]) -> Pending | None:
    changes = dict(change.changes)
    if SAFE_MODE in changes and changes[SAFE_MODE] is None:
        changes[SAFE_MODE] = SAFE_MODE_DEFAULT
    if state.safe_mode and changes.get(SAFE_MODE) is not False:
        # Whatever it asks for: nothing changes while SAFE_MODE is on.
        out.append(AnswerPolicy(change.conn, change.request_id, Note.SAFE_MODE.value))
        return None
    if change.if_revision not in (None, state.revision):
        message = f"if_revision is {change.if_revision}, the policy is at {state.revision}"
        refusal = Refusal(Code.CONFLICT, message, "if_revision")
        out.append(AnswerError(change.conn, change.request_id, refusal))
        return None
    try:
        wanted = _flag(changes.pop(SAFE_MODE, state.safe_mode))
        policy = state.policy.changed(changes, change.uids)
    except PolicyError as error:
        refusal = Refusal(Code.BAD_REQUEST, str(error), error.field)
        out.append(AnswerError(change.conn, change.request_id, refusal))
        return None
    if policy == state.policy and wanted == state.safe_mode:
        out.append(AnswerPolicy(change.conn, change.request_id))
        return None
    return Pending(change, policy, state.revision + 1, wanted, state.cordons)


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise PolicyError(SAFE_MODE, f"is {value!r:.80}; allowed: true or false")


def _apply_policy(
    state: State, asked: PolicyChangeAsked, pending: Pending, now_ns: int, out: list[Effect]
) -> None:
    before = state.policy
    state.policy = pending.policy
    state.revision = pending.revision
    rules_changed = state.policy.rules != before.rules
    state.unsettled = state.upheaval = True
    flipped = pending.safe_mode != state.safe_mode
    state.safe_mode = pending.safe_mode
    out.append(AnswerPolicy(asked.conn, asked.request_id))
    fields = {"revision": state.revision, "changed": sorted(asked.changes)}
    out.append(Announce("policy.changed", fields))
    if rules_changed:
        serving.follow_rules(state, out)
    if flipped:
        out.append(Announce("daemon.safe_mode", {"on": state.safe_mode}))
        if state.safe_mode:
            _enter_safe_mode(state, now_ns, out)
        else:
            state.probing = True
            state.unavailable = None
            out.append(OpenDevices())


def _enter_safe_mode(state: State, now_ns: int, out: list[Effect]) -> None:
    for waiter in tuple(state.queue):
        serving.end_wait(state, waiter, Note.SAFE_MODE, now_ns, out)
    out.append(CloseDevices())
    for device in state.devices.values():
        device.present = False
        device.reading = None
        for process in tuple(device.holdings):
            device.holdings[process].used_mb = 0
        device.unmet_mb = device.claim_mb + device.draining_mb
    state.order = ()
    grace_ns = state.policy.safe_mode_grace_ns
    for lease in tuple(state.leases.values()):
        if lease.state is not LeaseState.DRAINING:
            leases.ask_back(state, lease, Note.SAFE_MODE.value, grace_ns, now_ns, out)
    drain.driver_closed(state, now_ns, out)


def _plan_cordon(state: State, change: CordonAsked, out: list[Effect]) -> Pending | None:
    device = placement.find(state, change.gpu)
    if device is None and isinstance(change.gpu, str):
        # By its uuid a GPU is known that is away for now, as all are under SAFE_MODE.
        device = state.devices.get(DeviceUuid(change.gpu))
    uuid = change.gpu if device is None else device.uuid
    if device is None and (change.reason is not None or uuid not in state.cordons):
        refusal = Refusal(Code.NOT_FOUND, f"no GPU {change.gpu!r} here; see gpu_info", "gpu")
        out.append(AnswerError(change.conn, change.request_id, refusal))
        return None
    cordons = dict(state.cordons)
    if change.reason is None:
        cordons.pop(str(uuid), None)
    else:
        cordons[str(uuid)] = change.reason
    if device is not None and cordons == state.cordons:
        _answer_cordon(change, device, out)
        return None
    return Pending(change, state.policy, state.revision, state.safe_mode, cordons)


def _cordon_fields(state: State, pending: Pending) -> dict[str, object]:
    """The answer to a cordon, or its end, that is about to be put in force."""
    before, after = state.cordons, pending.cordons
    (uuid,) = {uuid for uuid in (*before, *after) if before.get(uuid) != after.get(uuid)}
    fields: dict[str, object] = {"gpu": uuid}
    for device in state.devices.values():
        if device.uuid == uuid:
            fields["index"] = device.index
    return {**fields, "cordoned": uuid in after}


def _apply_cordon(state: State, asked: CordonAsked, pending: Pending, out: list[Effect]) -> None:
    answer = _cordon_fields(state, pending)
    state.cordons = dict(pending.cordons)
    state.unsettled = state.upheaval = True
    out.append(Answer(asked.conn, asked.request_id, answer))
    fields = {name: value for name, value in answer.items() if name != "cordoned"}
    uuid = str(answer["gpu"])
    reason = state.cordons.get(uuid)
    for device in state.devices.values():
        if device.uuid == uuid:
            device.cordon = reason
    if reason is None:
        out.append(Announce("gpu.uncordoned", fields))
    else:
        out.append(Announce("gpu.cordoned", {**fields, "reason": reason}))


def _answer_cordon(change: CordonAsked, device: Device, out: list[Effect]) -> None:
    cordoned = change.reason is not None
    fields = {"gpu": device.uuid, "index": device.index, "cordoned": cordoned}
    out.append(Answer(change.conn, change.request_id, fields))
