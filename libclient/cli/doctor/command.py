"""`doctor`: run every check, show what was found, and end with a code for scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import Final

from libclient.cli import exits
from libclient.cli.doctor import configured, devices, reaching, service
from libclient.cli.doctor.case import Case, take_case
from libclient.cli.doctor.findings import FAIL, LEVELS, OK, WARN, Finding, Findings
from libclient.cli.doctor.host import Host
from libclient.cli.invocation import Invocation
from libclient.cli.screen import Screen
from libclient.cli.text import counted

# In the order in which they are best mended: what comes later often follows from what came before.
CHECKS: Final[tuple[Callable[[Case], Findings], ...]] = (
    service.units_check,
    reaching.socket_check,
    reaching.group_check,
    reaching.daemon_check,
    configured.env_file_check,
    configured.port_check,
    reaching.ready_check,
    devices.driver_check,
    devices.nvml_check,
    devices.mps_check,
    service.store_check,
    service.limits_check,
    service.cgroup_check,
)
STYLES: Final = {OK: "green", WARN: "yellow", FAIL: "bold red"}
# Columns that text is wrapped to on a terminal, where that is wider.
READABLE: Final = 110


def doctor(invocation: Invocation) -> int:
    """Examine the host and show what is wrong with it."""
    findings = examine(take_case(invocation, Host()))
    screen = invocation.screen
    if screen.json:
        screen.document(
            {
                "healthy": not _any(findings, FAIL),
                "findings": [
                    {**finding._asdict(), "mend": list(finding.mend)} for finding in findings
                ],
            }
        )
    else:
        show(screen, findings)
    wrong = _any(findings, FAIL) or (invocation.args.strict and _any(findings, WARN))
    return exits.NO if wrong else exits.OK


def examine(case: Case) -> list[Finding]:
    """Return what every check finds."""
    return [finding for check in CHECKS for finding in check(case)]


def show(screen: Screen, findings: Sequence[Finding]) -> None:
    """Write the findings, each with the lines that mend it, and how many there are of each kind."""
    room = max(len(finding.area) for finding in findings)
    indent = max(map(len, LEVELS)) + 2 + room + 2
    width = min(screen.width, READABLE) if screen.width else None
    area = ""
    for finding in findings:
        level = screen.paint(finding.level.ljust(4), STYLES[finding.level])
        shown = finding.area if finding.area != area else ""
        area = finding.area
        first, *rest = _lines(finding.found, width, indent)
        screen.line(f"{level}  {screen.paint(shown.ljust(room), 'bold')}  {first}")
        for line in rest:
            screen.line(f"{'':{indent}}{line}")
        for command in finding.mend:
            # Not wrapped: it is there to be copied.
            arrow = "→" if screen.unicode else "->"
            screen.line(f"{'':{indent}}{screen.paint(f'{arrow} {command}', 'cyan')}")
    screen.line()
    screen.line(summary(findings))


def _lines(text: str, width: int | None, indent: int) -> list[str]:
    if width is None:
        return [text]
    return wrap(text, max(20, width - indent), break_on_hyphens=False) or [""]


def summary(findings: Sequence[Finding]) -> str:
    """Return the last line: how much is wrong."""
    failed = sum(finding.level == FAIL for finding in findings)
    doubtful = sum(finding.level == WARN for finding in findings)
    if not failed and not doubtful:
        return f"nothing is wrong: {counted(len(findings), 'check')}"
    parts = [counted(failed, "failure")] if failed else []
    parts += [counted(doubtful, "warning")] if doubtful else []
    return f"{' and '.join(parts)} in {counted(len(findings), 'check')}"


def _any(findings: Sequence[Finding], level: str) -> bool:
    return any(finding.level == level for finding in findings)
