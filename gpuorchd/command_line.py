"""The daemon's command line: flags made from the table of settings, the env file, three questions.

`--help`, `--version` and `--check-config` are answered without starting anything. Flags stay text
here; `config` reads and checks them with the environment's values, in the same words.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from gpuorchd.config import TABLE, Setting
from gpuorchd.host.kinds import FLAG

ENV_FILE = "--env-file"

EXAMPLES = """
examples:
  gpuorchd                                        the GPUs of this host, /run/justnews/gpuorch.sock
  gpuorchd --simulate 2x81920 --socket /tmp/g/sock --state-dir /tmp/g/state --http-port 0
                                                  two simulated cards, nothing outside /tmp/g
  SAFE_MODE=true gpuorchd                         no GPU is touched and none is granted
  gpuorchd --check-config                         what the environment and flags come to, as JSON

A flag goes before the env file, the file before the environment, the environment before the
default; a variable that is set to nothing counts as unset. A value that cannot be stops the start
with exit code 2. SIGHUP reads all of it again.
"""


class CommandLine(NamedTuple):
    """What was asked for: `flags` are texts by setting name."""

    flags: dict[str, str]
    check_config: bool
    env_file: str | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line: the usage of forty flags would hide it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def read_command_line(argv: Sequence[str], version: str) -> CommandLine:
    """Read flags. Exits by itself for `--help` and `--version` (0) and unknown flags (2)."""
    given = vars(parser(version).parse_args(_with_optional_file(argv)))
    check_config = bool(given.pop("check_config"))
    env_file = given.pop("env_file")
    flags = {name: text for name, text in given.items() if text is not None}
    return CommandLine(flags, check_config, env_file)


def _with_optional_file(argv: Sequence[str]) -> list[str]:
    """Join `--env-file -FILE`, as units write it: argparse would take `-FILE` for a flag."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == ENV_FILE and word.startswith("-/"):
            words[-1] = f"{ENV_FILE}={word}"
        else:
            words.append(word)
    return words


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
    whole.add_argument(
        ENV_FILE,
        metavar="FILE",
        help="read variables from this file, in the syntax of systemd's EnvironmentFile=, and "
        "again at SIGHUP; after a leading - the file may be missing",
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
