"""Policy: what agents may have. Checked as a whole, changed as a whole, never half.

A `Policy` is immutable; `Policy.changed` gives a new one or raises `PolicyError` naming the
field, its value and what is allowed. User names are resolved to uids by the shell, which passes
them in: no look-up happens here or per request. What an admin wrote is kept as it was written, so
that it reads back the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from gpuorchd.core.model import NS_PER_S, Peer, Priority

MEMORY_MB_MAX = 16_777_216
# A cap below this would keep an agent from even a CUDA context.
CAP_MB_MIN = 256
GRACE_S_MAX = 86_400
AGENT_CHARS = 128
# Enough for every name of a large host; bounds what one policy_set can make the daemon keep.
RULES_MAX = 1_024
NAMES_MAX = 64
NAME_CHARS = 256
ANY_AGENT = "*"
UID_MAX = 2**32 - 2
# Enough to recognise a field by; the rest of it is the sender's.
FIELD_CHARS = 80

PRIORITIES = {priority.word: priority for priority in Priority}


class PolicyError(ValueError):
    """A change that cannot be: `field` names where, `message` says value and what is allowed."""

    def __init__(self, field: str, message: str) -> None:
        shown = field if field.isprintable() and len(field) <= FIELD_CHARS else _show(field)
        super().__init__(f"{shown}: {message}")
        self.field = field[:FIELD_CHARS]
        self.message = message


@dataclass(frozen=True, slots=True)
class AgentRule:
    """What holds for one agent's name. None means: the policy's own value."""

    gpu: bool = True
    max_memory_mb: int | None = None
    default_memory_mb: int | None = None
    priority: Priority | None = None
    max_priority: Priority | None = None
    uids: frozenset[int] | None = None
    units: tuple[str, ...] | None = None

    def admits(self, peer: Peer) -> bool:
        """Whether this peer may use the name. Every binding that is set has to hold."""
        if self.uids is not None and peer.uid not in self.uids:
            return False
        if self.units is not None:
            unit = peer.unit
            return unit is not None and any(fnmatchcase(unit, glob) for glob in self.units)
        return True


NO_RULE = AgentRule()


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy in force. Memory in MiB, durations in seconds as on the wire."""

    max_memory_per_agent_mb: int = 0
    allow_fractional_shares: bool = True
    kill_on_oom: bool = False
    default_memory_mb: int = 2_048
    exclusive_stray_mb: int = 512
    safe_mode_grace_s: float = 30.0
    drain_timeout_s: float = 10.0
    # As written, and as used.
    agents: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    rules: Mapping[str, AgentRule] = field(default_factory=dict, repr=False)

    def rule(self, agent: str) -> AgentRule:
        """The rule for a name: its own, else that of `*`, else none."""
        rules = self.rules
        if not rules:
            return NO_RULE
        return rules.get(agent) or rules.get(ANY_AGENT) or NO_RULE

    def cap_mb(self, rule: AgentRule) -> int:
        """The most that an agent's live leases may have on one GPU; 0 for no cap."""
        if rule.max_memory_mb is not None:
            return rule.max_memory_mb
        return self.max_memory_per_agent_mb

    def asked_mb(self, rule: AgentRule, memory_mb: int, *, exclusive: bool) -> int:
        """The bytes a request stands for: its own figure, or the default where it names none."""
        if memory_mb or exclusive:
            return memory_mb
        if rule.default_memory_mb is not None:
            return rule.default_memory_mb
        return self.default_memory_mb

    @staticmethod
    def priority(rule: AgentRule, asked: Priority | None) -> Priority:
        """The priority that a request gets: never above what its agent may have."""
        chosen = asked if asked is not None else rule.priority
        if chosen is None:
            chosen = Priority.NORMAL
        if rule.max_priority is not None and chosen < rule.max_priority:
            return rule.max_priority
        return chosen

    @property
    def safe_mode_grace_ns(self) -> int:
        """How long holders have to yield when SAFE_MODE is switched on."""
        return int(self.safe_mode_grace_s * NS_PER_S)

    @property
    def drain_timeout_ns(self) -> int:
        """How long bytes may take to come back before that is reported."""
        return int(self.drain_timeout_s * NS_PER_S)

    def document(self) -> dict[str, object]:
        """The policy as `policy_get` shows it and as it is kept on disk."""
        shown: dict[str, object] = {
            name: getattr(self, name) for name in FIELDS if name != "agents"
        }
        shown["agents"] = {name: dict(rule) for name, rule in self.agents.items()}
        return shown

    def changed(self, changes: Mapping[str, object], uids: Mapping[str, int]) -> Policy:
        """Return the policy with `changes` applied, all of them or none.

        A field set to None returns to its default. Raises `PolicyError` for an unknown field, a
        value of the wrong type or out of range, or a user name that `uids` does not resolve.
        """
        values: dict[str, object] = {}
        rules: Mapping[str, AgentRule] | None = None
        for name, value in changes.items():
            check = FIELDS.get(name)
            if check is None:
                raise PolicyError(
                    name, f"no such policy field; allowed: {', '.join(FIELDS)}, safe_mode"
                )
            if value is None:
                values[name] = getattr(DEFAULT, name)
                if name == "agents":
                    rules = {}
            elif name == "agents":
                values[name], rules = _agents(value, uids)
            else:
                values[name] = check(name, value)
        if rules is not None:
            values["rules"] = MappingProxyType(dict(rules))
        return replace(self, **values)  # type: ignore[arg-type]  # each value was checked by its field

    @staticmethod
    def load(document: Mapping[str, object], uids: Mapping[str, int]) -> Policy:
        """Build a policy from a kept document; the checks are those of a change."""
        return DEFAULT.changed(document, uids)


def user_names(changes: Mapping[str, object]) -> list[str]:
    """The user names in a change or document, to be resolved before it is applied."""
    names: list[str] = []
    agents = changes.get("agents")
    if isinstance(agents, Mapping):
        for rule in agents.values():
            users = rule.get("users") if isinstance(rule, Mapping) else None
            if isinstance(users, list | tuple):
                names.extend(user for user in users if isinstance(user, str))
    return names


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= FIELD_CHARS else text[: FIELD_CHARS - 3] + "..."


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise PolicyError(name, f"is {_show(value)}; allowed: true or false")
    return value


def _whole(low: int, high: int, *, or_zero: bool = False) -> Callable[[str, object], int]:
    allowed = f"a whole number from {low} to {high}" + (", or 0" if or_zero else "")

    def check(name: str, value: object) -> int:
        number = value if isinstance(value, int) and not isinstance(value, bool) else -1
        if low <= number <= high or (or_zero and number == 0):
            return number
        raise PolicyError(name, f"is {_show(value)}; allowed: {allowed}")

    return check


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        number = math.nan
    else:
        number = value
    # NaN is in no range.
    if 0 <= number <= GRACE_S_MAX:
        return number
    raise PolicyError(name, f"is {_show(value)}; allowed: seconds from 0 to {GRACE_S_MAX}")


def _priority(name: str, value: object) -> Priority:
    if isinstance(value, str) and value in PRIORITIES:
        return PRIORITIES[value]
    raise PolicyError(name, f"is {_show(value)}; allowed: {', '.join(PRIORITIES)}")


def _names(name: str, value: object) -> list[str | int]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= NAMES_MAX:
        raise PolicyError(name, f"is {_show(value)}; allowed: a list of 1 to {NAMES_MAX} entries")
    return list(value)


def _uids(name: str, value: object, uids: Mapping[str, int]) -> frozenset[int]:
    found = set()
    for user in _names(name, value):
        if isinstance(user, str) and user in uids:
            found.add(uids[user])
        elif isinstance(user, int) and not isinstance(user, bool) and 0 <= user <= UID_MAX:
            found.add(user)
        else:
            raise PolicyError(
                name, f"has {_show(user)}; allowed: names of users of this host, or uids"
            )
    return frozenset(found)


def _units(name: str, value: object) -> tuple[str, ...]:
    globs = []
    for glob in _names(name, value):
        if not isinstance(glob, str) or not 1 <= len(glob) <= NAME_CHARS or not glob.isprintable():
            raise PolicyError(name, f"has {_show(glob)}; allowed: globs of system units")
        globs.append(glob)
    return tuple(globs)


def _agents(
    value: object, uids: Mapping[str, int]
) -> tuple[Mapping[str, Mapping[str, object]], dict[str, AgentRule]]:
    if not isinstance(value, Mapping):
        raise PolicyError("agents", f"is {_show(value)}; allowed: a map of rules by agent name")
    if len(value) > RULES_MAX:
        raise PolicyError("agents", f"has {len(value)} entries; allowed: at most {RULES_MAX}")
    written: dict[str, Mapping[str, object]] = {}
    rules: dict[str, AgentRule] = {}
    for agent, rule in value.items():
        if (
            not isinstance(agent, str)
            or not 1 <= len(agent) <= AGENT_CHARS
            or not agent.isprintable()
        ):
            raise PolicyError(
                "agents",
                f"names {_show(agent)}; allowed: names of 1 to {AGENT_CHARS} printable characters",
            )
        where = f"agents.{agent}"
        if rule is None:
            continue
        if not isinstance(rule, Mapping):
            raise PolicyError(
                where, f"is {_show(rule)}; allowed: a map of {', '.join(RULE_FIELDS)}"
            )
        kept = {name: entry for name, entry in rule.items() if entry is not None}
        rules[agent] = _rule(where, kept, uids)
        written[agent] = MappingProxyType(kept)
    return MappingProxyType(written), rules


def _rule(where: str, rule: Mapping[str, object], uids: Mapping[str, int]) -> AgentRule:
    values: dict[str, object] = {}
    for name, entry in rule.items():
        path = f"{where}.{name}"
        if name == "users":
            values["uids"] = _uids(path, entry, uids)
        elif name == "units":
            values["units"] = _units(path, entry)
        elif name in RULE_FIELDS:
            values[name] = RULE_FIELDS[name](path, entry)
        else:
            raise PolicyError(path, f"no such field of a rule; allowed: {', '.join(RULE_FIELDS)}")
    return AgentRule(**values)  # type: ignore[arg-type]  # each value was checked by its field


def _unused(name: str, value: object) -> object:
    raise AssertionError(f"{name} is checked where it is resolved")


_cap = _whole(CAP_MB_MIN, MEMORY_MB_MAX, or_zero=True)
_memory = _whole(1, MEMORY_MB_MAX)

FIELDS: Mapping[str, Callable[[str, object], object]] = {
    "max_memory_per_agent_mb": _cap,
    "allow_fractional_shares": _flag,
    "kill_on_oom": _flag,
    "default_memory_mb": _memory,
    "exclusive_stray_mb": _whole(0, MEMORY_MB_MAX),
    "safe_mode_grace_s": _seconds,
    "drain_timeout_s": _seconds,
    "agents": _unused,
}

RULE_FIELDS: Mapping[str, Callable[[str, object], object]] = {
    "gpu": _flag,
    "max_memory_mb": _cap,
    "default_memory_mb": _memory,
    "priority": _priority,
    "max_priority": _priority,
    "users": _unused,
    "units": _unused,
}

DEFAULT = Policy()
