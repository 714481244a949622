"""The doctor: each thing that can be wrong is found, said in plain words, and has its remedy."""

from __future__ import annotations

import errno
import grp
import os
import socket
import sys
from pathlib import Path

import pytest

from libclient.cli.doctor import case as case_room
from libclient.cli.doctor import devices, reaching, service
from libclient.cli.doctor import host as host_room
from libclient.cli.doctor.case import METRICS_UNIT, SERVICE, SOCKET_UNIT
from libclient.cli.doctor.command import CHECKS, examine, summary
from libclient.cli.doctor.findings import FAIL, LEVELS, OK, WARN, Finding
from libclient.cli.doctor.host import Host, command_of, environment_of
from libclient.version import VERSION
from tests.support.doctor_scene import Scene, assert_finds


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(path))
    sock.listen()
    return sock


# The way to the daemon.


def test_a_missing_socket_is_started_by_its_unit_or_by_hand(scene: Scene) -> None:
    assert_finds(scene.one(reaching.socket_check), FAIL, "is not there", "gpuorchd --socket")
    scene.unit(SERVICE)
    assert_finds(
        scene.one(reaching.socket_check), FAIL, "is not there", f"systemctl restart {SERVICE}"
    )


def test_a_socket_that_nobody_listens_on_is_told_from_a_file_and_from_a_good_one(
    scene: Scene,
) -> None:
    path = scene.root / "s"
    with listen(path):
        path.chmod(0o660)
        assert_finds(scene.one(reaching.socket_check), OK, "mode 0660; the daemon listens")
        path.chmod(0o666)
        assert_finds(scene.one(reaching.socket_check), WARN, "everyone on this host")
        path.chmod(0o660)
    assert_finds(scene.one(reaching.socket_check), FAIL, "nobody listens on it")
    path.unlink()
    path.touch()
    assert_finds(scene.one(reaching.socket_check), FAIL, "is no socket", f"rm {path}")


def test_a_socket_that_may_not_be_opened_names_its_group(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listen(scene.root / "s"):
        monkeypatch.setattr(reaching, "connect_fault", lambda path: errno.EACCES)
        (scene.root / "s").chmod(0o660)
        finding = scene.one(reaching.socket_check)
        group = reaching._group_name((scene.root / "s").stat().st_gid)
        assert_finds(finding, FAIL, "may not open it", f"usermod -aG {group} ")
        assert f"newgrp {group}" in finding.mend[1]
        (scene.root / "s").chmod(0o600)
        assert_finds(scene.one(reaching.socket_check), FAIL, "may not open it", "gpuorch doctor")


@pytest.mark.parametrize(
    ("listed", "groups", "fault", "level", "said"),
    [
        (False, [], "denied", FAIL, "is not in the group"),
        (True, [], "denied", FAIL, "after this session began"),
        (True, [0], "", OK, "is in the group"),
        (False, [], "", OK, "without its group"),
    ],
)
def test_group_membership_is_that_of_the_session_and_not_of_the_file(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    listed: bool,
    groups: list[int],
    fault: str,
    level: str,
    said: str,
) -> None:
    entry = grp.struct_group(("agents", "x", 0, ["someone"] if listed else []))
    monkeypatch.setattr(reaching, "user_name", lambda: "someone")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 1000)
    monkeypatch.setattr(os, "getgroups", lambda: groups)
    monkeypatch.setattr(reaching, "_entry", lambda gid: entry)
    scene.more["fault"] = fault
    finding = scene.one(reaching.group_check)
    assert_finds(finding, level, said)
    assert all(line.startswith(("sudo ", "newgrp ")) for line in finding.mend)


def test_no_daemon_an_old_daemon_and_safe_mode_are_told_apart(scene: Scene) -> None:
    scene.more["fault"] = "nobody answers there"
    assert_finds(scene.one(reaching.daemon_check), FAIL, "nobody answers", "the socket first")
    with listen(scene.root / "s"):
        assert_finds(scene.one(reaching.daemon_check), FAIL, "nobody answers there", "look at the")
        scene.unit(SERVICE)
        assert_finds(scene.one(reaching.daemon_check), FAIL, "nobody answers", "journalctl")
    scene.answers()
    assert_finds(scene.one(reaching.daemon_check), WARN, "gpuorchd 0.0.0", "systemctl restart")
    scene.answers(hello={"version": VERSION})
    assert_finds(scene.one(reaching.daemon_check), OK, "answers")
    scene.answers(hello={"version": VERSION}, health={"safe_mode": True})
    assert_finds(scene.one(reaching.daemon_check), WARN, "SAFE_MODE", "policy set safe_mode=false")


def test_each_failed_check_of_the_daemon_is_a_finding(scene: Scene) -> None:
    checks = {name: {"ok": False, "detail": f"bad {name}"} for name in reaching.READY_MENDS}
    scene.answers(ready={"ready": False, "checks": checks})
    found = scene.found(reaching.ready_check)
    assert [finding.found for finding in found] == [f"{name}: bad {name}" for name in checks]
    assert all(finding.level == FAIL and finding.mend for finding in found)
    waits = {"config": {"ok": True, "detail": "in force but for what waits for a restart: X"}}
    scene.answers(ready={"ready": True, "checks": waits})
    assert_finds(scene.one(reaching.ready_check), WARN, "waits for a restart: X", "restart")


# Units, store, limits, cgroup.


def test_without_systemd_no_unit_is_missed(scene: Scene) -> None:
    assert_finds(scene.one(service.units_check), OK, "systemd does not run here")


def test_units_that_are_not_installed_are_named(scene: Scene) -> None:
    scene.units[SERVICE] = {"LoadState": "not-found"}
    assert_finds(scene.one(service.units_check), WARN, "not-found", "make install")


@pytest.mark.parametrize(
    ("name", "properties", "level", "said", "mend"),
    [
        (SOCKET_UNIT, {}, OK, "is active, enabled", ""),
        (
            SOCKET_UNIT,
            {"ActiveState": "inactive"},
            FAIL,
            "is inactive",
            f"restart {SERVICE}",
        ),
        (
            SOCKET_UNIT,
            {"ActiveState": "failed", "Result": "trigger-limit-hit"},
            FAIL,
            "failed (trigger-limit-hit)",
            f"reset-failed {SOCKET_UNIT}",
        ),
        (SOCKET_UNIT, {"UnitFileState": "disabled"}, WARN, "next boot", "systemctl enable"),
        (SOCKET_UNIT, {"NeedDaemonReload": "yes"}, WARN, "not read since", "daemon-reload"),
        (SOCKET_UNIT, {"LoadState": "not-found"}, FAIL, "not-found", "make install"),
        (SERVICE, {"ActiveState": "inactive"}, OK, "the first client starts it", ""),
        (SERVICE, {"StatusText": "1 GPU, 2 leases"}, OK, "1 GPU, 2 leases", ""),
        (SERVICE, {"NRestarts": "9"}, WARN, "restarted 9 times", "journalctl"),
        (METRICS_UNIT, {"ActiveState": "failed", "Result": "resources"}, FAIL, "resources", ""),
    ],
)
def test_each_state_of_a_unit_has_its_words(
    scene: Scene, name: str, properties: dict[str, str], level: str, said: str, mend: str
) -> None:
    for unit in (SOCKET_UNIT, METRICS_UNIT, SERVICE, devices.DRIVER_UNIT):
        scene.unit(unit, **(properties if unit == name else {}))
    found = [one for one in scene.found(service.units_check) if one.found.startswith(name)]
    worst = max(found, key=lambda finding: LEVELS.index(finding.level))
    assert_finds(worst, level, said, mend)


@pytest.mark.parametrize(
    ("most", "used", "told", "level", "said"),
    [
        ("1100", "3", "1100", OK, "3 of 1100 connections stored"),
        ("0", "0", "", WARN, "clients have to reattach"),
        ("512", "3", "1100", FAIL, "was told 1100"),
        ("1100", "1000", "1100", WARN, "soon new leases are refused"),
    ],
)
def test_the_descriptor_store_and_what_the_daemon_was_told_of_it_agree(
    scene: Scene, most: str, used: str, told: str, level: str, said: str
) -> None:
    environment = f"GPUORCH_DESCRIPTOR_STORE={told} OTHER=1" if told else ""
    scene.unit(
        SERVICE, FileDescriptorStoreMax=most, NFileDescriptorStore=used, Environment=environment
    )
    assert_finds(scene.one(service.store_check), level, said)


def test_too_few_open_files_for_the_bounds_are_found(scene: Scene) -> None:
    assert_finds(scene.one(service.limits_check), OK, "no daemon runs")
    scene.more["daemon_pid"] = 7
    assert_finds(scene.one(service.limits_check), WARN, "cannot be read")
    scene.more["config"] = {"max_connections": 4096, "max_processes": 1024}
    scene.write("/proc/7/limits", "Max open files            1024                 1024     files\n")
    assert_finds(scene.one(service.limits_check), FAIL, "hard limit of open files is 1024", "10240")
    scene.unit(SERVICE)
    assert_finds(scene.one(service.limits_check), FAIL, "lowered its bounds", "LimitNOFILE=10240")
    scene.write("/proc/7/limits", "Max open files            5248                 8192     files\n")
    assert_finds(scene.one(service.limits_check), OK, "5248 open files")


@pytest.mark.parametrize(
    ("text", "level", "said"),
    [
        ("0::/system.slice/justnews@analyst.service\n", OK, "counts as justnews@analyst.service"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", OK, "in no system service"),
        ("1:name=systemd:/system.slice/x.service\n", WARN, "no unified cgroup hierarchy"),
    ],
)
def test_the_cgroup_says_which_unit_rules_apply(
    scene: Scene, text: str, level: str, said: str
) -> None:
    scene.write("/proc/self/cgroup", text)
    assert_finds(scene.one(service.cgroup_check), level, said)


# The whole.


def test_every_check_has_something_to_say_of_a_bare_host(scene: Scene) -> None:
    areas = {finding.area for finding in examine(scene.case())}
    silent = {"ready", "nvml", "gpu"}
    assert len(areas) == len(CHECKS) - 2
    assert not areas & silent


def test_what_others_wrote_cannot_steer_the_terminal(scene: Scene) -> None:
    scene.answers(
        hello={"version": "\x1b[2J"},
        gpu_info={"gpus": [{"index": 0, "name": "\x1b[2J", "state": "unknown"}]},
        ready={"checks": {"x": {"ok": False, "detail": "\x1b[2J\n"}}},
    )
    for finding in examine(scene.case()):
        assert finding.found.isprintable(), finding


def test_the_last_line_counts() -> None:
    assert summary([Finding("a", OK, "")]) == "nothing is wrong: 1 check"
    findings = [Finding("a", FAIL, ""), Finding("a", WARN, ""), Finding("b", WARN, "")]
    assert summary(findings) == "1 failure and 2 warnings in 3 checks"


# What the host shows.


def test_who_listens_on_a_port_is_found_in_the_kernels_tables() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        (found,) = Host().listening(one.getsockname()[1])
    assert (found.address, found.pid) == ("127.0.0.1", os.getpid())
    assert "python" in found.command
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as six:
        (found,) = Host().listening(six.getsockname()[1])
    assert found.address == "::1"


def test_a_program_that_hangs_or_is_missing_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_room, "PROGRAM_S", 0.05)
    assert host_room.run(["sleep", "10"]).code is None
    assert host_room.run(["/nonexistent/program"]).errors.startswith(
        "/nonexistent/program: No such"
    )


def test_a_units_command_and_environment_are_read_as_systemctl_shows_them() -> None:
    unit = {
        "ExecStart": "{ path=/usr/bin/gpuorchd ; argv[]=/usr/bin/gpuorchd --env-file -/etc/x.env ; "
        "ignore_errors=no ; start_time=[n/a] }",
        "Environment": "A=1 'B=two words' C",
    }
    assert command_of(unit) == ["/usr/bin/gpuorchd", "--env-file", "-/etc/x.env"]
    assert environment_of(unit) == {"A": "1", "B": "two words"}
    assert command_of({}) == []


def test_the_daemons_program_says_what_it_would_be_configured_with(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("GPUORCH_MAX_LEASES=7\nSAFE_MODEL=1\n")
    path.chmod(0o640)
    program = [sys.executable, "-m", "gpuorchd", "--env-file", str(path)]
    config, fault, (warning,) = case_room._configuration(program, {})
    assert (config or {})["max_leases"] == 7
    assert fault == ""
    assert "did you mean SAFE_MODE?" in warning
    path.write_text("\nSAFE_MODE=x\n")
    config, fault, _ = case_room._configuration(program, {})
    assert config is None
    assert fault.startswith(f"SAFE_MODE ({path}:2) is 'x'")
    assert case_room._env_file(program) == str(path)
    assert case_room._env_file(["gpuorchd", f"--env-file=-{path}"]) == str(path)
