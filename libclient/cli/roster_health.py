"""The command `justnews-health`: whether everything of the port map answers where it should.

Asks `/health` of every port at once, and `/ready` of the daemon. A table for people, `--json` and
an exit code for scripts.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from libclient.cli import arguments, exits
from libclient.cli.looking import failed_checks
from libclient.cli.screen import Screen, complain
from libclient.cli.side_http import Reached, ask
from libclient.cli.tables import Cell, Column
from libclient.ports import AGENT, DAEMON, KINDS, Entry, port_map
from libclient.version import VERSION

TIMEOUT_S: Final = 2.0

OK: Final = "ok"
NOT_READY: Final = "not ready"
UNWELL: Final = "unwell"
DOWN: Final = "down"
_STYLES: Final = {OK: "green", NOT_READY: "yellow", UNWELL: "red", DOWN: "bold red"}

COLUMNS: Final = (
    Column("NAME"),
    Column("PORT", right=True),
    Column("STATE"),
    Column("DETAIL", least=20),
)

EPILOG: Final = """\
exit codes:
    0  all that was asked for answers and is well
    1  something of it does not answer, or is not well or not ready
    2  the command line is wrong
   69  the daemon does not answer

examples:
  justnews-health                            every port of the map
  justnews-health --agents                   the daemon and the agents
  justnews-health gpu_orchestrator           the daemon alone: a probe for scripts
  justnews-health --port gpu_orchestrator    print its port"""


class Finding(NamedTuple):
    """How one program is: `state` is one of the words above."""

    entry: Entry
    state: str
    detail: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run `justnews-health` and return its exit code."""
    args = parser().parse_args(argv)
    entries = port_map()
    known = {entry.name: entry for entry in entries}
    unknown = [name for name in args.names if name not in known]
    if args.port is not None and args.port not in known:
        unknown.append(args.port)
    if unknown:
        complain(f"{unknown[0]!r} is not in the port map; known: {', '.join(known)}")
        return exits.USAGE
    if args.port is not None:
        print(known[args.port].port)
        return exits.OK
    kinds = {DAEMON, AGENT} if args.agents else set(KINDS)
    chosen = [
        entry
        for entry in entries
        if entry.kind in kinds and (not args.names or entry.name in args.names)
    ]
    findings = check(chosen, args.timeout)
    show(Screen(json=args.json), findings)
    return exit_code(findings)


def parser() -> ArgumentParser:
    """Build the parser."""
    from libclient.cli.grammar import Form

    whole = ArgumentParser(
        prog="justnews-health",
        description="Check that everything of the port map answers: /health of every port, and "
        "/ready of the daemon.",
        epilog=EPILOG,
        formatter_class=Form,
        allow_abbrev=False,
    )
    whole.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    whole.add_argument("--version", action="version", version=f"justnews-health {VERSION}")
    whole.add_argument(
        "--agents", action="store_true", help="only the daemon and the agents, no other services"
    )
    whole.add_argument("--json", action="store_true", help="answer in one JSON document")
    whole.add_argument("--port", metavar="NAME", help="print the port of this one and exit")
    whole.add_argument(
        "--timeout", type=arguments.span, default=TIMEOUT_S, metavar="TIME",
        help="how long to wait for each answer; all are asked at once (default: 2s)",
    )  # fmt: skip
    return whole


def check(entries: Sequence[Entry], timeout_s: float) -> list[Finding]:
    """Ask all of them at once; return what was found, in their order."""
    if not entries:
        return []
    with ThreadPoolExecutor(max_workers=len(entries)) as workers:
        return list(workers.map(lambda entry: look(entry, timeout_s), entries))


def look(entry: Entry, timeout_s: float) -> Finding:
    """Ask one of them."""
    health = ask(entry.port, "/health", timeout_s)
    if health.status is None:
        return Finding(entry, UNWELL if health.listening else DOWN, health.fault)
    if health.status != 200:
        return Finding(entry, UNWELL, f"/health answers {health.status}")
    if entry.kind != DAEMON:
        return Finding(entry, OK, "")
    if "safe_mode" not in health.document:
        return Finding(entry, UNWELL, "what answers there is not gpuorchd")
    return _look_ready(entry, health, timeout_s)


def _look_ready(entry: Entry, health: Reached, timeout_s: float) -> Finding:
    ready = ask(entry.port, "/ready", timeout_s)
    if ready.document.get("ready") is True:
        safe_mode = "SAFE_MODE is on: no lease is granted" if health.document["safe_mode"] else ""
        return Finding(entry, OK, safe_mode)
    why = "; ".join(failed_checks(ready.document)) or ready.fault or f"/ready: {ready.status}"
    return Finding(entry, NOT_READY, why)


def show(screen: Screen, findings: Sequence[Finding]) -> None:
    """Write what was found."""
    if screen.json:
        screen.document(
            {
                "healthy": all(finding.state == OK for finding in findings),
                "programs": [
                    {
                        "name": finding.entry.name,
                        "port": finding.entry.port,
                        "kind": finding.entry.kind,
                        "state": finding.state,
                        "detail": finding.detail,
                    }
                    for finding in findings
                ],
            }
        )
        return
    screen.table(
        COLUMNS,
        [
            (
                Cell(finding.entry.name, "bold" if finding.entry.kind == DAEMON else ""),
                Cell(str(finding.entry.port)),
                Cell(finding.state, _STYLES[finding.state]),
                Cell(finding.detail),
            )
            for finding in findings
        ],
    )


def exit_code(findings: Sequence[Finding]) -> int:
    """Return the exit code: the daemon's absence goes before all else."""
    silent = {DOWN, UNWELL}
    if any(one.entry.kind == DAEMON and one.state in silent for one in findings):
        return exits.UNAVAILABLE
    return exits.OK if all(one.state == OK for one in findings) else exits.NO


if __name__ == "__main__":
    import sys

    sys.exit(main())
