"""`run`: take a lease and become the command.

In this order, so that nothing is held for a command that cannot run, and the command finds itself
as if it had been started directly: find the command; ask, and wait; seal; hand the descriptor on;
put back what Python changed of the process (signals, LC_CTYPE); exec. No process is left between,
and the lease ends when the last process that has the descriptor does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import NoReturn

from libclient.cli import exits
from libclient.cli.arguments import request_fields
from libclient.cli.faults import CannotRun, UsageError
from libclient.cli.holding import Holding
from libclient.cli.invocation import Invocation
from libclient.cli.naming import agent_name
from libclient.cli.progress import Progress
from libclient.cli.text import safe
from libclient.decision import Decision
from libclient.errors import RequestError, Unavailable
from libclient.where import socket_path

LEASE_VARIABLE = "GPUORCH_LEASE_ID"
REASON_VARIABLE = "GPUORCH_CPU_REASON"
# What keeps every framework from starting CUDA.
HIDE_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
# Python ignores these from its start, and an ignored signal stays ignored through exec.
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class NoLease(Exception):
    """There is no lease. `reason` is one word; `code` is the exit code for it."""

    def __init__(self, code: int, reason: str, detail: str, facts: dict[str, object]) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.code = code
        self.reason = reason
        self.facts = facts


def run(invocation: Invocation) -> int:
    """Take a lease and become the command; return only where there is none. Raises CannotRun."""
    args = invocation.args
    if not args.words:
        raise UsageError("no command is given: gpuorch run --mem 4GiB -- COMMAND ...")
    path = find(args.words[0], os.environ.get("PATH"))
    try:
        fields = request_fields(args, agent_name(args.agent, args.words))
    except (ValueError, TypeError) as fault:
        raise UsageError(safe(fault)) from None
    progress = Progress(fields, quiet=args.quiet, json=args.json)
    try:
        decision = _lease(invocation, fields, progress)
    except NoLease as failure:
        progress.failed(str(failure), failure.facts, on_cpu=args.fallback == "cpu")
        if args.fallback == "fail":
            return failure.code
        extra = {**HIDE_GPUS, REASON_VARIABLE: failure.reason}
    else:
        extra = {**decision.env, LEASE_VARIABLE: decision.lease_id or ""}
    return _become(path, args.words, environment(extra))


def _lease(invocation: Invocation, fields: dict[str, object], progress: Progress) -> Decision:
    """Return a sealed lease, its descriptor inherited by what is executed. Raises NoLease."""
    args = invocation.args
    holding: Holding | None = None
    try:
        with progress:
            holding = Holding(socket_path(args.socket), invocation.left_s)
            decision = holding.ask(fields, progress.on_event, progress.on_tick)
        if decision.granted:
            holding.seal(args.signal)
            if not decision.live:
                # Taken back before the seal: what may have been said after it could not be heard.
                word, _, why = (decision.ended or "").partition(": ")
                raise NoLease(exits.NOT_GRANTED, word.upper(), why, {})
            progress.granted(decision)
            holding.hand_on()
            holding = None
            return decision
        facts: dict[str, object] = {"reasons": decision.reasons, "eta_s": decision.eta_s}
        raise NoLease(exits.NOT_GRANTED, decision.reason, decision.detail, facts)
    except Unavailable as fault:
        raise NoLease(exits.UNAVAILABLE, fault.reason, fault.detail, {}) from None
    except RequestError as refusal:
        code, reason = exits.of_refusal(refusal), refusal.code.upper()
        raise NoLease(code, reason, refusal.message, {"field": refusal.field}) from None
    finally:
        if holding is not None:
            holding.close()


def find(word: str, search: str | None) -> str:
    """Return the file to execute for a command's first word, as a shell would find it.

    Raises CannotRun: 127 where there is none, 126 where it cannot be executed.
    """
    if not word:
        raise CannotRun(exits.NOT_FOUND, "the command is empty")
    places = [""] if os.sep in word else (search or os.defpath).split(os.pathsep)
    found: str | None = None
    for place in places:
        # An empty part of PATH is the current folder.
        path = os.path.join(place or (os.curdir if os.sep not in word else ""), word)
        if not os.path.exists(path):
            continue
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
        found = found or path
    if found is None:
        raise CannotRun(exits.NOT_FOUND, f"{safe(word)}: command not found")
    why = "is a directory" if os.path.isdir(found) else "permission denied"
    raise CannotRun(exits.NOT_EXECUTABLE, f"{safe(found)}: {why}")


def environment(extra: dict[str, str]) -> dict[str, str]:
    """Return the command's environment: ours, with what the lease (or its lack) adds."""
    result = dict(os.environ)
    # Of a `run` around this one.
    for name in (LEASE_VARIABLE, REASON_VARIABLE):
        result.pop(name, None)
    # In the C locale, Python sets this for itself as it starts.
    given = _as_started("LC_CTYPE")
    if given is None:
        result.pop("LC_CTYPE", None)
    else:
        result["LC_CTYPE"] = given
    result.update(extra)
    return result


def _as_started(name: str) -> str | None:
    """Return a variable as this process was started with it, None where it was not.

    Where that cannot be seen, as it is now.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return os.environ.get(name)
    for entry in entries:
        key, _, value = entry.partition(b"=")
        if key == name.encode():
            return os.fsdecode(value)
    return None


def _become(path: str, words: Sequence[str], env: dict[str, str]) -> NoReturn:
    """Execute the command in place of this program. Raises CannotRun."""
    for number in IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(path, list(words), env)
    except OSError as fault:
        raise CannotRun(exits.NOT_EXECUTABLE, f"{safe(path)}: {fault.strerror or fault}") from None
