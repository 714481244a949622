"""`cordon`, `uncordon` and `revoke`: what an admin does to GPUs and leases."""

from __future__ import annotations

from typing import Any

from libclient.cli import exits
from libclient.cli.invocation import Invocation
from libclient.cli.text import safe
from libclient.sizes import format_duration

# What the daemon gives where none is said; shown in the answer.
GRACE_S = 10.0


def cordon(invocation: Invocation) -> int:
    """Grant nothing more on a GPU."""
    args = invocation.args
    reply = invocation.call("cordon", gpu=args.gpu, **_given(reason=args.reason))
    return _done(invocation, reply, f"GPU {safe(args.gpu)} is cordoned: its leases go on")


def uncordon(invocation: Invocation) -> int:
    """Grant on a GPU again."""
    reply = invocation.call("uncordon", gpu=invocation.args.gpu)
    return _done(invocation, reply, f"GPU {safe(invocation.args.gpu)} takes leases again")


def revoke(invocation: Invocation) -> int:
    """Take a lease back."""
    args = invocation.args
    reply = invocation.call(
        "revoke", lease_id=args.lease_id, **_given(grace_s=args.grace, reason=args.reason)
    )
    grace_s = GRACE_S if args.grace is None else args.grace
    how = f"is to end within {format_duration(grace_s)}" if grace_s else "is ended"
    return _done(invocation, reply, f"lease {safe(args.lease_id)} {how}")


def _given(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _done(invocation: Invocation, reply: dict[str, Any], text: str) -> int:
    if invocation.screen.json:
        invocation.screen.document(reply)
    else:
        invocation.screen.line(text)
    return exits.OK
