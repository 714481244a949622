"""The benchmarks run, and the promises among them that do not depend on a quiet machine hold."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support import system_packages
from tests.support.daemon_process import ROOT

DEADLINE_S = 90.0


def test_the_pair_is_measured_against_c() -> None:
    system_packages.require("cc")
    found = _measured("pair", "--rounds", "2")
    assert found["figures"]["c_us"][0] > 0
    # Whatever the machine: a daemon that checks and accounts is slower than an echo in C.
    assert found["figures"]["times_c"][0] > 1


def test_a_burst_is_served() -> None:
    found = _measured("burst", "--bursts", "1")
    assert 0 < found["figures"]["p50_ms"] <= found["figures"]["p99_ms"]


def test_hostile_peers_are_measured() -> None:
    found = _measured("hostile", "--stretches", "1", "--pairs", "200")
    assert found["figures"]["hostile_p50_us"] > 0


@pytest.mark.serial
@pytest.mark.slow
def test_ten_thousand_idle_holders_cost_at_most_60_mib() -> None:
    found = _measured("idle_holders")
    assert found["figures"]["holders"] == 10_000
    assert found["figures"]["added_mb"] <= 60


def _measured(name: str, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.bench.{name}", "--json", *options],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    # 1: an aim was missed, which a busy machine does to times.
    assert done.returncode in {0, 1}, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
