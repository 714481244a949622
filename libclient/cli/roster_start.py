"""The command `justnews-enable-all`: starts the daemon, waits at its gate, starts the agents.

    systemctl start justnews@gpu_orchestrator ─▶ gpuorch ready --wait ─▶ systemctl start justnews@…

Every step has a bound. What fails is named with the command that shows why. Agents are started
only behind an open gate, because one that asks too early works on the CPU for its whole life and
nobody notices; `--without-gate` starts them all the same.
"""

from __future__ import annotations

import subprocess
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Final

from libclient.cli import arguments, exits
from libclient.cli import main as gpuorch
from libclient.cli.screen import Screen, complain
from libclient.ports import AGENT, Entry, daemon, port_map
from libclient.sizes import format_duration
from libclient.version import VERSION

# A unit that has not started by then hangs; systemd's own default is 90 s.
UNIT_S: Final = 100.0
# The first look at a driver that has slept takes seconds, on a host of eight GPUs more.
GATE_S: Final = 60.0

EPILOG: Final = """\
exit codes:
    0  all of them run
    1  an agent did not start; the others were started
    2  the command line is wrong
   69  the daemon did not start, or the gate did not open in time: no agent was started

examples:
  justnews-enable-all                      the daemon, then every agent of the port map
  justnews-enable-all analyst scout        the daemon, then these
  justnews-enable-all --boot               and enable them, for the next boot"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `justnews-enable-all` and return its exit code."""
    args = parser().parse_args(argv)
    entries = port_map()
    leader = daemon(entries)
    known = [entry for entry in entries if entry is not leader]
    unknown = [name for name in args.names if name not in {entry.name for entry in known}]
    if unknown:
        names = ", ".join(entry.name for entry in known)
        complain(f"{unknown[0]!r} is not in the port map; known: {names}")
        return exits.USAGE
    chosen = [
        entry
        for entry in known
        if (entry.name in args.names if args.names else entry.kind == AGENT)
    ]
    screen = Screen()
    start = Starter(screen, args.unit_timeout, boot=args.boot)
    if not start(leader) and not args.without_gate:
        return exits.UNAVAILABLE
    if not _gate(screen, args.gate) and not args.without_gate:
        return exits.UNAVAILABLE
    started = [start(entry) for entry in chosen]
    return exits.OK if all(started) else exits.NO


def parser() -> ArgumentParser:
    """Build the parser."""
    from libclient.cli.grammar import Form

    whole = ArgumentParser(
        prog="justnews-enable-all",
        description="Start the daemon, wait until it is ready, then start the agents.",
        epilog=EPILOG,
        formatter_class=Form,
        allow_abbrev=False,
    )
    whole.add_argument(
        "names", nargs="*", metavar="NAME", help="these of the port map (default: all agents)"
    )
    whole.add_argument("--version", action="version", version=f"justnews-enable-all {VERSION}")
    whole.add_argument("--boot", action="store_true", help="enable each of them for boot as well")
    whole.add_argument(
        "--gate", type=arguments.span, default=GATE_S, metavar="TIME",
        help="how long to wait for the daemon to be ready (default: 1m)",
    )  # fmt: skip
    whole.add_argument(
        "--unit-timeout", type=arguments.span, default=UNIT_S, metavar="TIME",
        help="how long one unit may take to start (default: 1m40s)",
    )  # fmt: skip
    whole.add_argument(
        "--without-gate", action="store_true",
        help="start agents although the daemon is not ready: they work on the CPU",
    )  # fmt: skip
    return whole


class Starter:
    """Starts one unit after another and says what came of each."""

    def __init__(self, screen: Screen, timeout_s: float, *, boot: bool) -> None:
        self._screen = screen
        self._timeout_s = timeout_s
        self._boot = boot

    def __call__(self, entry: Entry) -> bool:
        """Start a program's unit; say whether it runs."""
        unit = f"justnews@{entry.name}.service"
        why = systemctl(["start", unit], self._timeout_s)
        if why is None and self._boot:
            why = systemctl(["enable", unit], self._timeout_s)
        _tell(self._screen, why is None, unit, f"port {entry.port}")
        if why is not None:
            complain(f"{unit}: {why}")
            complain(f"see why: systemctl status {unit}; journalctl -u {unit} -n 50")
        return why is None


def _gate(screen: Screen, wait_s: float) -> bool:
    """Wait until the daemon is ready, as `gpuorch ready --wait` does, which says what it lacks."""
    is_open = gpuorch.main(["ready", "--wait", f"{wait_s}s"]) == exits.OK
    _tell(screen, is_open, "gate", f"gpuorch ready --wait {format_duration(wait_s)}")
    if not is_open:
        complain("the gate stays closed; find out why: gpuorch doctor")
    return is_open


def _tell(screen: Screen, good: bool, what: str, detail: str) -> None:
    word = screen.paint("ok    ", "green") if good else screen.paint("failed", "bold red")
    screen.line(f"{word}  {what}  {screen.paint(detail, 'dim')}")
    screen.flush()


def systemctl(
    words: Sequence[str],
    timeout_s: float,
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> str | None:
    """Run systemctl; return None, or in one line why it failed."""
    try:
        done = run(
            ["systemctl", "--no-ask-password", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        return "there is no systemctl on this host"
    except subprocess.TimeoutExpired:
        return f"not within {format_duration(timeout_s)}"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[0] if lines else f"systemctl ended with {done.returncode}"


if __name__ == "__main__":
    import sys

    sys.exit(main())
