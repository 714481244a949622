"""`policy get` and `policy set`: show the policy, or change it without losing others' changes."""

from __future__ import annotations

from typing import Any

from libclient.cli import exits
from libclient.cli.changes import (
    AGENTS,
    Change,
    differences,
    explain_value,
    flat,
    named,
    read_change,
    show_value,
    together,
)
from libclient.cli.faults import UsageError
from libclient.cli.invocation import Invocation
from libclient.cli.screen import complain
from libclient.cli.text import safe
from libclient.errors import RequestError
from libclient.wire.vocabulary import CONFLICT

# Somebody else changed the policy between our reading and writing: so often in a row only if
# something changes it all the time.
TRIES = 5


def policy(invocation: Invocation) -> int:
    """Show or change the policy."""
    return _get(invocation) if invocation.args.action == "get" else _set(invocation)


def _get(invocation: Invocation) -> int:
    reply = invocation.call("policy_get")
    screen, names = invocation.screen, invocation.args.name
    shown = {
        "revision": reply["revision"],
        "safe_mode": reply["safe_mode"],
        **reply["policy"],
    }
    if not names:
        if screen.json:
            screen.document(reply)
            return exits.OK
        screen.facts({name: explain_value(name, value) for name, value in flat(shown).items()})
        return exits.OK
    known = named(shown)
    for name in names:
        if name not in known:
            raise UsageError(f"no policy field {safe(repr(name))}; there are: {', '.join(shown)}")
    if screen.json:
        screen.document({name: known[name] for name in names})
    elif len(names) == 1:
        # By itself, so that a script can give it back to `policy set`.
        screen.line(safe(show_value(names[0], known[names[0]])))
    else:
        screen.facts({name: explain_value(name, known[name]) for name in names})
    return exits.OK


def _set(invocation: Invocation) -> int:
    try:
        changes = [read_change(text) for text in invocation.args.change]
    except ValueError as fault:
        raise UsageError(safe(fault)) from None
    before, after = _change(invocation, changes)
    if invocation.screen.json:
        invocation.screen.document(after)
    changed = differences(_all(before), _all(after))
    unchanged = after.get("note") == "SAFE_MODE"
    if unchanged:
        complain("nothing changed: SAFE_MODE is on, the policy is read-only until safe_mode=false")
    elif not invocation.screen.json:
        invocation.screen.facts(
            {
                name: f"{explain_value(name, old)} -> {explain_value(name, new)}"
                for name, (old, new) in changed.items()
            }
        )
        if not changed:
            invocation.screen.line("nothing to change")
        invocation.screen.line(f"revision {after['revision']}")
    return exits.NO if unchanged else exits.OK


def _change(invocation: Invocation, changes: list[Change]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the changes. Return the policy before and after."""
    asked = invocation.args.if_revision
    for attempt in range(1, TRIES + 1):
        before = invocation.call("policy_get")
        try:
            wanted = together(changes, before["policy"].get(AGENTS) or {})
        except ValueError as fault:
            raise UsageError(safe(fault)) from None
        fields: dict[str, Any] = {"changes": wanted}
        if asked is not None:
            fields["if_revision"] = asked
        elif any(change.agent is not None for change in changes):
            # The whole map goes back: a rule that somebody else just made must not be lost.
            fields["if_revision"] = before["revision"]
        try:
            return before, invocation.call("policy_set", **fields)
        except RequestError as refusal:
            if refusal.code != CONFLICT or asked is not None or attempt == TRIES:
                raise
    raise AssertionError("the last try returns or raises")


def _all(reply: dict[str, Any]) -> dict[str, Any]:
    return {"safe_mode": reply.get("safe_mode"), **(reply.get("policy") or {})}
