"""The table's file: the daemon's own, for nobody else, and never emptied before it is looked at."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gpuorchd.host.start import StartError
from gpuorchd.host.table import HEAD_BYTES, Damaged, Table

BOOT = "0f1e2d3c-0000-4000-8000-123456789abc"
HALF_BYTES = 16_384


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leases"


def opened(path: Path) -> Table:
    return Table(path, BOOT, HALF_BYTES)


def read(path: Path) -> None:
    table = opened(path)
    try:
        table.read()
    finally:
        table.close()


def test_a_file_of_something_else_is_damage_and_stays_as_it_is(path: Path) -> None:
    path.write_bytes(b"my thesis, the only copy" * 10)
    path.chmod(0o600)
    with pytest.raises(Damaged, match="240 bytes"):
        opened(path)
    assert path.read_bytes() == b"my thesis, the only copy" * 10
    path.write_bytes(b"x" * (HEAD_BYTES + 2 * HALF_BYTES))
    with pytest.raises(Damaged, match="does not begin"):
        read(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o700, 0o400])
def test_a_mode_that_is_not_0600_is_refused_and_named(path: Path, mode: int) -> None:
    path.touch()
    path.chmod(mode)
    with pytest.raises(StartError, match=f"{mode:04o}|Permission denied"):
        opened(path)


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "target").touch(mode=0o600)
    path.symlink_to(tmp_path / "target")
    with pytest.raises(StartError, match="cannot open the lease table"):
        opened(path)


def test_a_folder_or_a_pipe_is_refused(path: Path) -> None:
    os.mkfifo(path, 0o600)
    with pytest.raises(StartError, match="it is no file"):
        opened(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StartError, match="cannot open"):
        opened(path)


def test_the_owner_has_to_be_the_daemon(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch(mode=0o600)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(StartError, match=f"belongs to uid {path.stat().st_uid}"):
        opened(path)


def test_a_table_that_cannot_be_made_at_all_is_told_at_the_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StartError, match="No space left"):
        opened(path)


def test_reading_takes_no_memory(path: Path) -> None:
    # Where none is left, a first touch of the mapping would end the daemon at every start.
    table = opened(path)
    table.begin("0123456789abcdef", {("l", 1): [1]}, (1, 0, 0))
    table.close()
    os.truncate(path, HEAD_BYTES + HALF_BYTES)
    data = path.read_bytes()
    path.unlink()
    with path.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data[:HEAD_BYTES])
        file.truncate(HEAD_BYTES + 2 * HALF_BYTES)
    blocks = path.stat().st_blocks
    with pytest.raises(Damaged):
        read(path)
    assert path.stat().st_blocks == blocks
