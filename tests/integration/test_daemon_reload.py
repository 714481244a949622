"""SIGHUP: what a reload puts in force, what waits for a restart, and what a typo leaves alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import DaemonProcess, running_daemon, wait_until
from tests.support.passing_manager import Ear, passed_daemon

SIMULATED = ("--simulate", "1x24576")


class Reloaded:
    """A daemon with an env file, and its answers."""

    def __init__(self, daemon: DaemonProcess, path: Path) -> None:
        self.daemon = daemon
        self.path = path

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def reload(self, text: str, event: str = "config.reloaded") -> dict[str, Any]:
        """Edit, reload, and return what the log says of it."""
        self.write(text)
        count = len(self.daemon.logged(event))
        self.daemon.signal(signal.SIGHUP)
        wait_until(lambda: len(self.daemon.logged(event)) > count, f"{event} in the log")
        return self.daemon.logged(event)[-1]

    def check(self) -> dict[str, Any]:
        with self.daemon.client() as client:
            answer = client.ask("ready")
            assert answer["ready"] is answer["checks"]["config"]["ok"], answer
            return dict(answer["checks"]["config"])

    def safe_mode(self) -> bool:
        with self.daemon.client() as client:
            return bool(client.ask("health")["safe_mode"])


@pytest.fixture
def reloaded(tmp_path: Path) -> Iterator[Reloaded]:
    path = tmp_path / "x.env"
    path.touch(0o640)
    flags = (*SIMULATED, "--env-file", str(path))
    with running_daemon(tmp_path, *flags) as daemon:
        yield Reloaded(daemon, path)


def test_bounds_are_taken_and_what_is_held_stays(reloaded: Reloaded) -> None:
    with reloaded.daemon.client() as client:
        first = client.ask("lease", agent="a", min_memory_mb=100)
        assert client.ask("lease", agent="a", min_memory_mb=100)["granted"]
        line = reloaded.reload("GPUORCH_MAX_LEASES=1\n")
        assert line["taken"] == ["GPUORCH_MAX_LEASES"]
        refused = client.ask("lease", agent="a", min_memory_mb=100)
        assert refused["error"]["code"] == "limit"
        assert len(client.ask("allocations")["allocations"]) == 2
        reloaded.reload("GPUORCH_MAX_LEASES=3\n")
        assert client.ask("lease", agent="a", min_memory_mb=100)["granted"]
        assert client.ask("release", token=first["token"])["released"]


def test_connections_the_log_level_and_the_time_limit_are_taken(reloaded: Reloaded) -> None:
    reloaded.reload(
        "GPUORCH_MAX_SUBSCRIPTIONS_PER_CONNECTION=1\n"
        "GPU_ORCHESTRATOR_LEASE_TTL=600\n"
        "GPUORCH_LOG_LEVEL=warning\n"
        "GPUORCH_MAX_CONNECTIONS=1\n",
        # The reload itself is told at the level that holds from then on: too low to be seen. More
        # holders than connections are allowed now, which is.
        "config.value_warned",
    )
    with reloaded.daemon.client() as client:
        assert client.ask("lease", agent="a", min_memory_mb=100)["expires_at"] is not None
        assert client.ask("subscribe")["ok"]
        assert client.ask("subscribe")["error"]["code"] == "limit"
        with reloaded.daemon.client() as other:
            assert other.ask("health")["error"]["code"] == "limit"
    assert reloaded.daemon.logged("lease.granted") == []


def test_the_admin_group_is_taken_on_connections_that_are_open(reloaded: Reloaded) -> None:
    line = reloaded.reload("GPUORCH_ADMIN_GROUP=0\n")
    assert line["taken"] == ["GPUORCH_ADMIN_GROUP"]


def test_safe_mode_is_switched_when_its_value_has_changed(reloaded: Reloaded) -> None:
    assert not reloaded.safe_mode()
    reloaded.reload("SAFE_MODE=true\n")
    wait_until(reloaded.safe_mode, "SAFE_MODE is on")
    with reloaded.daemon.client() as client:
        assert client.ask("lease", agent="a", min_memory_mb=100)["note"] == "SAFE_MODE"
        # What is set at run time stands over reloads that do not change the variable.
        assert client.ask("policy_set", changes={"safe_mode": False})["ok"]
    reloaded.reload("SAFE_MODE=true\nGPUORCH_MAX_LEASES=5\n")
    assert not reloaded.safe_mode()
    reloaded.reload("SAFE_MODE=false\n")
    reloaded.reload("SAFE_MODE=true\n")
    wait_until(reloaded.safe_mode, "SAFE_MODE is on again")


def test_safe_mode_as_reloaded_is_what_the_next_start_compares_with(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("SAFE_MODE=false\n")
    flags = (*SIMULATED, "--env-file", str(path))
    with running_daemon(tmp_path, *flags) as daemon:
        reloaded = Reloaded(daemon, path)
        reloaded.reload("SAFE_MODE=true\n")
        wait_until(reloaded.safe_mode, "SAFE_MODE is on")
        with daemon.client() as client:
            assert client.ask("policy_set", changes={"safe_mode": False})["ok"]
        assert daemon.stop() == 0
    with running_daemon(tmp_path, *flags) as daemon:
        assert not Reloaded(daemon, path).safe_mode()


def test_what_a_reload_is_not_enough_for_waits_and_is_named(reloaded: Reloaded) -> None:
    line = reloaded.reload("GPUORCH_STATE_DIR=/elsewhere\nCUDA_MPS_PIPE_DIRECTORY=/other\n")
    # The state folder is given by a flag, which goes before the file: nothing has changed there.
    assert (line["taken"], line["waiting"]) == ([], ["CUDA_MPS_PIPE_DIRECTORY"])
    check = reloaded.check()
    assert check["ok"]
    assert "waits for a restart: CUDA_MPS_PIPE_DIRECTORY" in check["detail"]
    reloaded.reload("")
    assert reloaded.check()["detail"] == "in force as configured"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("GPUORCH_MAX_LEASES=1\nSAFE_MODE=maybe\n", ":2) is 'maybe'"),
        ("GPUORCH_MAX_LEASES=1\nSAFE_MODE\n", ":2: 'SAFE_MODE' has no ="),
        ("GPUORCH_MAX_LEASES=1\nGPUORCH_READING_MAX_AGE_S=0.5\n", "more seconds than"),
    ],
)
def test_a_bad_configuration_keeps_all_of_the_old_and_says_so(
    reloaded: Reloaded, text: str, said: str
) -> None:
    reloaded.reload("GPUORCH_MAX_LEASES=2\n")
    line = reloaded.reload(text, "config.reload_refused")
    assert said in line["error"]
    check = reloaded.check()
    assert not check["ok"]
    assert said in check["detail"]
    with reloaded.daemon.client() as client:
        for granted in (True, True, None):
            assert client.ask("lease", agent="a", min_memory_mb=100).get("granted") is granted
    reloaded.reload("GPUORCH_MAX_LEASES=3\n")
    assert reloaded.check()["ok"]


def test_a_file_that_is_gone_keeps_all_of_the_old(reloaded: Reloaded) -> None:
    reloaded.path.unlink()
    reloaded.daemon.signal(signal.SIGHUP)
    line = reloaded.daemon.wait_for_log("config.reload_refused")
    assert "there is no such file" in line["error"]
    assert not reloaded.check()["ok"]


def test_a_typo_stops_the_start_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("\nSAFE_MODE=maybe\n")
    daemon = DaemonProcess(tmp_path, "--env-file", f"-{path}")
    try:
        assert daemon.wait() == 2
        assert f"SAFE_MODE ({path}:2) is 'maybe'" in daemon.output()
    finally:
        daemon.end()


def test_the_service_manager_hears_of_a_reload_and_of_what_was_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.touch(0o640)
    # The status line tells of GPUs too, which are not to change here.
    flags = ("--safe-mode", "--env-file", str(path))
    with Ear(tmp_path / "n") as ear:
        environ = {"NOTIFY_SOCKET": str(ear.path)}
        passed = {"gpuorchd.socket": tmp_path / "s"}
        with passed_daemon(tmp_path, *flags, passed=passed, environ=environ) as daemon:
            ear.hear_until("STATUS=SAFE_MODE")
            reloaded = Reloaded(daemon, path)
            reloaded.reload("SAFE_MODE\n", "config.reload_refused")
            heard = ear.hear_until("STATUS=")
            assert [line.split("=")[0] for line in heard] == ["RELOADING", "READY", "STATUS"]
            assert "MONOTONIC_USEC=" in heard[0]
            assert f"configuration refused: {path}:1: 'SAFE_MODE' has no =" in heard[-1]
            reloaded.reload("GPUORCH_LOG_LEVEL=info\n")
            heard = ear.hear_until("STATUS=")
            assert [line.split("=")[0] for line in heard] == ["RELOADING", "READY", "STATUS"]
            assert "refused" not in heard[-1]
