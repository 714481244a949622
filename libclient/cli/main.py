"""The entry point: read the command line, load the command, answer with its exit code.

Every failure that is not a bug ends in one line on standard error (and, with `--json`, a document
on standard output) and in a code of `exits`.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from libclient.cli import exits, grammar
from libclient.cli.faults import ExtraMissing, UsageError
from libclient.cli.invocation import Invocation
from libclient.cli.screen import Screen, complain
from libclient.errors import RequestError, Unavailable

Handler = Callable[[Invocation], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gpuorch` and return its exit code; `run` does not return where it succeeds."""
    if sys.stdout is None:
        # Started with it closed. Nothing may land in a file that gets its number by chance.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 # it is standard output until the end
    try:
        try:
            return _answer(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return exits.BROKEN_PIPE
    except KeyboardInterrupt:
        return exits.INTERRUPTED


def _answer(words: Sequence[str]) -> int:
    args = grammar.read(words)
    if args.command is None:
        grammar.parser().print_help(sys.stderr)
        return exits.USAGE
    invocation = Invocation(args, Screen(json=args.json))
    try:
        return _handler(args)(invocation)
    except RequestError as refusal:
        return _refused(invocation, refusal)
    except Unavailable as fault:
        error = {"code": fault.reason, "message": fault.detail, "field": None, "retryable": True}
        _say(invocation, fault.detail, error)
        return exits.UNAVAILABLE
    except UsageError as fault:
        complain(f"{fault} (see gpuorch {args.command} --help)")
        return exits.USAGE
    except ExtraMissing as fault:
        complain(str(fault))
        return exits.EXTRA_MISSING
    finally:
        invocation.close()


def _handler(args: Namespace) -> Handler:
    place = next(c.handler for c in grammar.COMMANDS if c.name == args.command)
    module, _, function = place.partition(":")
    handler: Handler = getattr(import_module(f"libclient.cli.{module}"), function)
    return handler


def _refused(invocation: Invocation, refusal: RequestError) -> int:
    error = {
        "code": refusal.code,
        "message": refusal.message,
        "field": refusal.field,
        "retryable": refusal.retryable,
    }
    _say(invocation, str(refusal), error)
    return exits.of_refusal(refusal)


def _say(invocation: Invocation, text: str, error: Mapping[str, object]) -> None:
    # The output of `run` belongs to the command that it runs.
    if invocation.args.json and invocation.args.command != "run":
        invocation.screen.document({"error": error})
    complain(text)


def _drop_output() -> None:
    """Let the interpreter's last flush go nowhere, so that it does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
