"""The oneshot that loads the driver and makes its device nodes, on a root made up for it."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "systemd" / "gpuorchd-driver"
DEVICES = """\
Character devices:
  1 mem
195 nvidia
195 nvidiactl
238 nvidia-uvm

Block devices:
  8 nvidia-frontend
"""
PARAMS = "ModifyDeviceFiles: {modify}\nDeviceFileUID: 0\nDeviceFileGID: 44\nDeviceFileMode: 432\n"
INFORMATION = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 41\nDevice Minor: \t {minor}\n"
# Says what it was asked for, and does nothing: modules and nodes are for root.
RECORDER = '#!/bin/sh\necho "$(basename "$0") $*" >>"$RECORD"\n'


class Host:
    """A root with cards on its bus and a driver in its kernel, or not."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.record = folder / "record"
        self.tools = folder / "tools"
        self.tools.mkdir()
        for name in ("modprobe", "mknod", "chown"):
            (self.tools / name).write_text(RECORDER)
            (self.tools / name).chmod(0o755)
        for name in ("dev", "proc/driver/nvidia/gpus", "sys/bus/pci/devices"):
            (self.root / name).mkdir(parents=True)
        (self.root / "proc/devices").write_text("Character devices:\n  1 mem\n")

    def card(self, slot: str, *, vendor: str = "0x10de", kind: str = "0x030200") -> None:
        """Put a device on the bus."""
        device = self.root / "sys/bus/pci/devices" / slot
        device.mkdir()
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")

    def driver(self, *minors: int, modify: int = 1, devices: str = DEVICES) -> None:
        """Let the driver be loaded."""
        (self.root / "proc/devices").write_text(devices)
        (self.root / "proc/driver/nvidia/params").write_text(PARAMS.format(modify=modify))
        for minor in minors:
            folder = self.root / f"proc/driver/nvidia/gpus/0000:0{minor}:00.0"
            folder.mkdir()
            (folder / "information").write_text(INFORMATION.format(minor=minor))

    def run(self) -> tuple[int, list[str]]:
        """Run the script; return its exit code and what it did."""
        self.record.write_text("")
        done = subprocess.run(
            ["/bin/sh", str(SCRIPT), str(self.root)],
            env={"PATH": f"{self.tools}:/usr/bin:/bin", "RECORD": str(self.record)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.stderr
        self.said = done.stdout
        return done.returncode, self.record.read_text().splitlines()

    def nodes(self) -> list[str]:
        """Run the script and return the nodes that it makes, as `mknod` is asked for them."""
        code, did = self.run()
        assert code == 0, self.said
        made = [line.replace(f"{self.root}/dev/", "") for line in did if line.startswith("mknod")]
        return [line.removeprefix("mknod ") for line in made]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_host_without_such_a_card_is_left_alone(host: Host) -> None:
    host.card("0000:00:01.0", vendor="0x8086")
    # Its sound is no card.
    host.card("0000:00:02.0", kind="0x040300")
    assert host.run() == (0, [])


def test_both_modules_are_loaded_and_every_node_is_made(host: Host) -> None:
    host.card("0000:01:00.0")
    host.driver(0, 3)
    assert host.nodes() == [
        "-m 660 nvidiactl c 195 255",
        "-m 660 nvidia0 c 195 0",
        "-m 660 nvidia3 c 195 3",
        "-m 660 nvidia-uvm c 238 0",
        "-m 660 nvidia-uvm-tools c 238 1",
    ]
    did = host.record.read_text().splitlines()
    assert did[:2] == ["modprobe nvidia", "modprobe nvidia-uvm"]
    assert sum(line.startswith("chown 0:44 ") for line in did) == 5


def test_nodes_that_are_there_stay(host: Host) -> None:
    host.card("0000:01:00.0")
    host.driver(0)
    for name in ("nvidiactl", "nvidia0"):
        (host.root / "dev" / name).touch()
    assert [line.split()[2] for line in host.nodes()] == ["nvidia-uvm", "nvidia-uvm-tools"]


def test_the_name_that_older_drivers_have_is_known(host: Host) -> None:
    host.card("0000:01:00.0")
    host.driver(0, devices="Character devices:\n195 nvidia-frontend\n")
    assert [line.split()[2] for line in host.nodes()] == ["nvidiactl", "nvidia0"]


def test_a_driver_that_leaves_its_nodes_to_others_is_heeded(host: Host) -> None:
    host.card("0000:01:00.0")
    host.driver(0, modify=0)
    assert host.nodes() == []


def test_a_card_without_a_driver_is_a_failure_that_says_so(host: Host) -> None:
    host.card("0000:01:00.0")
    code, did = host.run()
    assert code == 1
    assert "its driver is not loaded" in host.said
    assert not any(line.startswith("mknod") for line in did)


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes are for root")
def test_the_nodes_are_what_the_kernel_knows_as_such(host: Host) -> None:
    host.card("0000:01:00.0")
    host.driver(0)
    for name in ("mknod", "chown"):
        (host.tools / name).unlink()
    assert host.run()[0] == 0
    found = (host.root / "dev" / "nvidia0").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o660
    assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (195, 0)
    assert found.st_gid == 44
