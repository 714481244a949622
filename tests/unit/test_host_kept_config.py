"""What a daemon ran on is read by the next; and what lies in memory is told from a disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuorchd.core.machine import Machine
from gpuorchd.core.state import Settings
from gpuorchd.host import keeping
from gpuorchd.host.keeping import Keeper, kept_config, lies_in_memory
from gpuorchd.host.table import Table
from gpuorchd.server.tokens import digest_of

BOOT = "0f1e2d3c-0000-4000-8000-123456789abc"
EPOCH = "0123456789abcdef"
CONFIG = {"lease_ttl_s": "60"}


def report(event: str, /, **fields: object) -> None:
    raise AssertionError(f"{event} was reported")


def unusable(path: Path) -> None:
    """Leave a whole table with a row that no daemon can have written."""
    found = Table(path, BOOT)
    found.begin(EPOCH, {("l", 1): ["no such lease"]}, (1, 0, 0))
    found.close()


MOUNTS = """\
22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /run rw,nosuid shared:2 - tmpfs tmpfs rw,mode=755
24 23 0:22 / /run/disk\\040one rw - xfs /dev/sdb rw
25 22 0:23 / /dev/shm rw - tmpfs tmpfs rw
26 22 0:24 / /var/ram rw master:1 propagate_from:2 - ramfs none rw
27 22 0:25 / /var/ram rw - ext4 /dev/sdc rw
"""


@pytest.mark.parametrize(
    ("path", "memory"),
    [
        ("/run/gpuorchd/leases", True),
        ("/run/disk one/leases", False),
        ("/run/disk onetwo/leases", True),
        ("/running/leases", False),
        ("/var/lib/leases", False),
        ("/dev/shm/x/leases", True),
        # What was mounted last lies on top.
        ("/var/ram/leases", False),
    ],
)
def test_what_lies_in_memory_is_told_from_what_lies_on_a_disk(
    path: str, memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(keeping, "_MOUNTS", mounts)
    monkeypatch.setattr(os.path, "realpath", os.fspath)
    assert lies_in_memory(Path(path)) is memory


def test_the_configuration_that_a_daemon_ran_on_is_read_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "boot_id", lambda: BOOT)
    assert kept_config(str(tmp_path)) == {}
    keeper = Keeper(tmp_path / "leases", BOOT, report, digest_of)
    keeper.begin(Machine(Settings(EPOCH, keeps=True)).state, CONFIG)
    assert kept_config(str(tmp_path)) == CONFIG
    # It was only looked at.
    found = keeper.read()
    assert found is not None
    assert found.config == CONFIG
    keeper.close()
    assert kept_config("") == {}
    assert kept_config(str(tmp_path / "nowhere")) == {}


@pytest.mark.parametrize("break_it", [unusable, lambda path: path.write_bytes(b"x" * 100)])
def test_where_no_configuration_can_be_read_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(keeping, "boot_id", lambda: BOOT)
    path = tmp_path / "leases"
    break_it(path)
    path.chmod(0o600)
    before = path.read_bytes()
    assert kept_config(str(tmp_path)) == {}
    # Setting it aside is for the daemon that goes on.
    assert path.read_bytes() == before
