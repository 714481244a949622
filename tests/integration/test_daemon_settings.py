"""What an admin sets at run time outlives the daemon, as far as it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.daemon_process import DaemonProcess, running_daemon

SIMULATED = ("--simulate", "1x24576")


def safe_mode_of(daemon: DaemonProcess) -> bool:
    with daemon.client() as client:
        return bool(client.ask("health")["safe_mode"])


def set_policy(daemon: DaemonProcess, **changes: object) -> None:
    with daemon.client() as client:
        assert client.ask("policy_set", changes=changes)["ok"]


def test_policy_and_revision_survive_a_restart(tmp_path: Path) -> None:
    changes = {
        "max_memory_per_agent_mb": 4_096,
        "agents": {"balancer": {"gpu": False}, "analyst": {"priority": "critical"}},
    }
    with running_daemon(tmp_path, *SIMULATED) as daemon:
        with daemon.client() as client:
            before = client.ask("policy_set", changes=changes)
            assert before["ok"]
        assert daemon.stop() == 0
    with running_daemon(tmp_path, *SIMULATED) as daemon, daemon.client() as client:
        after = client.ask("policy_get")
        assert after["policy"] == before["policy"]
        assert after["revision"] == before["revision"]
        denial = client.ask("lease", agent="balancer", min_memory_mb=500)
        assert (denial["granted"], denial["note"]) == (False, "POLICY")


def test_an_answered_change_survives_a_kill(tmp_path: Path) -> None:
    with running_daemon(tmp_path, *SIMULATED) as daemon:
        set_policy(daemon, default_memory_mb=1_234)
        daemon.process.kill()
        daemon.wait()
    with running_daemon(tmp_path, *SIMULATED) as daemon, daemon.client() as client:
        assert client.ask("policy_get")["policy"]["default_memory_mb"] == 1_234


def test_a_cordon_survives_a_restart(tmp_path: Path) -> None:
    with running_daemon(tmp_path, *SIMULATED) as daemon:
        with daemon.client() as client:
            assert client.ask("cordon", gpu=0, reason="fan")["ok"]
        assert daemon.stop() == 0
    with running_daemon(tmp_path, *SIMULATED) as daemon, daemon.client() as client:
        (gpu,) = client.ask("gpu_info")["gpus"]
        assert gpu["state"] == "cordoned"


def test_a_damaged_file_is_set_aside_with_a_loud_message(tmp_path: Path) -> None:
    with running_daemon(tmp_path, *SIMULATED) as daemon:
        set_policy(daemon, default_memory_mb=1_234)
        assert daemon.stop() == 0
    file = tmp_path / "state" / "settings.json"
    damaged = file.read_text()[:-40]
    file.write_text(damaged)
    with running_daemon(tmp_path, *SIMULATED) as daemon:
        event = daemon.wait_for_log("host.settings_set_aside")
        assert event["level"] == "error"
        assert event["path"] == str(file)
        assert Path(event["kept_as"]).read_text() == damaged
        with daemon.client() as client:
            assert client.ask("policy_get")["policy"]["default_memory_mb"] == 2_048
            ready = client.ask("ready")
            assert ready["ready"] is False
            assert event["kept_as"] in ready["checks"]["settings"]["detail"]
            assert "gpu_orchestrator_settings_damaged 1.0" in client.ask("metrics")["text"]
        set_policy(daemon, default_memory_mb=1_234)
        with daemon.client() as client:
            assert client.ask("ready")["ready"] is True
            assert "gpu_orchestrator_settings_damaged 0.0" in client.ask("metrics")["text"]


def test_the_settings_are_for_the_daemon_alone(tmp_path: Path) -> None:
    with running_daemon(tmp_path, *SIMULATED) as daemon:
        set_policy(daemon, default_memory_mb=1_234)
        assert daemon.state.stat().st_mode & 0o077 == 0
        assert (daemon.state / "settings.json").stat().st_mode & 0o077 == 0


# The environment's SAFE_MODE at each start, what was found there, what was then set at run time.
STARTS = [
    pytest.param([("true", True, False), ("true", False, None)], id="unchanged: run time stands"),
    pytest.param([("true", True, False), ("false", False, None)], id="changed: it wins"),
    pytest.param(
        [("false", False, True), ("true", True, None), ("false", False, None)],
        id="changed twice: it wins twice",
    ),
    pytest.param([(None, False, True), (None, True, None)], id="never set: run time stands"),
    pytest.param([(None, False, True), ("false", False, None)], id="set later: it wins"),
    pytest.param([("true", True, None), (None, False, None)], id="taken away: nobody asked for it"),
]


@pytest.mark.parametrize("starts", STARTS)
def test_safe_mode_of_the_environment_and_of_run_time(
    tmp_path: Path, starts: list[tuple[str | None, bool, bool | None]]
) -> None:
    for value, expected, then_set in starts:
        environ = {} if value is None else {"SAFE_MODE": value}
        with running_daemon(tmp_path, *SIMULATED, environ=environ) as daemon:
            assert safe_mode_of(daemon) is expected
            if then_set is not None:
                set_policy(daemon, safe_mode=then_set)
                assert safe_mode_of(daemon) is then_set
            assert daemon.stop() == 0


def test_safe_mode_of_the_environment_wins_in_another_boot(tmp_path: Path) -> None:
    environ = {"SAFE_MODE": "true"}
    with running_daemon(tmp_path, *SIMULATED, environ=environ) as daemon:
        set_policy(daemon, safe_mode=False)
        assert daemon.stop() == 0
    file = tmp_path / "state" / "settings.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "boot_id": "an earlier one"}))
    with running_daemon(tmp_path, *SIMULATED, environ=environ) as daemon:
        assert safe_mode_of(daemon) is True


def test_safe_mode_switched_off_lets_leases_be_granted_again(tmp_path: Path) -> None:
    environ = {"SAFE_MODE": "true"}
    with (
        running_daemon(tmp_path, *SIMULATED, environ=environ) as daemon,
        daemon.client() as client,
    ):
        denial = client.ask("lease", agent="a", min_memory_mb=1_024)
        assert (denial["granted"], denial["gpu"], denial["note"]) == (False, None, "SAFE_MODE")
        set_policy(daemon, safe_mode=False)
        assert client.ask("lease", agent="a", min_memory_mb=1_024, wait_s=10)["granted"] is True
