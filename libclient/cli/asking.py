"""`health` and `ready`: one question, answered by the exit code as well."""

from __future__ import annotations

from time import monotonic, sleep
from typing import Any

from libclient.cli import exits
from libclient.cli.invocation import Invocation
from libclient.cli.looking import failed_checks
from libclient.cli.screen import complain
from libclient.errors import RequestError, Unavailable, may_pass

# A daemon that starts is there within tenths of a second; a script that waits is not to notice.
AGAIN_S = 0.1
AGAIN_MAX_S = 1.0


def health(invocation: Invocation) -> int:
    """Ask whether the daemon answers."""
    reply = invocation.call("health")
    if invocation.screen.json:
        invocation.screen.document(reply)
    else:
        safe_mode = " (SAFE_MODE is on)" if reply.get("safe_mode") else ""
        invocation.screen.line(f"{reply.get('status')}{safe_mode}")
    return exits.OK if reply.get("status") == "ok" else exits.NO


def ready(invocation: Invocation) -> int:
    """Ask whether requests get right answers, and wait until they do if asked to."""
    deadline_s = monotonic() + invocation.args.wait
    reply = _until_ready(invocation, deadline_s)
    if invocation.screen.json:
        invocation.screen.document(reply)
    elif reply.get("ready"):
        invocation.screen.line("ready")
    else:
        for text in failed_checks(reply) or ["no check says why"]:
            complain(f"not ready: {text}")
    return exits.OK if reply.get("ready") else exits.NO


def _until_ready(invocation: Invocation, deadline_s: float) -> dict[str, Any]:
    """Ask until the answer is yes or the time is over.

    Raises Unavailable if there is no answer then, and RequestError if it is a refusal: at once for
    one that will not change.
    """
    pause_s = AGAIN_S
    while True:
        invocation.restart_budget()
        try:
            reply = invocation.call("ready")
            if reply.get("ready") or monotonic() >= deadline_s:
                return reply
        except (Unavailable, RequestError) as fault:
            if not may_pass(fault) or monotonic() >= deadline_s:
                raise
        # Nothing announces a daemon that is not there yet.
        sleep(max(0.0, min(pause_s, deadline_s - monotonic())))
        pause_s = min(pause_s * 2, AGAIN_MAX_S)
