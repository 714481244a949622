"""A configuration that cannot be stops no daemon that was handed leases, and every other one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuorchd import __main__ as command
from gpuorchd.config_reading import ReadConfig
from gpuorchd.core.machine import Machine
from gpuorchd.core.state import Settings
from gpuorchd.host.inherited import Inherited
from gpuorchd.host.keeping import Keeper
from gpuorchd.host.notify import Notifier
from gpuorchd.host.settings_file import boot_id
from gpuorchd.host.start import EXIT_USAGE
from gpuorchd.host.supervisor import Supervisor
from gpuorchd.server.tokens import digest_of

TTL = "GPU_ORCHESTRATOR_LEASE_TTL"
Kept = Callable[[Path], None]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ReadConfig]:
    """What the daemon would have run on."""
    found: list[ReadConfig] = []

    def run(read: ReadConfig, supervisor: Supervisor) -> int:
        found.append(read)
        return 0

    monkeypatch.setattr("gpuorchd.daemon.run_daemon", run)
    return found


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inherited]:
    """One connection that the service manager has kept."""
    ours, theirs = socket.socketpair()
    inherited = Inherited(stored={"1": ours})
    supervisor = Supervisor(inherited, Notifier({}), True)
    monkeypatch.setattr(command, "meet_supervisor", lambda environ: supervisor)
    yield inherited
    ours.close()
    theirs.close()


def report(event: str, /, **fields: object) -> None:
    """Keep what is told to oneself."""


def keep(folder: Path, **config: str) -> None:
    """Leave a table as a daemon that ran on this configuration does."""
    keeper = Keeper(folder / "leases", boot_id(), report, digest_of)
    keeper.begin(Machine(Settings("e" * 16, keeps=True)).state, config)
    keeper.close()


def test_it_goes_on_with_the_last_good_one_and_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[ReadConfig],
    handed_over: Inherited,
) -> None:
    keep(tmp_path, lease_ttl_s="60", http_port="0", state_dir=str(tmp_path))
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}:/another")
    monkeypatch.setenv(TTL, "soon")
    assert command.main([]) == 0
    (read,) = started
    assert read.config.lease_ttl_s == 60
    assert read.refused is not None
    assert TTL in read.refused
    assert "soon" in read.refused
    # A reload reads again what a person has mended meanwhile.
    assert read.inputs is not None
    assert read.inputs.environ[TTL] == "soon"


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_folder_may_be_set_by_hand(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[ReadConfig],
    handed_over: Inherited,
    how: str,
) -> None:
    keep(tmp_path, lease_ttl_s="61", state_dir=str(tmp_path))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "nowhere"))
    monkeypatch.setenv(TTL, "soon")
    flags = [f"--runtime-dir={tmp_path}"] if how == "flag" else []
    if how == "variable":
        monkeypatch.setenv("GPUORCH_RUNTIME_DIR", str(tmp_path))
    assert command.main(flags) == 0
    assert [read.config.lease_ttl_s for read in started] == [61]


def test_an_env_file_that_cannot_be_read_is_no_end_either(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[ReadConfig],
    handed_over: Inherited,
) -> None:
    keep(tmp_path, lease_ttl_s="60", state_dir=str(tmp_path))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    missing = tmp_path / "no.env"
    assert command.main([f"--env-file={missing}"]) == 0
    (read,) = started
    assert read.refused is not None
    assert str(missing) in read.refused


def test_where_nothing_was_handed_over_it_ends_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[ReadConfig],
    handed_over: Inherited,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keep(tmp_path, lease_ttl_s="60", state_dir=str(tmp_path))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setenv(TTL, "soon")
    handed_over.close()
    assert command.main([]) == EXIT_USAGE
    assert TTL in capsys.readouterr().err
    assert started == []


def nothing(folder: Path) -> None:
    """Leave no table."""


def damaged(folder: Path) -> None:
    keep(folder, lease_ttl_s="60")
    os.truncate(folder / "leases", 1_000)


def outdated(folder: Path) -> None:
    """Leave the configuration of a daemon that knew other settings' values."""
    keep(folder, lease_ttl_s="whenever")


@pytest.mark.parametrize("leave", [nothing, damaged, outdated])
def test_without_a_last_good_one_it_ends_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[ReadConfig],
    handed_over: Inherited,
    leave: Kept,
) -> None:
    leave(tmp_path)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setenv(TTL, "soon")
    assert command.main([]) == EXIT_USAGE
    assert started == []


def test_a_check_of_the_configuration_is_of_the_one_that_is_given(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[ReadConfig],
    handed_over: Inherited,
) -> None:
    keep(tmp_path, lease_ttl_s="60", state_dir=str(tmp_path))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setenv(TTL, "soon")
    assert command.main(["--check-config"]) == EXIT_USAGE
    assert started == []
