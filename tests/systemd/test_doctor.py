"""`gpuorch doctor` on a host with a real systemd: what is broken on purpose is found and mended."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.support.daemon_process import wait_until
from tests.systemd.rig import DAEMON, ENV_FILE, PYTHON, SOCKETS, Rig

pytestmark = [pytest.mark.serial, pytest.mark.slow]

LISTENER, METRICS = SOCKETS
OCCUPY = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("up", flush=True)
sys.stdin.read()
"""


def doctor(rig: Rig, user: str | None = None) -> tuple[int, list[dict[str, Any]]]:
    """Return exit code and findings."""
    done = rig.run("gpuorch", "doctor", "--json", user=user, check=False)
    return done.returncode, json.loads(done.stdout)["findings"]


def worst(findings: list[dict[str, Any]], area: str) -> dict[str, Any]:
    """Return the worst finding of an area."""
    return max(
        (one for one in findings if one["area"] == area),
        key=lambda one: ("ok", "warn", "fail").index(one["level"]),
    )


def mend(rig: Rig, finding: dict[str, Any]) -> None:
    """Type what the doctor says, but for looking into the journal."""
    for line in finding["mend"]:
        if not line.startswith("journalctl"):
            rig.run("sh", "-c", line)


def test_an_installed_system_is_well_for_root_and_for_an_agent(rig: Rig) -> None:
    wait_until(lambda: rig.gpuorch("ready", check=False).returncode == 0, "the daemon is ready")
    for user in (None, "justnews"):
        code, findings = doctor(rig, user)
        assert code == 0, findings
        assert worst(findings, "env file")["level"] in {"ok", "warn"}
    assert "systemd listens" in worst(findings, "socket")["found"]
    assert "connections stored" in worst(findings, "store")["found"]
    assert "of 163840 MiB leased" in json.dumps(findings)


def test_who_is_not_in_the_group_is_told_how_to_come_in(rig: Rig) -> None:
    rig.gpuorch("health")
    code, findings = doctor(rig, "nobody")
    assert code == 1
    assert "sudo usermod -aG justnews nobody" in worst(findings, "socket")["mend"]
    assert "not in the group justnews" in worst(findings, "group")["found"]


def test_a_typo_in_the_env_file_is_named_with_its_line(rig: Rig) -> None:
    rig.gpuorch("health")
    rig.configure(GPUORCH_SIMULATE="2x81920", SAFE_MODE="maybe")
    rig.systemctl("reload", DAEMON)
    wait_until(lambda: rig.gpuorch("ready", check=False).returncode == 1, "the refusal")
    code, findings = doctor(rig)
    assert code == 1
    assert f"SAFE_MODE ({ENV_FILE}:2) is 'maybe'" in worst(findings, "env file")["found"]
    assert "stays in force" in worst(findings, "ready")["found"]
    assert "configuration refused" in json.dumps(findings)


def test_stopped_sockets_are_started_as_it_says(rig: Rig) -> None:
    rig.systemctl("stop", *SOCKETS, DAEMON)
    code, findings = doctor(rig)
    assert code == 1
    mend(rig, worst(findings, "socket"))
    mend(rig, next(one for one in findings if METRICS in one["found"]))
    assert rig.is_active(LISTENER)
    assert rig.is_active(METRICS)


def test_a_busy_port_is_named_with_who_has_it_and_freed_as_it_says(rig: Rig) -> None:
    port = rig.show(METRICS, "Listen").split()[0].rpartition(":")[2]
    rig.systemctl("stop", METRICS)
    other = rig.start(
        PYTHON, "-I", "-c", OCCUPY, port, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "up\n"
        rig.systemctl("start", METRICS, check=False)
        rig.gpuorch("health")
        _, findings = doctor(rig)
        finding = worst(findings, "port")
        assert "is in use by process" in finding["found"]
        assert PYTHON in finding["found"]
        mend(rig, finding)
        assert rig.is_active(METRICS)
    finally:
        rig.end(other)


def test_another_port_than_the_sockets_is_moved_as_it_says(rig: Rig) -> None:
    rig.configure(GPUORCH_SIMULATE="2x81920", GPU_ORCHESTRATOR_PORT=9014)
    rig.gpuorch("health")
    _, findings = doctor(rig)
    finding = worst(findings, "port")
    assert "GPU_ORCHESTRATOR_PORT is 9014" in finding["found"]
    mend(rig, finding)
    try:
        wait_until(lambda: rig.gpuorch("ready", check=False).returncode == 0, "ready")
        assert rig.http("/health", port=9014)[0] == 200
        assert worst(doctor(rig)[1], "port")["level"] == "ok"
    finally:
        rig.run("rm", "-r", f"/etc/systemd/system/{METRICS}.d")
        rig.systemctl("daemon-reload")
