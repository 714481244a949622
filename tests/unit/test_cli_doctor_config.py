"""The doctor on what is configured: the env file, the port, driver, cards and MPS."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from libclient.cli.doctor import configured, devices
from libclient.cli.doctor.case import METRICS_UNIT, SERVICE
from libclient.cli.doctor.findings import FAIL, OK, WARN
from libclient.cli.doctor.host import Host, Listening
from libclient.ports import daemon_port
from tests.support.doctor_scene import Scene, assert_finds


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


# The env file and the port.


def test_the_env_file_is_judged_by_the_daemons_own_program(scene: Scene) -> None:
    scene.unit(SERVICE)
    path = scene.root / "etc/justnews/gpu_orchestrator.env"
    scene.more["config"] = {"http_port": 1}
    assert_finds(scene.one(configured.env_file_check), FAIL, "is not there", "make install")
    scene.write("/etc/justnews/gpu_orchestrator.env")
    path.chmod(0o640)
    assert_finds(scene.one(configured.env_file_check), OK, "is valid")
    said = "SAFE_MODE (/etc/justnews/gpu_orchestrator.env:12) is 'x'; allowed: true"
    scene.more |= {"config": None, "config_fault": said}
    assert_finds(scene.one(configured.env_file_check), FAIL, ":12) is 'x'", "+12 /etc/justnews/")
    path.chmod(0o644)
    _, mode = scene.found(configured.env_file_check)
    assert_finds(mode, WARN, "mode 0644", "chmod 0640")
    path.chmod(0o640)
    scene.more["config_fault"] = "/etc/x.env: cannot be opened: Permission denied"
    assert_finds(scene.one(configured.env_file_check), WARN, "may not read", "gpuorch doctor")
    scene.answers(ready={"checks": {"config": {"ok": True}}})
    assert_finds(scene.one(configured.env_file_check), OK, "in force as read")


@pytest.mark.parametrize(
    ("warning", "mend"),
    [
        ("/etc/x.env can be read by everyone (mode 0644); chmod 0640 /etc/x.env", "chmod 0640 /e"),
        ("SAFE_MODEL (/etc/x.env:3) is not a variable of this program", "+3 /etc/x.env"),
        ("GPUORCH_X is not a variable of this program", f"systemctl edit {SERVICE}"),
    ],
)
def test_a_warning_of_the_daemons_program_is_mended_where_it_stands(
    scene: Scene, warning: str, mend: str
) -> None:
    scene.unit(SERVICE)
    scene.write("/etc/x.env")
    scene.more |= {"env_file": "/etc/x.env", "config": {}, "config_warnings": (warning,)}
    assert_finds(scene.one(configured.env_file_check), WARN, warning.split(";")[0], mend)


def test_an_edit_that_the_daemon_has_not_read_is_found(scene: Scene) -> None:
    scene.write("/etc/justnews/gpu_orchestrator.env")
    path = scene.root / "etc/justnews/gpu_orchestrator.env"
    path.chmod(0o640)
    os.utime(path, (1_000, 1_000))
    scene.more["config"] = {}
    scene.unit(SERVICE, StateChangeTimestamp="@2000")
    assert scene.one(configured.env_file_check).level == OK
    os.utime(path, (3_000, 3_000))
    assert_finds(
        scene.one(configured.env_file_check), WARN, "after the daemon had read it", "reload"
    )


def test_a_port_that_another_process_has_is_named_with_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(configured, "HTTP_S", 0.05)
        monkeypatch.setattr(
            Host, "listening", lambda self, port: [Listening("127.0.0.1", 77, "python web.py")]
        )
        scene.more["config"] = {"http_port": port}
        finding = scene.one(configured.port_check)
        assert_finds(finding, FAIL, "in use by process 77 (python web.py)", "kill 77")
    assert_finds(scene.one(configured.port_check), WARN, "nobody listens", f"--http-port {port}")
    scene.more["fault"] = "no daemon"
    assert_finds(scene.one(configured.port_check), OK, "nobody listens")
    scene.more["config"] = {"http_port": 0}
    assert_finds(scene.one(configured.port_check), OK, "no side HTTP port is wanted")


def test_a_port_that_differs_from_the_socket_unit_comes_with_the_drop_in_to_write(
    scene: Scene,
) -> None:
    scene.unit(SERVICE)
    scene.unit(METRICS_UNIT, Listen="127.0.0.1:1 (Stream)")
    scene.more["config"] = {"http_port": daemon_port()}
    first, second = scene.found(configured.port_check)
    assert_finds(first, FAIL, f"GPU_ORCHESTRATOR_PORT is {daemon_port()}", f"{METRICS_UNIT}.d")
    assert f"ListenStream=127.0.0.1:{daemon_port()}" in "\n".join(first.mend)
    assert_finds(second, WARN, "nobody listens on 127.0.0.1:1", f"systemctl restart {SERVICE}")


# GPUs.


def card(scene: Scene) -> None:
    scene.write("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    scene.write("/sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n")


def test_a_host_without_a_card_is_well(scene: Scene) -> None:
    scene.write("/sys/bus/pci/devices/0000:00:02.0/vendor", "0x8086\n")
    scene.write("/sys/bus/pci/devices/0000:00:02.0/class", "0x030000\n")
    assert_finds(scene.one(devices.driver_check), OK, "no NVIDIA card")


def test_a_card_without_its_module_nodes_or_rights_is_found(scene: Scene) -> None:
    card(scene)
    assert_finds(scene.one(devices.driver_check), FAIL, "module is not loaded", "modprobe nvidia")
    scene.unit(devices.DRIVER_UNIT)
    assert_finds(
        scene.one(devices.driver_check), FAIL, "is not loaded", f"restart {devices.DRIVER_UNIT}"
    )
    scene.write(
        "/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module 580.1.2 x\n"
    )
    assert_finds(scene.one(devices.driver_check), FAIL, "/dev/nvidiactl, /dev/nvidia-uvm")
    for node in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        scene.write(f"/dev/{node}")
        (scene.root / "dev" / node).chmod(0o666)
    assert_finds(scene.one(devices.driver_check), OK, "driver 580.1.2, 1 card")
    (scene.root / "dev/nvidiactl").chmod(0o660)
    assert_finds(scene.one(devices.driver_check), WARN, "mode 0660", "usermod -aG")


@pytest.mark.parametrize(
    ("info", "level", "said", "mend"),
    [
        ({}, OK, "NVML answers, read 0.2 s ago", ""),
        (
            {"nvml_supported": False, "nvml_init_error": "Driver/library version mismatch"},
            FAIL,
            "version mismatch",
            "reboot",
        ),
        ({"nvml_supported": False, "message": "no driver"}, WARN, "no GPU: no driver", ""),
        (
            {"gpus": [{"index": 3, "name": "H100", "state": "unknown"}]},
            FAIL,
            "GPU 3 (H100) is unknown",
            "nvidia-smi -i 3",
        ),
        (
            {"gpus": [{"index": 3, "name": "H100", "state": "cordoned"}]},
            WARN,
            "is cordoned",
            "gpuorch uncordon 3",
        ),
    ],
)
def test_nvml_and_every_card_are_seen_as_the_daemon_sees_them(
    scene: Scene, info: dict[str, Any], level: str, said: str, mend: str
) -> None:
    scene.write("/proc/driver/nvidia/version", "NVRM version: 580.1.2\n")
    scene.answers(gpu_info=info)
    assert_finds(scene.one(devices.nvml_check), level, said, mend)


def test_under_safe_mode_no_card_is_missed(scene: Scene) -> None:
    scene.answers(health={"safe_mode": True}, gpu_info={"nvml_supported": False})
    assert_finds(scene.one(devices.nvml_check), OK, "SAFE_MODE is on")


@pytest.mark.parametrize(
    ("state", "enabled", "wanted", "level", "said"),
    [
        ("inactive", False, None, OK, "off, and not wanted"),
        ("active", True, True, OK, "the control process answers in /p"),
        ("active", False, None, FAIL, "/p was made anew"),
        ("failed", False, True, FAIL, "failed (exit-code)"),
        ("inactive", False, True, FAIL, "no control process runs"),
    ],
)
def test_mps_is_compared_with_what_is_wanted_and_what_runs(
    scene: Scene, state: str, enabled: bool, wanted: bool | None, level: str, said: str
) -> None:
    scene.unit(devices.MPS_UNIT, ActiveState=state, Result="exit-code")
    scene.answers(gpu_info={"mps": {"enabled": enabled, "pipe_dir": "/p"}})
    scene.more["config"] = {"enable_mps": wanted}
    assert_finds(scene.one(devices.mps_check), level, said)
