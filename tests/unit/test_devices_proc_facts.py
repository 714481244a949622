"""What is read of a process from /proc: start, parents, unit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gpuorchd.devices import proc_facts

ME = os.getpid()


@pytest.fixture
def grandchild() -> Iterator[tuple[int, int]]:
    """A child and its child, as pids; both end with the child's standard input."""
    source = (
        "import subprocess, sys\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'])\n"
        "print(inner.pid, flush=True)\n"
        "inner.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        yield child.pid, int(child.stdout.readline())


def stat_line(comm: str, ppid: int = 7, start_ticks: int = 123_456) -> bytes:
    fields = ["S", str(ppid), *(["0"] * 17), str(start_ticks), *(["0"] * 30)]
    return f"42 ({comm}) {' '.join(fields)}\n".encode()


@pytest.mark.parametrize("comm", ["python", "a b", "x) S 1 2 (y", "((", ") ) )", ""])
def test_a_name_with_parentheses_and_spaces_moves_no_field(comm: str) -> None:
    facts = proc_facts.parse_stat(stat_line(comm))
    assert facts == proc_facts.StatFacts(comm, "S", 7, 123_456)


@pytest.mark.parametrize("text", [b"", b"42 (python) S 1", b"42 python S 1 2", b"\xff" * 100])
def test_a_text_that_is_no_stat_gives_nothing(text: bytes) -> None:
    assert proc_facts.parse_stat(text) is None


def test_a_process_is_read_as_the_kernel_shows_it() -> None:
    facts = proc_facts.read_stat(ME)
    assert facts is not None
    assert facts.ppid == os.getppid()
    assert facts.start_ticks > 0


def test_a_process_that_is_gone_gives_nothing() -> None:
    with subprocess.Popen(["true"]) as child:
        pid = child.pid
    assert proc_facts.read_stat(pid) is None
    assert proc_facts.read_unit(pid) is None
    assert proc_facts.read_uid(pid) is None
    assert proc_facts.Family().ancestors(pid) == []


def test_ancestors_are_named_nearest_first_and_without_pid_1(grandchild: tuple[int, int]) -> None:
    child, inner = grandchild
    chain = proc_facts.Family().ancestors(inner)
    assert [pid for pid, _ in chain[:2]] == [child, ME]
    assert all(pid > 1 and ticks > 0 for pid, ticks in chain)
    own = proc_facts.read_stat(ME)
    assert own is not None
    assert chain[1] == (ME, own.start_ticks)


def test_a_number_that_was_given_anew_is_no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {
        30: proc_facts.StatFacts("child", "S", 20, 500),
        20: proc_facts.StatFacts("stranger", "S", 10, 900),
        10: proc_facts.StatFacts("shell", "S", 1, 1),
    }
    monkeypatch.setattr(proc_facts, "read_stat", stats.get)
    assert proc_facts.Family().ancestors(30) == []


def test_a_chain_of_parents_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_stat(pid: int) -> proc_facts.StatFacts:
        return proc_facts.StatFacts("loop", "S", 2 if pid == 3 else 3, 5)

    monkeypatch.setattr(proc_facts, "read_stat", read_stat)
    assert len(proc_facts.Family().ancestors(2)) == proc_facts.ANCESTORS_MAX


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/scout.service\n", "scout.service"),
        ("0::/system.slice/scout.service/worker/deep.service\n", "scout.service"),
        ("0::/justnews.slice/justnews-agents.slice/justnews@scout.service\n",
         "justnews@scout.service"),
        # Whoever owns user@1000.service can make any name below it.
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/scout.service\n",
         "user@1000.service"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        ("0::/system.slice/docker-4fd1.scope\n", "docker-4fd1.scope"),
        # "memory" is a controller: systemd escapes the unit of that name.
        ("0::/system.slice/_memory.service\n", "memory.service"),
        ("0::/init.scope\n", "init.scope"),
        ("0::/\n", None),
        ("0::/system.slice\n", None),
        ("0::/docker/4fd1/scout.service\n", None),
        ("0::/../../system.slice/scout.service\n", None),
        ("", None),
        ("nonsense", None),
        ("9:name=systemd:/system.slice/a.service\n4:memory:/box\n0::/system.slice/b.service\n",
         "a.service"),
        ("4:memory:/system.slice/a.service\n0::/\n", None),
        # A colon in a name belongs to the path.
        ("0::/system.slice/a:b.service\n", "a:b.service"),
    ],
)  # fmt: skip
def test_the_unit_is_the_first_component_below_the_slices(cgroup: str, unit: str | None) -> None:
    assert proc_facts.parse_unit(cgroup) == unit


@pytest.mark.parametrize(
    ("unit", "service"),
    [
        ("scout.service", "scout.service"),
        ("justnews@scout.service", "justnews@scout.service"),
        ("user@1000.service", None),
        ("session-3.scope", None),
        (None, None),
    ],
)
def test_only_a_system_service_can_be_an_agents_own(unit: str | None, service: str | None) -> None:
    assert proc_facts.service_of(unit) == service


def test_the_real_uid_is_read() -> None:
    assert proc_facts.read_uid(ME) == os.getuid()
