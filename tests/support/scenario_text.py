"""The text of scenarios: reading files, showing effects as lines that a person reviews.

Shown is what somebody is answered or told and what the shells are asked to do; log events that
repeat it are left out, and no wording of a message is.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gpuorchd.core import effects as fx
from gpuorchd.core.model import ConnectionId, Denial

Options = Mapping[str, str]
INDENT = "    "
UNITS = {"ms": 1_000_000, "s": 1_000_000_000}
# Events that are shown although they only repeat, or are told to nobody in particular.
SHOWN = {
    "lease.draining",
    "lease.drained",
    "lease.withheld",
    "lease.revoking",
    "lease.revoked",
    "lease.expired",
    "daemon.stopping",
    "policy.changed",
}


class Step(NamedTuple):
    """One command with what is expected of it, or (no command) a line to be kept."""

    line: str
    command: str
    words: list[str]
    options: Options
    expected: list[str]


class Outcome(NamedTuple):
    """What came of a step."""

    step: Step
    shown: list[str]


class Names:
    """What people call connections and leases: by name, and by the request that was granted."""

    def __init__(self) -> None:
        self.conns: dict[ConnectionId, str] = {}
        self.leases: dict[str, str] = {}

    def conn(self, conn: ConnectionId | None) -> str:
        """Name a connection."""
        return self.conns.get(conn, "admin") if conn is not None else "nobody"

    def lease(self, lease_id: object) -> str:
        """Name a lease."""
        return self.leases.get(str(lease_id), str(lease_id))


def ns(text: str) -> int:
    """Read a time such as `150ms` or `2.5s`."""
    unit = "ms" if text.endswith("ms") else "s"
    return int(float(text.removesuffix(unit)) * UNITS[unit])


def parse(value: str) -> object:
    """Read a policy value: JSON."""
    return json.loads(value)


def read_steps(text: str) -> list[Step]:
    """Read a file."""
    steps: list[Step] = []
    for line in text.splitlines():
        if line.startswith(INDENT):
            steps[-1].expected.append(line.strip())
        elif not line.strip() or line.startswith("#"):
            steps.append(Step(line, "", [], {}, []))
        else:
            command, *words = shlex.split(line)
            options = dict(word.split("=", 1) for word in words if "=" in word)
            plain = [word for word in words if "=" not in word]
            steps.append(Step(line, command, plain, options, []))
    return steps


def write_steps(outcomes: Sequence[Outcome]) -> str:
    """Write a file with what really happened."""
    lines = []
    for step, shown in outcomes:
        lines.append(step.line)
        lines += [INDENT + line for line in shown]
    return "\n".join(lines) + "\n"


def show(effects: Sequence[fx.Effect], names: Names) -> list[str]:
    """Show effects, one line each; those that nobody waits for are left out."""
    lines = [_show(effect, names) for effect in effects]
    # Asking twice for a reading in one turn asks once.
    return list(dict.fromkeys(line for line in lines if line))


def _show(effect: fx.Effect, names: Names) -> str:
    match effect:
        case fx.AnswerGrant(lease):
            names.leases[lease.lease_id] = str(lease.request_id)
            parts = ", ".join(f"{part.device.uuid}:{part.memory_mb}" for part in lease.parts)
            until = "" if lease.expires_ns is None else " with a time limit"
            return f"granted {lease.request_id} on {parts}{until}"
        case fx.AnswerDenial(_, request_id, _, denial, _):
            return f"denied {request_id} {denial.note.value}{_reasons(denial)}"
        case fx.Answer(_, request_id, fields) if request_id == "dry run":
            note = fields.get("note")
            return f"would not be granted: {note}" if note else "would be granted"
        case fx.Answer(_, request_id, _):
            return f"answered {request_id}"
        case fx.AnswerPolicy(_, request_id, note):
            return f"answered {request_id}" + (f" with note {note}" if note else "")
        case fx.AnswerError(_, request_id, refusal):
            return f"error {request_id} {refusal.code.value}"
        case fx.Announce():
            return _show_event(effect, names)
        case fx.TakeReading():
            return "asks for a reading"
        case fx.PersistSettings():
            return "persists the settings"
        case fx.OpenDevices():
            return "opens the driver"
        case fx.CloseDevices():
            return "closes the driver"
        case fx.SignalPeer(conn, signal):
            return f"signals the peer of {names.conn(conn)}: {signal}"
        case _:
            return ""


def _reasons(denial: Denial) -> str:
    reasons = [
        f"GPU {reason.index} {reason.note.value}"
        for reason in denial.reasons
        if reason.index is not None
    ]
    return f" ({', '.join(reasons)})" if reasons else ""


def _show_event(event: fx.Announce, names: Names) -> str:
    fields = {**event.fields, **(event.owner_fields or {})}
    if event.name == "lease.queued":
        return f"told {names.conn(event.owner)}: {fields['request_id']} is {fields['position']}."
    if event.name not in SHOWN:
        return ""
    about = ""
    if "lease_id" in fields:
        about = f" {names.lease(fields['lease_id'])}"
    if event.name == "lease.withheld":
        about += f" {fields['memory_mb']} MB"
    if "deadline_s" in fields:
        about += f" within {fields['deadline_s']:g} s, {fields['reason']}"
    told = "" if event.owner is None else f"told {names.conn(event.owner)}: "
    return f"{told}{event.name}{about}"
