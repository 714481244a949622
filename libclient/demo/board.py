"""What is known of each agent, from its own reports, and what that says of the whole.

Independent of the daemon's figures: who held what when is added up from what the agents saw, so
that memory that was promised twice would show here. An interval begins once the agent has its grant
and ends before it gives it back, so overlaps are real.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from libclient.demo.roster import ROSTER, Member
from libclient.sizes import format_duration, format_memory

Report = dict[str, Any]

# Where an agent is, as the column of the screen says it.
GPU = "GPU"
WAITS = "waits"
CPU = "CPU"
ASKS = "asks"
DEAD = "killed"
AWAY = "-"


@dataclass(slots=True)
class Actor:
    """One agent as it stands."""

    member: Member
    place: str = AWAY
    # Words for the screen.
    story: str = ""
    since_s: float = 0.0
    asked_mb: int = 0
    held_mb: int = 0
    lease_id: str = ""
    # Why it was last refused, until it is granted something.
    reason: str = ""
    position: int = 0


@dataclass(slots=True)
class Interval:
    """Memory that one agent held from one moment to another, on the monotonic clock."""

    agent: str
    memory_mb: int
    from_s: float
    to_s: float | None = None


@dataclass(slots=True)
class Board:
    """All agents, and what has happened to them."""

    actors: dict[str, Actor] = field(
        default_factory=lambda: {entry.agent: Actor(entry) for entry in ROSTER}
    )
    intervals: list[Interval] = field(default_factory=list)
    # Grants as (agent, at_s, waited_s); refusals by reason.
    grants: list[tuple[str, float, float]] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    yielded: int = 0
    revoked: int = 0

    def take(self, report: Report) -> str | None:
        """Take a report in. Return a line for people where it is worth one."""
        actor = self.actors[report["agent"]]
        at_s: float = report["at"]
        name = actor.member.agent
        match report["kind"]:
            case "asking":
                actor.asked_mb = report["memory_mb"]
                if actor.place != CPU:
                    # From there it asks now and then, and goes on meanwhile.
                    self._move(actor, ASKS, f"for {format_memory(actor.asked_mb)}", at_s)
            case "waiting":
                actor.position = report["position"]
                first = actor.place != WAITS
                ahead = "next" if actor.position == 1 else f"{actor.position - 1} ahead"
                text = f"for {format_memory(actor.asked_mb)}, {ahead}"
                self._move(actor, WAITS, text, actor.since_s if not first else at_s)
                return f"{name} waits {text}" if first else None
            case "gpu":
                return self._granted(actor, report)
            case "revoking":
                actor.story = f"holds {format_memory(actor.held_mb)}, is asked to yield"
                return None
            case "releasing":
                self._let_go(actor, at_s)
                self._move(actor, AWAY, "has given its memory back", at_s)
                return f"{name} gives {format_memory(actor.asked_mb)} back"
            case "lost":
                self._let_go(actor, at_s)
                self.revoked += 1
                self._move(actor, AWAY, f"lost its lease: {report['reason']}", at_s)
                return f"{name} has not yielded: its lease is taken ({report['reason']})"
            case "cpu":
                reason = report["reason"]
                why = _in_short(reason, report["detail"])
                again = actor.reason == reason
                actor.reason = reason
                self.refusals[reason] = self.refusals.get(reason, 0) + 1
                self._move(actor, CPU, why, at_s)
                return None if again else f"{name} goes on with the CPU: {why}"
        return None

    def killed(self, agent: str, at_s: float) -> None:
        """Take note that an agent was killed just now."""
        actor = self.actors[agent]
        self._let_go(actor, at_s)
        self._move(actor, DEAD, "SIGKILL", at_s)

    def at(self, place: str) -> list[Actor]:
        """Return the agents at a place."""
        return [actor for actor in self.actors.values() if actor.place == place]

    def granted_since(self, agent: str, since_s: float) -> float | None:
        """Return when an agent had its first grant after a moment; None where it had none."""
        return next(
            (at_s for name, at_s, _ in self.grants if name == agent and at_s > since_s), None
        )

    def peak_mb(self) -> int:
        """Return the most that was held at any one moment."""
        changes: list[tuple[float, int]] = []
        for interval in self.intervals:
            changes.append((interval.from_s, interval.memory_mb))
            if interval.to_s is not None:
                # At the same moment, what ends goes first.
                changes.append((interval.to_s, -interval.memory_mb))
        held = peak = 0
        for _, change in sorted(changes):
            held += change
            peak = max(peak, held)
        return peak

    def _granted(self, actor: Actor, report: Report) -> str:
        name, at_s, waited_s = actor.member.agent, report["at"], report["waited_s"]
        actor.held_mb, actor.lease_id = report["memory_mb"], report["lease_id"]
        actor.reason = ""
        self.intervals.append(Interval(name, actor.held_mb, at_s))
        self.grants.append((name, at_s, waited_s))
        amount = format_memory(actor.held_mb)
        self._move(actor, GPU, f"holds {amount}", at_s)
        after = f" after {format_duration(waited_s)}" if waited_s >= 0.001 else ""
        return f"{name} gets {amount} on GPU {report['gpu']}{after}"

    def _let_go(self, actor: Actor, at_s: float) -> None:
        for interval in self.intervals:
            if interval.agent == actor.member.agent and interval.to_s is None:
                interval.to_s = at_s
        actor.held_mb = 0

    @staticmethod
    def _move(actor: Actor, place: str, story: str, at_s: float) -> None:
        if actor.place != place:
            actor.since_s = at_s
        actor.place = place
        actor.story = story


def _in_short(reason: str, detail: str) -> str:
    """Return why, once: on one card, where it is so needs no saying."""
    _, _, words = detail.partition(": ")
    if not words:
        return reason
    return words if words.startswith(reason) else f"{reason}: {words}"
