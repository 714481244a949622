"""The daemon's command line: flags made from the table of settings, and three questions.

`--help`, `--version` and `--check-config` are answered without starting anything. Flags stay text
here; `config` reads and checks them with the environment's values, in the same words.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from gpuorchd.config import TABLE, Setting
from gpuorchd.host.kinds import FLAG

EXAMPLES = """
examples:
  gpuorchd                                        the GPUs of this host, /run/justnews/gpuorch.sock
  gpuorchd --simulate 2x81920 --socket /tmp/g/sock --state-dir /tmp/g/state --http-port 0
                                                  two simulated cards, nothing outside /tmp/g
  SAFE_MODE=true gpuorchd                         no GPU is touched and none is granted
  gpuorchd --check-config                         what the environment and flags come to, as JSON

A flag goes before the environment, the environment before the default; a variable that is set to
nothing counts as unset. A value that cannot be stops the start with exit code 2.
"""


class CommandLine(NamedTuple):
    """What was asked for: `flags` are texts by setting name."""

    flags: dict[str, str]
    check_config: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line: the usage of forty flags would hide it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def read_command_line(argv: Sequence[str], version: str) -> CommandLine:
    """Read flags. Exits by itself for `--help` and `--version` (0) and unknown flags (2)."""
    given = vars(parser(version).parse_args(argv))
    check_config = bool(given.pop("check_config"))
    flags = {name: text for name, text in given.items() if text is not None}
    return CommandLine(flags, check_config)


def parser(version: str) -> argparse.ArgumentParser:
    """Build the parser of all flags, from the table of settings."""
    whole = _Parser(
        prog="gpuorchd",
        usage="gpuorchd [FLAG ...]",
        description="Lease GPU memory to local processes over a Unix socket.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"gpuorchd {version}")
    whole.add_argument(
        "--check-config",
        action="store_true",
        help="print the effective configuration as JSON and exit",
    )
    sections: dict[str, argparse._ArgumentGroup] = {}
    for row in TABLE:
        if row.section not in sections:
            sections[row.section] = whole.add_argument_group(row.section)
        bare = {"nargs": "?", "const": "true"} if row.kind is FLAG else {}
        sections[row.section].add_argument(
            row.flag,
            dest=row.name,
            metavar=row.kind.metavar,
            help=_help(row),
            **bare,  # type: ignore[arg-type]  # argparse's overloads do not know that the keys go together
        )
    return whole


def _help(row: Setting) -> str:
    default = f"; default {row.shown_default}" if row.shown_default else ""
    # argparse formats help with %.
    return f"{row.help} [{row.variable}{default}]".replace("%", "%%")
