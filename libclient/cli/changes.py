"""Changes of policy as people write them: `FIELD=VALUE`, and what they come to on the wire.

On the wire `agents` is one map that is replaced as a whole. Here its parts can be named, as
`agents.NAME.FIELD`, and are put into the map that the daemon has now. Pure: values in, values out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from libclient import sizes

AGENTS = "agents"
# Fields of an agent's own rules. A name may hold dots, so the last part has to be one of these.
RULE_FIELDS = (
    "gpu",
    "max_memory_mb",
    "default_memory_mb",
    "priority",
    "max_priority",
    "users",
    "units",
)
LISTS = ("users", "units")
# Fields in which 0 is not the smallest value, but none at all.
CAPS = ("max_memory_per_agent_mb", "max_memory_mb")


class Change(NamedTuple):
    """One change. `agent` and `rule` are set for a part of `agents`, `rule` None for all of one."""

    field: str
    value: object
    agent: str | None = None
    rule: str | None = None


def read_change(text: str) -> Change:
    """Read `FIELD=VALUE`. Raises ValueError, saying what is wrong."""
    field, equals, written = text.partition("=")
    field = field.strip()
    if not equals or not field:
        raise ValueError(f"{text!r} is not FIELD=VALUE")
    if not field.startswith(f"{AGENTS}."):
        return Change(field, read_value(field, written))
    name, _, rule = field.removeprefix(f"{AGENTS}.").rpartition(".")
    if name and rule in RULE_FIELDS:
        return Change(AGENTS, read_value(rule, written), name, rule)
    whole = field.removeprefix(f"{AGENTS}.")
    value = read_value(whole, written)
    if not whole or not (value is None or isinstance(value, dict)):
        raise ValueError(
            f"{text!r}: write {AGENTS}.NAME=null, or {AGENTS}.NAME.FIELD=VALUE with FIELD one of "
            f"{', '.join(RULE_FIELDS)}"
        )
    return Change(AGENTS, value, whole)


def read_value(field: str, text: str) -> object:
    """Read a value: JSON where it is JSON, a size or time by the field's unit, else text.

    Raises ValueError for a size or time that is none.
    """
    text = text.strip()
    try:
        value: object = json.loads(text, parse_constant=_not_json)
    except ValueError:
        value = text
    if field in LISTS and value is not None and not isinstance(value, list):
        return [_user(part.strip()) for part in text.split(",") if part.strip()]
    if isinstance(value, str) and field.endswith("_mb"):
        return sizes.parse_memory(value)
    if isinstance(value, str) and field.endswith("_s"):
        return sizes.parse_duration(value)
    return value


def together(changes: Iterable[Change], agents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `changes` of a `policy_set`. `agents` is the daemon's map as it is now.

    Raises ValueError where one field is changed twice, which would hide a mistake.
    """
    result: dict[str, Any] = {}
    rules = {name: dict(rule) for name, rule in agents.items()}
    seen: list[tuple[str, ...]] = []
    for change in changes:
        parts = (change.field, change.agent, change.rule)
        path = tuple(part for part in parts if part is not None)
        # One within the other is twice, too.
        if any(path[: len(other)] == other[: len(path)] for other in seen):
            raise ValueError(f"{'.'.join(path)} is changed twice")
        seen.append(path)
        if change.agent is None:
            result[change.field] = change.value
            continue
        _apply(rules, change.agent, change)
        result[AGENTS] = rules
    return result


def _apply(rules: dict[str, dict[str, Any]], name: str, change: Change) -> None:
    if change.rule is None:
        if isinstance(change.value, dict):
            rules[name] = change.value
        else:
            rules.pop(name, None)
        return
    rule = rules.setdefault(name, {})
    if change.value is not None:
        rule[change.rule] = change.value
        return
    rule.pop(change.rule, None)
    if not rule:
        # An entry without rules would still keep the name from the rules for everyone.
        del rules[name]


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two policies, by flat name, as (before, after)."""
    old, new = flat(before), flat(after)
    # `{}` stands for no rules: where some came or went, they are named, and it did not change.
    filled_before, filled_after = _filled(before), _filled(after)
    both = ((name, old.get(name), new.get(name)) for name in {**new, **old})
    return {
        name: (was, now)
        for name, was, now in both
        if was != now
        and not (was == {} and name in filled_after)
        and not (now == {} and name in filled_before)
    }


def _filled(policy: Mapping[str, Any]) -> set[str]:
    """Return the names that stand for rules, and hold some."""
    agents = policy.get(AGENTS)
    if not agents or not isinstance(agents, dict):
        return set()
    return {AGENTS} | {f"{AGENTS}.{name}" for name, rule in agents.items() if rule}


def named(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything of a policy that can be asked for by a name, parts and wholes."""
    agents = policy.get(AGENTS)
    rules = agents if isinstance(agents, dict) else {}
    return {
        **{f"{AGENTS}.{name}": rule for name, rule in rules.items()},
        **flat(policy),
        **policy,
    }


def flat(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return a policy with agents' rules under the names in which they are changed."""
    result: dict[str, Any] = {}
    for field, value in policy.items():
        if field != AGENTS or not value or not isinstance(value, dict):
            result[field] = value
            continue
        for name, rule in value.items():
            if not rule:
                result[f"{AGENTS}.{name}"] = {}
            for part, setting in rule.items():
                result[f"{AGENTS}.{name}.{part}"] = setting
    return result


def show_value(field: str, value: object) -> str:
    """Return a value as it would be written in a change, for people."""
    if field.endswith("_mb") and isinstance(value, int) and not isinstance(value, bool) and value:
        return sizes.format_memory(value).replace(" ", "")
    if field.endswith("_s") and isinstance(value, int | float):
        return sizes.format_duration(value)
    return value if isinstance(value, str) else json.dumps(value)


def explain_value(field: str, value: object) -> str:
    """Return a value as it would be written, and what it means where that cannot be seen."""
    shown = show_value(field, value)
    return f"{shown} (no cap)" if field.endswith(CAPS) and value == 0 else shown


def _user(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() else text


def _not_json(word: str) -> object:
    raise ValueError(f"{word} is not JSON")
