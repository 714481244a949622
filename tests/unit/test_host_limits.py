"""Open files: raised to what the bounds need, else the bounds lowered to what there is."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gpuorchd.host.limits import SPARE_FILES, fit_open_files, fitted


@pytest.fixture
def hard() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def fit_under(hard: int, max_connections: int, max_processes: int) -> str:
    """Fit the bounds in a process that cannot raise its hard limit; return what it printed."""
    script = (
        "import os, resource, sys\n"
        "from gpuorchd.host.limits import fit_open_files\n"
        "from gpuorchd.host.start import StartError\n"
        "hard, connections, processes = map(int, sys.argv[1:])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: print(*fit_open_files(connections, processes))\n"
        "except StartError as error: print(error)\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, str(hard), str(max_connections), str(max_processes)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout


def test_a_low_soft_limit_is_raised_to_what_is_needed(hard: int) -> None:
    bounds = fit_open_files(1_000, 500)
    assert bounds == (1_000, 500, 1_500 + SPARE_FILES, 1_500 + SPARE_FILES)
    assert not bounds.lowered
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1_500 + SPARE_FILES, hard)


def test_a_sufficient_limit_is_left_alone(hard: int) -> None:
    fit_open_files(50, 50)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)


def test_a_hard_limit_that_stays_too_low_lowers_the_bounds() -> None:
    bounds, limits = fit_under(1_128, 4_096, 1_024).splitlines()
    assert bounds == f"500 500 1128 {4_096 + 1_024 + SPARE_FILES}"
    assert limits == "1128 1128"


def test_a_limit_for_hardly_any_connection_stops_the_start() -> None:
    message, _ = fit_under(SPARE_FILES + 8, 4_096, 1_024).splitlines()
    assert f"the limit of open files is {SPARE_FILES + 8}, which leaves 4 connections" in message
    assert "LimitNOFILE" in message


@pytest.mark.parametrize(
    ("open_files", "connections", "processes"),
    [
        (SPARE_FILES + 100, 50, 50),
        (SPARE_FILES + 1_000, 990, 10),
        (SPARE_FILES - 10, 0, 0),
    ],
)
def test_too_few_descriptors_are_shared_out(
    open_files: int, connections: int, processes: int
) -> None:
    wanted_processes = 10 if processes == 10 else 5_000
    assert fitted(open_files, 5_000, wanted_processes) == (connections, processes)
