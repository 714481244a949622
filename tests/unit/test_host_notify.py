"""What reaches the service manager, on real datagram sockets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuorchd.host.notify import FDS_MAX, STATUS_CHARS_MAX, Notifier


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "n"


@pytest.fixture
def manager(path: Path) -> Iterator[socket.socket]:
    with listening(os.fspath(path)) as sock:
        yield sock


@pytest.fixture
def notifier(path: Path, manager: socket.socket) -> Iterator[Notifier]:
    made = Notifier({"NOTIFY_SOCKET": os.fspath(path)})
    assert made.present
    yield made
    made.close()


def listening(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.bind(address)
    return sock


def test_each_word_goes_out_as_the_manager_reads_it(
    notifier: Notifier, manager: socket.socket
) -> None:
    for say, word in (
        (notifier.ready, b"READY=1"),
        (notifier.stopping, b"STOPPING=1"),
        (notifier.watchdog, b"WATCHDOG=1"),
    ):
        assert say()
        assert manager.recv(1_000) == word


def test_a_reload_carries_the_monotonic_time(notifier: Notifier, manager: socket.socket) -> None:
    before_us = time.monotonic_ns() // 1_000
    assert notifier.reloading()
    first, second = manager.recv(1_000).decode().split("\n")
    assert first == "RELOADING=1"
    name, value = second.split("=")
    assert name == "MONOTONIC_USEC"
    assert before_us <= int(value) <= time.monotonic_ns() // 1_000


def test_a_status_is_one_line_and_assigns_nothing_else(
    notifier: Notifier, manager: socket.socket
) -> None:
    assert notifier.status("2 GPUs\nMAINPID=1\r\n\u2028x")
    assert manager.recv(1_000).decode() == "STATUS=2 GPUs MAINPID=1 x"


def test_a_status_is_bounded_and_always_text(notifier: Notifier, manager: socket.socket) -> None:
    assert notifier.status("x" * 10_000)
    assert len(manager.recv(20_000)) == len("STATUS=") + STATUS_CHARS_MAX
    assert notifier.status("lone \udcff")
    assert manager.recv(1_000) == b"STATUS=lone ?"


def test_descriptors_travel_with_the_text_and_stay_the_senders(
    notifier: Notifier, manager: socket.socket
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert notifier.send("FDSTORE=1\nFDNAME=a", [theirs.fileno()])
        text, fds, _, _ = socket.recv_fds(manager, 1_000, 8)
        assert text == b"FDSTORE=1\nFDNAME=a"
        (fd,) = fds
        with socket.socket(fileno=fd) as received:
            ours.sendall(b"hello")
            assert received.recv(5) == b"hello"
        assert theirs.fileno() >= 0


def test_more_descriptors_than_one_message_takes_are_the_callers_mistake(
    notifier: Notifier,
) -> None:
    with pytest.raises(ValueError, match=f"{FDS_MAX + 1} descriptors .* at most {FDS_MAX}"):
        notifier.send("FDSTORE=1", [0] * (FDS_MAX + 1))


def test_as_many_descriptors_as_one_message_takes_go_out(
    notifier: Notifier, manager: socket.socket
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert notifier.send("X=1", [theirs.fileno()] * FDS_MAX)
        _, fds, _, _ = socket.recv_fds(manager, 1_000, FDS_MAX)
        for fd in fds:
            os.close(fd)
        assert len(fds) == FDS_MAX


def test_a_queue_that_is_full_is_said_and_never_waited_for(
    notifier: Notifier, manager: socket.socket
) -> None:
    sent = 0
    while notifier.watchdog():
        sent += 1
        assert sent < 100_000
    assert manager.recv(100) == b"WATCHDOG=1"
    assert notifier.watchdog()


def test_a_manager_that_is_gone_is_said_and_one_that_is_back_is_reached(
    notifier: Notifier, manager: socket.socket, path: Path
) -> None:
    manager.close()
    assert not notifier.ready()
    path.unlink()
    assert not notifier.ready()
    with listening(os.fspath(path)) as back:
        assert notifier.ready()
        assert back.recv(100) == b"READY=1"


def test_a_descriptor_that_is_closed_is_said(notifier: Notifier, manager: socket.socket) -> None:
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    ours.close()
    theirs.close()
    assert not notifier.send("FDSTORE=1", [number])


def test_a_name_after_an_at_is_an_abstract_socket() -> None:
    name = f"gpuorchd-test-{os.getpid()}"
    with listening(f"\0{name}") as manager:
        notifier = Notifier({"NOTIFY_SOCKET": f"@{name}"})
        assert notifier.ready()
        assert manager.recv(100) == b"READY=1"
        notifier.close()


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({})
    assert not notifier.present
    assert not notifier.problems
    assert notifier.watchdog_period_s is None
    assert not notifier.ready()
    assert not notifier.send("FDSTORE=1", [0])
    notifier.close()


def test_after_close_nothing_goes_out(notifier: Notifier, manager: socket.socket) -> None:
    notifier.close()
    assert not notifier.present
    assert not notifier.ready()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(100)


@pytest.mark.parametrize("value", ["relative", "@", "/", "vsock:2:1234", "/x\0y", "/" + "x" * 120])
def test_an_address_that_cannot_be_is_named_and_not_used(value: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": value})
    assert not notifier.present
    (problem,) = notifier.problems
    assert "NOTIFY_SOCKET" in problem
    assert not notifier.ready()


def test_the_variables_are_gone_for_child_processes(path: Path, manager: socket.socket) -> None:
    environ = {
        "NOTIFY_SOCKET": os.fspath(path),
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": str(os.getpid()),
        "PATH": "/bin",
    }
    notifier = Notifier(environ)
    notifier.close()
    assert environ == {"PATH": "/bin"}
    assert notifier.watchdog_period_s == 3.0


def test_a_watchdog_without_a_pid_is_ours_and_another_process_s_is_not() -> None:
    assert Notifier({"WATCHDOG_USEC": "500000"}).watchdog_period_s == 0.5
    other = {"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid() + 1)}
    assert Notifier(other).watchdog_period_s is None


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1.5", "9" * 40, "\u0663"])
def test_a_watchdog_s_time_that_cannot_be_is_named_and_not_used(value: str) -> None:
    notifier = Notifier({"WATCHDOG_USEC": value})
    assert notifier.watchdog_period_s is None
    (problem,) = notifier.problems
    assert "WATCHDOG_USEC" in problem
