"""Agents start behind the readiness gate, and what becomes of the daemon is not their end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.daemon_process import wait_until
from tests.systemd.rig import DAEMON, SOCKETS, Rig

pytestmark = [pytest.mark.serial, pytest.mark.slow]

ANALYST = "justnews@analyst.service"
# Without the driver's library this is never ready.
NOT_READY = {"GPUORCH_SIMULATE": "2x81920", "ENABLE_NVML": "true"}
READY = {"GPUORCH_SIMULATE": "2x81920"}
SHORT_GATE = "[Service]\nExecStartPre=\nExecStartPre=-/usr/bin/gpuorch ready --wait 1s\n"


def said(rig: Rig, place: str) -> list[str]:
    """What the agent's program has said."""
    return [line for line in rig.messages(ANALYST, place) if " works on " in line]


def test_an_agent_starts_only_when_the_gate_says_ready(rig: Rig) -> None:
    place = rig.cursor()
    rig.configure(**NOT_READY)
    rig.systemctl("start", "--no-block", ANALYST)
    wait_until(lambda: rig.show(ANALYST, "SubState") == "start-pre", "the agent at its gate")
    assert rig.gpuorch("ready", check=False).returncode == 1
    assert said(rig, place) == []
    rig.configure(**READY)
    rig.systemctl("restart", DAEMON)
    wait_until(lambda: len(said(rig, place)) == 1, "the agent's first word")
    assert said(rig, place)[0].endswith("works on cuda:0: granted")
    assert rig.show(ANALYST, "SubState") == "running"


def test_after_the_gate_s_limit_an_agent_goes_on_with_the_cpu(rig: Rig) -> None:
    place = rig.cursor()
    # A daemon that cannot start at all: nobody answers, at the gate and afterwards.
    rig.configure(GPUORCH_SIMULATE="none")
    rig.drop_in(ANALYST, SHORT_GATE)
    rig.systemctl("start", ANALYST)
    assert rig.is_active(ANALYST)
    wait_until(lambda: len(said(rig, place)) == 1, "the agent's first word")
    assert " works on cpu: " in said(rig, place)[0]


def test_the_gate_s_limit_is_shorter_than_the_time_to_start(rig: Rig) -> None:
    assert "ready --wait 60s" in rig.show(ANALYST, "ExecStartPre")
    assert rig.show(ANALYST, "TimeoutStartUSec") == "1min 30s"


@pytest.mark.parametrize(
    "change",
    [
        ("restart", DAEMON),
        ("stop", DAEMON),
        ("restart", "justnews@gpu_orchestrator.service"),
        ("stop", "justnews@gpu_orchestrator.service", DAEMON, *SOCKETS),
        ("kill", "--signal=KILL", "--kill-who=main", DAEMON),
    ],
)
def test_what_becomes_of_the_daemon_leaves_a_running_agent_alone(
    rig: Rig, change: tuple[str, ...]
) -> None:
    place = rig.cursor()
    rig.systemctl("start", "justnews@gpu_orchestrator", ANALYST)
    wait_until(lambda: len(said(rig, place)) == 1, "the agent's first word")
    before = rig.show(ANALYST, "MainPID")
    rig.systemctl(*change)
    assert rig.show(ANALYST, "MainPID") == before
    assert rig.show(ANALYST, "NRestarts") == "0"
    assert rig.show(ANALYST, "SubState") == "running"


def test_an_upgrade_leaves_a_running_agent_and_its_lease_alone(rig: Rig) -> None:
    place = rig.cursor()
    rig.systemctl("start", ANALYST)
    wait_until(lambda: len(said(rig, place)) == 1, "the agent's first word")
    before = rig.show(ANALYST, "MainPID")
    (lease,) = leases(rig)
    assert (lease["agent"], str(lease["pid"]), lease["state"]) == ("analyst", before, "active")
    daemon = rig.main_pid()
    rig.install()
    rig.systemctl("restart", DAEMON)
    assert rig.wait_for_restart(daemon)
    assert rig.show(ANALYST, "MainPID") == before
    assert rig.show(ANALYST, "SubState") == "running"
    assert leases(rig) == [lease]
    # It is still the agent's: it ends with it.
    rig.systemctl("stop", ANALYST)
    wait_until(lambda: leases(rig) == [], "the end of its lease")


def leases(rig: Rig) -> list[dict[str, Any]]:
    """What `allocations` says of every lease, but for what changes by itself."""
    rows: list[dict[str, Any]] = json.loads(rig.gpuorch("leases", "--json").stdout)["allocations"]
    for row in rows:
        del row["used_mb"]
    return rows
