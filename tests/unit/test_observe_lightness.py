"""What the lease path does not need is not loaded before the daemon answers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.sources import ROOT

# Together about half a second of import.
SLOW = ("structlog", "prometheus_client", "aiohttp")


@pytest.mark.parametrize(
    "module",
    [
        "gpuorchd.observe.log",
        "gpuorchd.observe.journal",
        "gpuorchd.observe.metrics",
        "gpuorchd.observe.readiness",
        "gpuorchd.observe.http",
    ],
)
def test_what_the_daemon_imports_at_start_loads_no_slow_library(module: str) -> None:
    code = f"import sys, {module}\nprint(*[name for name in {SLOW!r} if name in sys.modules])\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_an_event_loads_nothing_until_its_line_is_due() -> None:
    code = (
        "import sys\n"
        "from gpuorchd.observe.log import Log\n"
        "log = Log(form='json')\n"
        "log.event('daemon.stopped')\n"
        "assert 'structlog' not in sys.modules\n"
        "log.close()\n"
        "assert 'structlog' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert '"event":"daemon.stopped"' in done.stderr
