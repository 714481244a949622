"""The entry point: read the command line, load the command, answer with its exit code.

Every failure ends in one line on standard error (and, with `--json`, a document on standard output)
and in a code of `exits`. That holds for bugs, too: where they are is shown on request.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module

from libclient.cli import exits, grammar
from libclient.cli.faults import CannotWrite, Failure, UsageError
from libclient.cli.invocation import Invocation
from libclient.cli.screen import Screen, chatter, complain
from libclient.errors import RequestError, Unavailable

Handler = Callable[[Invocation], int]

# Whoever reports a bug sets it to anything and runs the command again.
TRACEBACK_VARIABLE = "GPUORCH_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gpuorch` and return its exit code; `run` does not return where it succeeds."""
    if sys.stdout is None:
        # Started with it closed. Nothing may land in a file that gets its number by chance.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 # it is standard output until the end
    screen = Screen()
    try:
        try:
            return _answer(sys.argv[1:] if argv is None else argv, screen)
        finally:
            screen.flush()
    except BrokenPipeError:
        _drop_output()
        return exits.BROKEN_PIPE
    except CannotWrite as fault:
        _drop_output()
        complain(str(fault))
        return fault.code
    except KeyboardInterrupt:
        return exits.INTERRUPTED


def _answer(words: Sequence[str], screen: Screen) -> int:
    seen = grammar.glance(words)
    told = _Told(screen, seen.json, seen.command)
    invocation: Invocation | None = None
    try:
        args = grammar.read(words)
        if args.command is None:
            grammar.parser().print_help(sys.stderr)
            told.document("USAGE", "no command is given")
            return exits.USAGE
        told.command, told.json = args.command, args.json
        screen.json = args.json
        invocation = Invocation(args, screen)
        return _handler(args)(invocation)
    except RequestError as refusal:
        told.refusal(refusal)
        return exits.of_refusal(refusal)
    except Unavailable as fault:
        told.failure(fault.reason, fault.detail, retryable=True)
        return exits.UNAVAILABLE
    except UsageError as fault:
        command = fault.command or f"gpuorch {told.command}"
        told.failure(fault.word, f"{fault} (see {command} --help)")
        return fault.code
    except Failure as fault:
        told.failure(fault.word, str(fault))
        return fault.code
    except KeyboardInterrupt:
        told.document("INTERRUPTED", "interrupted with Ctrl-C")
        return exits.INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as fault:
        told.failure("SYSTEM_REFUSED", f"the system refused: {fault}", retryable=True)
        return exits.SYSTEM_REFUSED
    except Exception as bug:
        # Whatever it is: scripts get the documented code, and people one line.
        _tell_bug(told, bug)
        return exits.BUG
    finally:
        if invocation is not None:
            invocation.close()


def _handler(args: Namespace) -> Handler:
    place = next(c.handler for c in grammar.COMMANDS if c.name == args.command)
    module, _, function = place.partition(":")
    handler: Handler = getattr(import_module(f"libclient.cli.{module}"), function)
    return handler


class _Told:
    """How a failure is told: a line for people, and a document where that was asked for.

    What `run` writes to standard output belongs to its command, so there the document takes the
    place of the line on standard error.
    """

    def __init__(self, screen: Screen, json: bool, command: str) -> None:
        self._screen = screen
        self.json = json
        self.command = command

    def refusal(self, refusal: RequestError) -> None:
        """Tell what the daemon refused."""
        self.document(refusal.code, refusal.message, refusal.field, refusal.retryable)
        self._line(str(refusal))

    def failure(self, code: str, text: str, *, retryable: bool = False) -> None:
        """Tell what else went wrong."""
        self.document(code, text, None, retryable)
        self._line(text)

    def document(
        self, code: str, message: str, field: str | None = None, retryable: bool = False
    ) -> None:
        """Write the document alone."""
        if not self.json:
            return
        error = {"code": code, "message": message, "field": field, "retryable": retryable}
        if self.command != "run":
            self._screen.document({"error": error})
            return
        from json import dumps

        chatter(dumps({"error": error}) + "\n")

    def _line(self, text: str) -> None:
        if not (self.json and self.command == "run"):
            complain(text)


def _tell_bug(told: _Told, bug: Exception) -> None:
    if os.environ.get(TRACEBACK_VARIABLE):
        from traceback import format_exception

        chatter("".join(format_exception(bug)))
    what = f"{type(bug).__name__}: {bug}" if str(bug) else type(bug).__name__
    told.failure("BUG", f"a bug in gpuorch: {what} ({TRACEBACK_VARIABLE}=1 shows where)")


def _drop_output() -> None:
    """Let the interpreter's last flush go nowhere, so that it does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
