"""What holds for every test: nothing is left behind, and in CI nothing skips that could run."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from tests.support import skips
from tests.support.leaks import Snapshot, left_behind, watch_tasks

# No time limit for an example: a busy machine would fail it, and every test has one as a whole. A
# failure prints what reproduces it.
hypothesis.settings.register_profile("house", deadline=None, print_blob=True)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the test that leaves a descriptor, a thread, a child process or a task behind."""
    tasks: list[str] = []
    stop_watching = watch_tasks(tasks.append)
    before = Snapshot.take()
    yield
    stop_watching()
    left = [*tasks, *left_behind(before)]
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a card where there is none."""
    if skips.has_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=skips.NO_GPU))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, fail a run in which a test skipped for want of something that can be installed."""
    if hasattr(session.config, "workerinput") or not skips.in_ci():
        # A worker of a parallel run reports to the controller, which judges the whole run.
        return
    refused = skips.unexcused(_skip_reasons(session.config))
    if refused and session.exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the skips that fail a run in CI."""
    if not skips.in_ci():
        return
    refused = skips.unexcused(_skip_reasons(config))
    if refused:
        terminalreporter.section("skips that are not allowed in CI", red=True)
        for reason in sorted(set(refused)):
            terminalreporter.line(f"{refused.count(reason)} x {reason}")


def _skip_reasons(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return []
    reasons = []
    for report in reporter.stats.get("skipped", []):
        # Where, on which line, and why; a collection that skipped has the same shape.
        where = report.longrepr
        reasons.append(str(where[2]).removeprefix("Skipped: ") if isinstance(where, tuple) else "")
    return reasons
