"""Run everything that must hold, and end with a summary of a few lines. `make test` calls this.

Lint and types, then the tests that can run side by side, then those that need the machine to
themselves. A step that fails does not keep the others from running: one run shows all there is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Two are the least that a slow test does not hold up all others; more than eight share sockets'
# and disks' bounds that tests of limits reach on purpose.
WORKERS = max(2, min(8, os.cpu_count() or 2))
# pytest's own code for "no test was selected".
NOTHING_SELECTED = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one step ended."""

    step: str
    passed: bool
    detail: str
    took_s: float


def main() -> int:
    """Run all steps, or only the first three; return the exit code."""
    python = sys.executable
    outcomes = [
        _run("ruff check", [python, "-m", "ruff", "check", "--quiet", "."]),
        _run("ruff format", [python, "-m", "ruff", "format", "--quiet", "--check", "."]),
        _run("mypy", [python, "-m", "mypy", "--no-error-summary"]),
    ]
    if "--lint-only" not in sys.argv:
        alone = "serial or gpu"
        spread = ("-n", str(WORKERS), "--dist", "worksteal")
        outcomes.append(_run_tests("tests", f"not ({alone})", *spread))
        outcomes.append(_run_tests("tests that run alone", alone))
    return _summarise(outcomes)


def _run(step: str, command: list[str]) -> Outcome:
    started = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    return Outcome(step, code == 0, "", time.monotonic() - started)


def _run_tests(step: str, selected: str, *options: str) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", selected, f"--junit-xml={report}"]
        code = subprocess.run(
            [*command, *options], cwd=ROOT, stdin=subprocess.DEVNULL, check=False
        ).returncode
        detail = _counts(report) if report.exists() else f"pytest ended with {code}"
    took_s = time.monotonic() - started
    return Outcome(step, code in {0, NOTHING_SELECTED}, detail, took_s)


def _counts(report: Path) -> str:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest wrote a report without a suite"
    total, failed, errors, skipped = (
        int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
    )
    return (
        f"{total - failed - errors - skipped} passed, {failed + errors} failed, {skipped} skipped"
    )


def _summarise(outcomes: list[Outcome]) -> int:
    print()
    for outcome in outcomes:
        verdict = "ok" if outcome.passed else "FAILED"
        print(f"{outcome.step:<22}{verdict:<8}{outcome.took_s:6.0f} s  {outcome.detail}".rstrip())
    failed = [outcome.step for outcome in outcomes if not outcome.passed]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
