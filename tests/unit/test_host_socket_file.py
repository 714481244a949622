"""The socket file: who gets it, with which mode, and what is left behind."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuorchd.host.lock import hold_lock
from gpuorchd.host.socket_file import PATH_BYTES_MAX, SocketFile, claim_socket
from gpuorchd.host.start import StartError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def claimed(path: Path) -> Iterator[SocketFile]:
    held = claim_socket(path, 0o660, None)
    yield held
    held.release()


def leave_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(os.fspath(path))


def test_a_claimed_socket_accepts_connections(claimed: SocketFile) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(claimed.path))
        accepted, _ = claimed.listener.accept()
        accepted.close()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_file_has_the_mode_asked_for_whatever_the_umask(path: Path, mode: int) -> None:
    umask = os.umask(0o022)
    try:
        held = claim_socket(path, mode, None)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        held.release()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)


def test_the_file_is_never_looser_than_its_mode(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    chmod = os.chmod

    def look_first(target: Path, mode: int) -> None:
        seen.append(stat.S_IMODE(os.stat(target).st_mode))
        chmod(target, mode)

    monkeypatch.setattr(os, "chmod", look_first)
    claim_socket(path, 0o660, None).release()
    assert seen == [0o600]


def test_the_file_gets_the_group(path: Path) -> None:
    held = claim_socket(path, 0o660, os.getgid())
    assert path.stat().st_gid == os.getgid()
    held.release()


def test_a_group_that_cannot_be_given_is_named_and_nothing_is_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(StartError, match=f"cannot give {path} to group 7: Operation not permitted"):
        claim_socket(path, 0o660, 7)
    assert not path.exists()


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    held = claim_socket(tmp_path / "new" / "s", 0o660, None)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755
    held.release()


def test_a_stale_socket_is_taken_over(path: Path) -> None:
    leave_stale_socket(path)
    held = claim_socket(path, 0o660, None)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(path))
    held.release()
    assert not path.exists()


def test_a_socket_that_somebody_answers_on_is_refused_with_his_pid(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(path))
        other.listen()
        with pytest.raises(StartError, match=rf"another daemon \(pid {os.getpid()}\) answers"):
            claim_socket(path, 0o660, None)
        # It is still reachable: nothing was taken from it.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(path))


def test_a_socket_whose_backlog_is_full_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuorchd.host.socket_file.ANSWER_TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(os.fspath(path))
        other.listen(0)
        client.connect(os.fspath(path))
        with pytest.raises(StartError, match="another daemon"):
            claim_socket(path, 0o660, None)


def test_a_second_claim_is_refused_with_the_pid_of_the_first(claimed: SocketFile) -> None:
    with pytest.raises(StartError, match=rf"another daemon \(pid {os.getpid()}\) has .*lock"):
        claim_socket(claimed.path, 0o660, None)


def test_the_name_can_be_claimed_again_after_its_release(path: Path) -> None:
    claim_socket(path, 0o660, None).release()
    claim_socket(path, 0o660, None).release()


def test_a_refused_claim_gives_its_lock_back(path: Path) -> None:
    path.write_text("somebody's file")
    with pytest.raises(StartError):
        claim_socket(path, 0o660, None)
    path.unlink()
    claim_socket(path, 0o660, None).release()


def test_a_file_that_is_no_socket_is_refused_and_kept(path: Path) -> None:
    path.write_text("somebody's file")
    with pytest.raises(StartError, match="is not a socket"):
        claim_socket(path, 0o660, None)
    assert path.read_text() == "somebody's file"


def test_a_link_is_refused_and_its_target_kept(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    leave_stale_socket(target)
    path.symlink_to(target)
    with pytest.raises(StartError, match="is not a socket"):
        claim_socket(path, 0o660, None)
    assert target.exists()


def test_a_socket_of_another_type_is_refused_and_kept(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(os.fspath(path))
        with pytest.raises(StartError, match="cannot tell whether anybody answers"):
            claim_socket(path, 0o660, None)
        assert path.exists()


def test_a_path_that_does_not_fit_in_an_address_is_refused_with_both_lengths(
    tmp_path: Path,
) -> None:
    path = tmp_path / ("x" * 120)
    with pytest.raises(StartError, match=rf"{len(str(path))} bytes; at most {PATH_BYTES_MAX}"):
        claim_socket(path, 0o660, None)


def test_the_longest_path_that_fits_is_taken(tmp_path: Path) -> None:
    room = PATH_BYTES_MAX - len(os.fspath(tmp_path)) - 1
    if room < 1:
        pytest.fail(f"the folder for tests is too deep for a socket: {tmp_path}")
    claim_socket(tmp_path / ("x" * room), 0o660, None).release()


def test_a_release_leaves_a_file_that_is_no_longer_ours(claimed: SocketFile) -> None:
    claimed.path.unlink()
    leave_stale_socket(claimed.path)
    claimed.release()
    assert claimed.path.exists()


def test_a_second_release_does_nothing(claimed: SocketFile) -> None:
    claimed.release()
    leave_stale_socket(claimed.path)
    claimed.release()
    assert claimed.path.exists()


def test_a_lock_that_cannot_be_written_stops_the_start_and_is_given_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    lock = path.with_name("lock")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StartError, match=r"cannot write the lock file .*: No space left"):
            hold_lock(lock, path)
    hold_lock(lock, path).release()
