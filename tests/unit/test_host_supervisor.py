"""Which sockets are served: passed ones before own ones, and none beside the service manager's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuorchd.host.http_port import HttpPort, choose_http_port
from gpuorchd.host.inherited import Inherited
from gpuorchd.host.notify import Notifier
from gpuorchd.host.socket_file import PassedSocket
from gpuorchd.host.start import StartError
from gpuorchd.host.supervisor import Supervisor, meet_supervisor, served_socket


@dataclass
class Choice:
    socket: Path
    socket_mode: int = 0o660
    socket_group: int | None = None
    require_passed_socket: bool | None = None


@pytest.fixture
def choice(tmp_path: Path) -> Choice:
    return Choice(tmp_path / "own")


@pytest.fixture
def port() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


def manager(*, started_us: bool, listener: socket.socket | None = None) -> Supervisor:
    return Supervisor(Inherited(listener=listener), Notifier({}), started_us)


def test_a_passed_socket_is_served_and_its_file_is_left(tmp_path: Path, choice: Choice) -> None:
    path = tmp_path / "passed"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()
    # Whatever is required: it was passed.
    choice.require_passed_socket = False
    served = served_socket(manager(started_us=True, listener=listener), choice)
    assert isinstance(served, PassedSocket)
    assert served.path == path
    served.release()
    assert listener.fileno() == -1
    assert path.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["passed"], "no lock, no own file"


def test_an_abstract_passed_socket_has_a_name_to_show(choice: Choice) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0gpuorchd-{os.getpid()}")
    listener.listen()
    served = served_socket(manager(started_us=True, listener=listener), choice)
    assert str(served.path) == f"@gpuorchd-{os.getpid()}"
    served.release()


def test_started_by_the_service_manager_without_its_socket_is_refused(
    choice: Choice, tmp_path: Path
) -> None:
    with pytest.raises(StartError, match=r"without its Unix socket.* gpuorchd\.socket"):
        served_socket(manager(started_us=True), choice)
    assert not list(tmp_path.iterdir())


def test_started_by_a_person_binds_its_own(choice: Choice) -> None:
    served = served_socket(manager(started_us=False), choice)
    assert choice.socket.exists()
    served.release()
    assert not choice.socket.exists()


def test_the_setting_overrules_what_was_guessed(choice: Choice) -> None:
    choice.require_passed_socket = False
    served_socket(manager(started_us=True), choice).release()
    choice.require_passed_socket = True
    with pytest.raises(StartError, match="GPUORCH_REQUIRE_PASSED_SOCKET is true"):
        served_socket(manager(started_us=False), choice)


def test_who_was_started_by_the_service_manager_is_told_from_its_variables(
    tmp_path: Path,
) -> None:
    pid = str(os.getpid())
    assert not meet_supervisor({}).started_us
    assert not meet_supervisor({"SYSTEMD_EXEC_PID": str(os.getppid())}).started_us
    assert meet_supervisor({"SYSTEMD_EXEC_PID": pid}).started_us
    assert not meet_supervisor({"INVOCATION_ID": "0" * 32}).started_us
    notified = meet_supervisor({"NOTIFY_SOCKET": str(tmp_path / "n")})
    assert notified.started_us
    notified.notifier.close()


def test_what_could_not_be_used_is_gathered(choice: Choice) -> None:
    pid = str(os.getpid())
    met = meet_supervisor({"LISTEN_PID": pid, "LISTEN_FDS": "x", "NOTIFY_SOCKET": "y"})
    assert len(met.problems) == 2


def test_a_passed_port_wins_and_agrees_with_an_unset_one(port: socket.socket) -> None:
    chosen = choose_http_port(8014, is_set=False, passed=port, under_manager=True)
    assert chosen == HttpPort(port, port.getsockname()[1], None)
    number = port.getsockname()[1]
    assert choose_http_port(number, is_set=True, passed=port, under_manager=True).fault is None


def test_a_configured_port_that_differs_is_a_fault_with_both_and_the_file_to_write(
    port: socket.socket,
) -> None:
    number = port.getsockname()[1]
    chosen = choose_http_port(1, is_set=True, passed=port, under_manager=True)
    assert chosen.sock is port
    assert chosen.fault is not None
    for part in (
        "GPU_ORCHESTRATOR_PORT is 1,",
        f"127.0.0.1:{number}",
        "/etc/systemd/system/gpuorchd-metrics.socket.d/",
        "'ListenStream=127.0.0.1:1'",
    ):
        assert part in chosen.fault


def test_a_port_that_is_not_wanted_but_passed_names_how_to_have_none(port: socket.socket) -> None:
    chosen = choose_http_port(0, is_set=True, passed=port, under_manager=True)
    assert chosen.fault is not None
    assert "disable --now gpuorchd-metrics.socket" in chosen.fault


def test_beside_a_passed_unix_socket_no_port_is_bound() -> None:
    chosen = choose_http_port(8014, is_set=False, passed=None, under_manager=True)
    assert not chosen.wanted
    assert chosen.fault is not None
    assert "systemctl status gpuorchd-metrics.socket" in chosen.fault
    assert choose_http_port(0, is_set=True, passed=None, under_manager=True).fault is None


def test_without_a_service_manager_the_port_is_bound_here() -> None:
    assert choose_http_port(9, is_set=True, passed=None, under_manager=False) == HttpPort(None, 9)
