"""The command line: every command with its flags, its help and its examples.

`COMMANDS` is the one list: the parser, `--help`, completion scripts and the check of docs/cli.md
walk it. Nothing that a command does is imported here, only named, so that `gpuorch` starts quickly.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from libclient.cli import arguments, exits
from libclient.cli.faults import UsageError
from libclient.version import VERSION
from libclient.wire.vocabulary import SEAL_SIGNALS, TOPICS

# Like the client library: an agent never waits longer than this for a daemon that is not there.
TIMEOUT_S = 2.0
SHELLS = ("bash", "zsh", "fish")
# Commands whose line may go on with `--` and a command of its own.
WITH_COMMAND = ("run", "explain")


class Command(NamedTuple):
    """One command: its words, where it is done, and what its help says."""

    name: str
    handler: str
    summary: str
    detail: str
    examples: tuple[tuple[str, str], ...]
    flags: Callable[[ArgumentParser], None] = lambda parser: None


def _top(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--interval", type=arguments.span, default=1.0, metavar="TIME",
        help="how often to look, besides whenever something happens (default: 1s)",
    )  # fmt: skip
    parser.add_argument(
        "--sort", choices=("memory", "age", "agent", "priority"), default="memory",
        help="in which order holders are shown (default: memory)",
    )  # fmt: skip


def _run(parser: ArgumentParser) -> None:
    arguments.add_request_flags(parser)
    parser.add_argument(
        "--fallback", choices=("fail", "cpu"), default="fail",
        help="without a grant: do not run the command (default), or run it on the CPU",
    )  # fmt: skip
    parser.add_argument(
        "--signal", choices=SEAL_SIGNALS,
        help="what the command is sent when its lease is to be given back",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing while waiting")
    parser.add_argument("words", nargs="...", metavar="-- COMMAND ...", help="what to run")


def _explain(parser: ArgumentParser) -> None:
    arguments.add_request_flags(parser)
    # Accepted so that `run` can be replaced by `explain` in a line that is there already.
    for flag in ("--fallback", "--signal"):
        parser.add_argument(flag, help=SUPPRESS)
    parser.add_argument("-q", "--quiet", action="store_true", help=SUPPRESS)
    parser.add_argument("words", nargs="...", metavar="-- COMMAND ...", help="for its name alone")


def _policy(parser: ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    get = kinds.add_parser("get", help="show the policy", formatter_class=Form)
    get.add_argument("name", nargs="*", metavar="FIELD", help="show these fields alone")
    put = kinds.add_parser("set", help="change fields of the policy", formatter_class=Form)
    put.add_argument(
        "change", nargs="+", metavar="FIELD=VALUE",
        help="a new value: sizes (4GiB) and times (30s) too; null returns to the default",
    )  # fmt: skip
    put.add_argument(
        "--if-revision", type=arguments.number, metavar="N",
        help="only if the policy is still at this revision",
    )  # fmt: skip
    for parts in (get, put):
        _common(parts, SUPPRESS)


def _cordon(parser: ArgumentParser) -> None:
    parser.add_argument("gpu", type=arguments.gpu, metavar="GPU", help="its index or uuid")
    parser.add_argument("--reason", metavar="TEXT", help="what others read about it")


def _uncordon(parser: ArgumentParser) -> None:
    parser.add_argument("gpu", type=arguments.gpu, metavar="GPU", help="its index or uuid")


def _revoke(parser: ArgumentParser) -> None:
    parser.add_argument("lease_id", metavar="LEASE_ID", help="as `gpuorch leases` shows it")
    parser.add_argument(
        "--grace", type=arguments.grace, default=None, metavar="TIME",
        help="how long its holder has to give it back (default: 10s)",
    )  # fmt: skip
    parser.add_argument("--reason", metavar="TEXT", help="what its holder is told")


def _events(parser: ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--follow", action="store_true",
        help="go on when the daemon goes away and comes back",
    )  # fmt: skip
    parser.add_argument(
        "--topic", action="append", choices=TOPICS, help="only these; may be repeated"
    )
    parser.add_argument(
        "-n", "--count", type=arguments.number, metavar="N", help="end after so many events"
    )
    parser.add_argument(
        "--for", dest="span", type=arguments.span, metavar="TIME", help="end after this time"
    )


def _ready(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--wait", type=arguments.wait, default=0.0, metavar="TIME",
        help="how long to wait until it is (default: not at all)",
    )  # fmt: skip


def _doctor(parser: ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="a warning counts as a failure")


def _completion(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="for which shell")


COMMANDS = (
    Command(
        "status", "looking:status", "show GPUs, who holds what and who waits",
        "Shows the daemon, every GPU with its memory, the holders and the queue.",
        (("gpuorch status", "one look"), ("gpuorch status --json", "the same for programs")),
    ),
    Command(
        "top", "live:top", "watch the same live",
        "Keys: q quits, s changes the order of holders. Needs the extra `cli`.",
        (("gpuorch top", ""), ("gpuorch top --interval 5s --sort age", "")), _top,
    ),
    Command(
        "run", "running:run", "run a command on leased GPU memory",
        "Takes a lease, sets what CUDA needs to know, and becomes the command: no process is left\n"
        "between. The lease lives as long as the command and the children that it leaves running.\n"
        "$GPUORCH_LEASE_ID names the lease; on the CPU, $GPUORCH_CPU_REASON says why.",
        (
            ("gpuorch run --mem 4GiB -- python train.py", ""),
            ("gpuorch run --mem 20GiB --wait 5m --priority critical -- ./serve", "wait for it"),
            ("gpuorch run --mem 2GiB --fallback cpu -- python score.py", "else on the CPU"),
            ("gpuorch run --exclusive --gpus 2 --signal TERM -- torchrun train.py", "whole GPUs"),
        ), _run,
    ),
    Command(
        "explain", "explaining:explain", "say what a lease request would get now, and why",
        "Takes the flags of `run`; changes nothing. Exit code 0: would be granted, 1: would not.",
        (
            ("gpuorch explain --mem 30GiB --agent analyst", ""),
            ("gpuorch explain --mem 4GiB -- python train.py", "in the name `run` would use"),
        ), _explain,
    ),
    Command(
        "leases", "looking:leases", "list the leases", "Every lease that still keeps memory.",
        (("gpuorch leases", ""), ("gpuorch leases --json", "")),
    ),
    Command(
        "queue", "looking:queue", "list who waits", "Every waiting request, the next one first.",
        (("gpuorch queue", ""),),
    ),
    Command(
        "policy", "policy:policy", "show or change the policy",
        "`set` changes all the given fields or none. An agent's own rules are written\n"
        "agents.NAME.FIELD=VALUE; null takes a field, or with agents.NAME all of its rules, away.",
        (
            ("gpuorch policy get", ""),
            ("gpuorch policy get max_memory_per_agent_mb", "one value"),
            ("gpuorch policy set max_memory_per_agent_mb=8GiB", ""),
            ("gpuorch policy set agents.analyst.max_memory_mb=4GiB agents.balancer.gpu=false", ""),
            ("gpuorch policy set agents.analyst=null", "back to the rules for everyone"),
            ("gpuorch policy set safe_mode=true", "no GPU for anyone"),
        ), _policy,
    ),
    Command(
        "cordon", "changing:cordon", "grant nothing more on a GPU",
        "Leases that are there go on.",
        (("gpuorch cordon 0 --reason 'fan makes noises'", ""),), _cordon,
    ),
    Command(
        "uncordon", "changing:uncordon", "grant on a GPU again", "The opposite of `cordon`.",
        (("gpuorch uncordon 0", ""),), _uncordon,
    ),
    Command(
        "revoke", "changing:revoke", "take a lease back",
        "Its holder is asked to give it back and has the grace for it; then the lease ends.",
        (("gpuorch revoke LEASE_ID --grace 30s --reason maintenance", ""),), _revoke,
    ),
    Command(
        "events", "watching:events", "print what happens as it happens",
        "Ends with Ctrl-C, with the daemon unless --follow is given, or as asked.",
        (
            ("gpuorch events -f", "until Ctrl-C"),
            ("gpuorch events --topic gpu --topic daemon", ""),
            ("gpuorch events --json --for 10s", "one JSON document a line"),
        ), _events,
    ),
    Command(
        "health", "asking:health", "ask whether the daemon answers", "Exit code 0: it does.",
        (("gpuorch health", ""),),
    ),
    Command(
        "ready", "asking:ready", "ask whether requests get right answers: a gate for scripts",
        "Prints the checks that fail. Exit code 0: ready, 1: not ready, 69: no daemon.",
        (("gpuorch ready --wait 30s && ./start-agents", ""),), _ready,
    ),
    Command(
        "doctor", "doctor.command:doctor", "find out what is wrong here, and how to mend it",
        "Looks at units, socket, group, daemon, env file, port, driver, NVML, MPS, descriptor\n"
        "store, limits and cgroup, with or without a daemon; changes nothing. Root sees more.\n"
        "Exit code 0: nothing failed, though there may be warnings; 1: something did.",
        (("gpuorch doctor", ""), ("gpuorch doctor --strict --json", "for scripts")), _doctor,
    ),
    Command(
        "completion", "completion:completion", "print a completion script for a shell", "",
        (
            ("gpuorch completion bash > /etc/bash_completion.d/gpuorch", ""),
            ("gpuorch completion zsh > ~/.zfunc/_gpuorch", ""),
            ("gpuorch completion fish > ~/.config/fish/completions/gpuorch.fish", ""),
        ), _completion,
    ),
)  # fmt: skip

COMMON_FLAGS = ("--json", "--socket", "--timeout")


class Form(RawDescriptionHelpFormatter):
    """Help with examples kept as written."""


class _Parser(ArgumentParser):
    def __init__(self, **settings: object) -> None:
        super().__init__(allow_abbrev=False, **settings)  # type: ignore[arg-type]  # passed on as given

    def error(self, message: str) -> NoReturn:
        """Raise it: the usage of all flags would hide what is wrong."""
        raise UsageError(message, self.prog)


def parser() -> ArgumentParser:
    """Build the parser of all commands."""
    codes = "\n".join(f"  {row.code:>3}  {row.meaning}" for row in exits.TABLE)
    whole = _Parser(
        prog="gpuorch",
        description="Lease GPU memory from gpuorchd, and see who has it.",
        epilog=f"exit codes:\n{codes}\n\n`gpuorch COMMAND --help` has examples.",
        formatter_class=Form,
    )
    whole.add_argument("--version", action="version", version=f"gpuorch {VERSION}")
    _common(whole, None)
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        width = max(len(line) for line, _ in command.examples)
        examples = "\n".join(
            f"  {line.ljust(width)}  {remark}".rstrip() for line, remark in command.examples
        )
        part = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.\n\n{command.detail}",
            epilog=f"examples:\n{examples}",
            formatter_class=Form,
            usage=f"gpuorch {command.name} [FLAG ...] -- COMMAND ..."
            if command.name in WITH_COMMAND
            else None,
        )
        command.flags(part)
        _common(part, SUPPRESS)
    return whole


def _common(part: ArgumentParser, missing: object) -> None:
    """Add the flags of every command; given before the command, they are not reset after it."""
    group = part.add_argument_group("every command")
    group.add_argument(
        "--json", action="store_true", default=missing or False,
        help="answer in JSON: one document, or one a line for a stream",
    )  # fmt: skip
    group.add_argument(
        "--socket", default=missing, metavar="PATH",
        help="where the daemon is (default: $GPUORCH_SOCKET, else the system's)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=arguments.budget, default=missing or TIMEOUT_S, metavar="TIME",
        help="how long to wait for answers, in all (default: 2s)",
    )  # fmt: skip


class Glance(NamedTuple):
    """What can be told of a line before, or without, understanding it."""

    command: str
    json: bool


def glance(argv: Sequence[str]) -> Glance:
    """Return which command a line most likely is, and whether it asks for JSON."""
    own = argv[: _own_words(argv)]
    names = {command.name for command in COMMANDS}
    return Glance(next((word for word in own if word in names), ""), "--json" in own)


def read(argv: Sequence[str]) -> Namespace:
    """Read a command line. Raises UsageError; exits by itself, with 0, for --help."""
    whole = parser()
    words = list(argv)
    own = _own_words(words)
    if own < len(words):
        # What is behind the first `--` is another command's line, and nobody parses it.
        args = whole.parse_args(words[:own])
        if getattr(args, "words", None) is not None:
            # A second `--` belongs to a command that was begun before the first.
            args.words += (["--"] if args.words else []) + words[own + 1 :]
            return args
    return whole.parse_args(words)


def _own_words(words: Sequence[str]) -> int:
    """Return how many words are ours: those before the `--` of a command that has one."""
    own = words.index("--") if "--" in words else len(words)
    return own if any(name in words[:own] for name in WITH_COMMAND) else len(words)
