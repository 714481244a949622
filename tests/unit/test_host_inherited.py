"""What is taken of the descriptors that a service manager passes, and what is closed."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gpuorchd.host.inherited import (
    LISTENER_NAME,
    METRICS_NAME,
    VARIABLES,
    Inherited,
    take_inherited,
)

# Far from what the test run itself has open, and still below the usual limit.
FIRST = 700


class Passing:
    """Descriptors that are passed from `FIRST` on, as a service manager does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = contextlib.ExitStack()
        self.numbers: list[int] = []
        self.names: list[str] = []
        self.taken: list[Inherited] = []

    def add(self, name: str, fd: int) -> int:
        """Pass a duplicate of `fd` under a name; return its number."""
        number = os.dup2(fd, FIRST + len(self.numbers), inheritable=True)
        self.numbers.append(number)
        self.names.append(name)
        return number

    def sock(
        self,
        name: str,
        family: int = socket.AF_UNIX,
        kind: int = socket.SOCK_STREAM,
        *,
        listen: bool = True,
    ) -> int:
        """Pass a bound socket."""
        sock = self._own.enter_context(socket.socket(family, kind))
        place = os.fspath(self._folder / f"s{len(self.numbers)}")
        sock.bind(place if family == socket.AF_UNIX else ("127.0.0.1", 0))
        if listen:
            sock.listen()
        return self.add(name, sock.fileno())

    def connection(self, name: str) -> socket.socket:
        """Pass one end of a connection; return the other, which `close` closes."""
        ours, theirs = socket.socketpair()
        self.add(name, theirs.fileno())
        theirs.close()
        return self._own.enter_context(ours)

    def take(self, **changed: str) -> Inherited:
        """Take over what was passed, with variables of another value where given."""
        environ = {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(self.numbers)),
            "LISTEN_FDNAMES": ":".join(self.names),
            **changed,
        }
        taken = take_inherited(environ, FIRST)
        self.taken.append(taken)
        assert not environ, "the variables are still there"
        return taken

    def close(self) -> None:
        """Close everything, taken or not."""
        for taken in self.taken:
            taken.close()
        for number in self.numbers:
            with contextlib.suppress(OSError):
                os.close(number)
        self._own.close()


@pytest.fixture
def passing(tmp_path: Path) -> Iterator[Passing]:
    made = Passing(tmp_path)
    yield made
    made.close()


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def all_closed(fds: Sequence[int]) -> bool:
    return not any(is_open(fd) for fd in fds)


def test_sockets_are_matched_by_name_whatever_their_place(passing: Passing) -> None:
    peer = passing.connection("1z")
    metrics = passing.sock(METRICS_NAME, socket.AF_INET)
    listener = passing.sock(LISTENER_NAME)
    taken = passing.take()
    assert not taken.problems
    assert taken.listener is not None
    assert taken.listener.fileno() == listener
    assert taken.metrics is not None
    assert taken.metrics.fileno() == metrics
    assert list(taken.stored) == ["1z"]
    assert taken.passed == 3
    peer.sendall(b"hello")
    assert taken.stored["1z"].recv(5) == b"hello"


def test_child_processes_inherit_none_of_them(passing: Passing) -> None:
    passing.sock(LISTENER_NAME)
    passing.connection("a")
    passing.take()
    assert not any(os.get_inheritable(number) for number in passing.numbers)


def test_a_connection_whose_peer_is_dead_is_still_a_stored_one(passing: Passing) -> None:
    passing.connection("a").close()
    taken = passing.take()
    assert list(taken.stored) == ["a"]
    assert taken.stored["a"].recv(1) == b""


def test_without_the_variables_nothing_is_touched(passing: Passing) -> None:
    number = passing.sock(LISTENER_NAME)
    environ = {"PATH": "/bin"}
    assert take_inherited(environ, FIRST) == Inherited()
    assert environ == {"PATH": "/bin"}
    assert is_open(number)


@pytest.mark.parametrize("pid", ["1", "", "x", str(2**70)])
def test_variables_for_another_process_are_removed_and_nothing_is_touched(
    passing: Passing, pid: str
) -> None:
    number = passing.sock(LISTENER_NAME)
    assert passing.take(LISTEN_PID=pid) == Inherited()
    assert is_open(number)


def test_a_variable_of_a_later_service_manager_is_removed_too(passing: Passing) -> None:
    passing.sock(LISTENER_NAME)
    assert passing.take(LISTEN_PIDFDID="123").listener is not None
    assert "LISTEN_PIDFDID" in VARIABLES


@pytest.mark.parametrize("count", ["-1", "three", "1.0", "9" * 30, "\u0663", "999999999"])
def test_a_count_that_cannot_be_is_named_and_nothing_is_taken(passing: Passing, count: str) -> None:
    passing.sock(LISTENER_NAME)
    taken = passing.take(LISTEN_FDS=count)
    assert taken.listener is None
    assert any("LISTEN_FDS" in problem for problem in taken.problems)


def test_a_count_just_over_the_limit_of_open_files_is_refused(passing: Passing) -> None:
    bound = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FIRST
    taken = passing.take(LISTEN_FDS=str(bound + 1))
    assert any(f"from 0 to {bound}" in problem for problem in taken.problems)


@pytest.mark.parametrize("names", ["", LISTENER_NAME, f"{LISTENER_NAME}:a:b"])
def test_names_that_do_not_fit_the_count_close_all(passing: Passing, names: str) -> None:
    passing.sock(LISTENER_NAME)
    passing.connection("a")
    taken = passing.take(LISTEN_FDNAMES=names)
    assert taken.listener is None
    assert not taken.stored
    assert any("LISTEN_FDNAMES" in problem for problem in taken.problems)
    assert all_closed(passing.numbers)


@pytest.mark.parametrize(
    "name",
    [
        "gpuorchd.sock",
        "gpuorchd.socket2",
        "A",
        "123456789",
        "a-b",
        "",
        "\u0663",
        "stored fd",
        "a\n",
    ],
)
def test_a_name_that_nobody_gave_is_closed_and_reported(passing: Passing, name: str) -> None:
    passing.sock(LISTENER_NAME)
    passing.connection(name)
    taken = passing.take()
    assert taken.listener is not None
    assert not taken.stored
    (problem,) = taken.problems
    assert repr(name) in problem
    assert not is_open(passing.numbers[1])


def test_a_name_with_the_wrong_type_is_closed_and_reported(passing: Passing) -> None:
    unix, inet = socket.AF_UNIX, socket.AF_INET
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    passing.sock(LISTENER_NAME, inet)
    passing.sock(LISTENER_NAME, unix, listen=False)
    passing.sock(LISTENER_NAME, unix, datagram, listen=False)
    passing.sock(LISTENER_NAME, unix, socket.SOCK_SEQPACKET)
    passing.connection(LISTENER_NAME)
    passing.sock(METRICS_NAME, unix)
    passing.sock(METRICS_NAME, inet, stream, listen=False)
    passing.sock(METRICS_NAME, inet, datagram, listen=False)
    passing.sock("a1", unix)
    passing.sock("a2", unix, listen=False)
    passing.sock("a3", inet)
    passing.sock("a4", unix, datagram, listen=False)
    taken = passing.take()
    assert (taken.listener, taken.metrics, taken.stored) == (None, None, {})
    assert len(taken.problems) == len(passing.numbers)
    assert all_closed(passing.numbers)


def test_what_is_no_socket_is_closed_and_reported(passing: Passing) -> None:
    pipe = os.pipe()
    for name in (LISTENER_NAME, METRICS_NAME, "a"):
        passing.add(name, pipe[0])
    for fd in pipe:
        os.close(fd)
    taken = passing.take()
    assert [("is no socket" in problem) for problem in taken.problems] == [True] * 3
    assert all_closed(passing.numbers)


def test_a_descriptor_that_is_not_there_is_reported_and_the_rest_taken(passing: Passing) -> None:
    passing.connection("a")
    passing.sock(LISTENER_NAME)
    os.close(passing.numbers[0])
    taken = passing.take()
    assert taken.listener is not None
    (problem,) = taken.problems
    assert "is not there" in problem


def test_a_second_one_of_a_name_is_closed_and_reported(passing: Passing) -> None:
    passing.sock(LISTENER_NAME)
    passing.sock(LISTENER_NAME)
    passing.sock(METRICS_NAME, socket.AF_INET)
    passing.sock(METRICS_NAME, socket.AF_INET)
    passing.connection("a")
    passing.connection("a")
    taken = passing.take()
    assert len(taken.problems) == 3
    assert all_closed(passing.numbers[1::2])
    assert all(is_open(number) for number in passing.numbers[::2])


def test_stored_connections_are_taken_by_the_hundred(passing: Passing) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Their other ends lie below `FIRST`.
    many = min(300, soft - FIRST)
    for number in range(many):
        passing.connection(f"{number:x}")
    taken = passing.take()
    assert len(taken.stored) == many
    assert not taken.problems
