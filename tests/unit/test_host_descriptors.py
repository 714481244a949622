"""The descriptor store: counted here, in order, one barrier a turn, nobody waits in vain."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterator

import pytest

from gpuorchd.host import descriptors
from gpuorchd.host.descriptors import NAMES_BYTES_MAX, DescriptorStore, name_of, number_of

NOT_TAKEN = "the service manager does not take descriptors"
DEADLINE_S = 10.0


class Init:
    """A service manager that does what it is told to; `barrier` lets the oldest barrier go."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.takes = True
        # What it does not take although it takes anything else.
        self.refuses = ""
        self.barriers: list[int] = []

    def send(self, text: str, fds: tuple[int, ...] = ()) -> bool:
        if not self.takes or (self.refuses and text.startswith(self.refuses)):
            return False
        self.said.append(text.replace("\n", " "))
        if text == "BARRIER=1":
            self.barriers.append(os.dup(fds[0]))
        else:
            assert len(fds) == text.startswith("FDSTORE=1")
        return True

    def barrier(self) -> None:
        os.close(self.barriers.pop(0))

    def heard(self) -> list[str]:
        said, self.said = self.said, []
        return said

    def close(self) -> None:
        for fd in self.barriers:
            os.close(fd)


class Asked:
    """Who waits for a connection to be stored, and what they were told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str | None]] = []
        self._news = asyncio.Event()

    def of(self, number: int) -> descriptors.Then:
        def then(reason: str | None) -> None:
            self.told.append((number, reason))
            self._news.set()

        return then

    async def until(self, count: int) -> list[tuple[int, str | None]]:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.told) < count:
                self._news.clear()
                await self._news.wait()
        return self.told


@pytest.fixture
def manager() -> Iterator[Init]:
    found = Init()
    yield found
    found.close()


@pytest.fixture
def fd() -> Iterator[int]:
    with socket.socket(socket.AF_UNIX) as sock:
        yield sock.fileno()


def made(manager: Init, bound: int = 100, stored: tuple[int, ...] = ()) -> DescriptorStore:
    return DescriptorStore(manager, asyncio.get_running_loop(), bound, stored)


async def a_turn() -> None:
    """Let what is due in the loop's next turn happen."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def until_heard(manager: Init, text: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while text not in manager.said:
            await asyncio.sleep(0.001)


async def test_all_of_a_turn_share_one_barrier_and_are_told_when_it_is_back(
    manager: Init, fd: int
) -> None:
    store, asked = made(manager), Asked()
    for number in (1, 40):
        store.keep(number, fd, asked.of(number))
    assert manager.heard() == []
    await a_turn()
    assert manager.heard() == ["FDSTORE=1 FDNAME=1", "FDSTORE=1 FDNAME=14", "BARRIER=1"]
    # In the store is who was told so, and nobody is before the barrier is back.
    assert asked.told == []
    manager.barrier()
    assert await asked.until(2) == [(1, None), (40, None)]
    store.close()


async def test_barriers_of_different_turns_come_back_apart(manager: Init, fd: int) -> None:
    store, asked = made(manager), Asked()
    store.keep(1, fd, asked.of(1))
    await a_turn()
    store.keep(2, fd, asked.of(2))
    await a_turn()
    assert len(manager.barriers) == 2
    manager.barrier()
    assert await asked.until(1) == [(1, None)]
    manager.barrier()
    assert await asked.until(2) == [(1, None), (2, None)]
    store.close()


async def test_the_bound_counts_those_from_before_and_those_on_their_way(
    manager: Init, fd: int
) -> None:
    store, asked = made(manager, bound=3, stored=(7, 8)), Asked()
    assert store.full() is None
    store.keep(9, fd, asked.of(9))
    assert store.full() == "at most 3 connections in the descriptor store"
    store.drop(7)
    assert store.full() is None
    assert store.count == 2
    store.close()


async def test_the_names_together_stay_within_one_environment_variable(manager: Init) -> None:
    # Names of eight bytes, each with a separator.
    first = 36**7
    count = -(-NAMES_BYTES_MAX // 9)
    store = made(manager, bound=10**6, stored=tuple(range(first, first + count)))
    assert store.full() == f"at most {NAMES_BYTES_MAX} bytes of names in the descriptor store"
    store.drop(first)
    assert store.full() is None
    store.close()


async def test_who_leaves_on_the_way_is_taken_out_and_told_nothing(manager: Init, fd: int) -> None:
    store, asked = made(manager), Asked()
    store.keep(1, fd, asked.of(1))
    store.keep(2, fd, asked.of(2))
    store.drop(1)
    await a_turn()
    # The first was never sent; to take it out does no harm.
    assert manager.heard() == ["FDSTOREREMOVE=1 FDNAME=1", "FDSTORE=1 FDNAME=2", "BARRIER=1"]
    store.keep(3, fd, asked.of(3))
    await a_turn()
    store.drop(3)
    assert manager.heard()[-1] == "FDSTOREREMOVE=1 FDNAME=3"
    manager.barrier()
    manager.barrier()
    assert await asked.until(1) == [(2, None)]
    await a_turn()
    assert asked.told == [(2, None)]
    assert store.count == 1
    store.close()


async def test_who_is_not_in_it_is_not_taken_out(manager: Init) -> None:
    store = made(manager, stored=(1,))
    store.drop(1)
    store.drop(1)
    store.drop(2)
    assert manager.heard() == ["FDSTOREREMOVE=1 FDNAME=1"]
    store.close()


@pytest.mark.parametrize("refuses", ["FDSTORE=1", "BARRIER"])
async def test_a_manager_that_takes_nothing_costs_a_refusal(
    manager: Init, fd: int, refuses: str
) -> None:
    store, asked = made(manager), Asked()
    manager.refuses = refuses
    store.keep(1, fd, asked.of(1))
    assert await asked.until(1) == [(1, NOT_TAKEN)]
    assert store.count == 0
    # What may have arrived is taken out again.
    assert manager.heard()[-1] == "FDSTOREREMOVE=1 FDNAME=1"
    store.close()


async def test_a_manager_that_does_not_answer_is_not_waited_for(
    manager: Init, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "BARRIER_S", 0.02)
    store, asked = made(manager), Asked()
    store.keep(1, fd, asked.of(1))
    assert await asked.until(1) == [(1, NOT_TAKEN)]
    assert store.count == 0
    # Its late answer says nothing any more.
    manager.barrier()
    await a_turn()
    assert asked.told == [(1, NOT_TAKEN)]
    store.close()


async def test_removals_go_before_anything_new(manager: Init, fd: int) -> None:
    store, asked = made(manager, bound=2, stored=(1, 2)), Asked()
    manager.takes = False
    store.drop(1)
    store.drop(2)
    # There would be room by the count; but the manager still has them.
    assert store.count == 0
    assert store.full() == (
        "the service manager takes nothing into the descriptor store at the moment"
    )
    # Asked for all the same, in the turn in which the removal failed.
    store.keep(3, fd, asked.of(3))
    manager.takes = True
    await until_heard(manager, "BARRIER=1")
    assert manager.heard() == [
        "FDSTOREREMOVE=1 FDNAME=1",
        "FDSTOREREMOVE=1 FDNAME=2",
        "FDSTORE=1 FDNAME=3",
        "BARRIER=1",
    ]
    assert store.full() is None
    store.close()


async def test_without_a_descriptor_for_the_barrier_all_are_refused(
    manager: Init, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pipe(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    store, asked = made(manager), Asked()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pipe2", no_pipe)
        store.keep(1, fd, asked.of(1))
        store.keep(2, fd, asked.of(2))
        reason = "no barrier can be made: Too many open files"
        assert await asked.until(2) == [(1, reason), (2, reason)]
    assert store.count == 0
    store.keep(3, fd, asked.of(3))
    await until_heard(manager, "BARRIER=1")
    manager.barrier()
    assert (await asked.until(3))[2] == (3, None)
    store.close()


async def test_closing_leaves_no_pipe_and_calls_nobody(manager: Init, fd: int) -> None:
    def pipes() -> int:
        links = []
        for name in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{name}"))
            except FileNotFoundError:
                continue
        return sum(link.startswith("pipe:") for link in links)

    before = pipes()
    store, asked = made(manager), Asked()
    for number in range(1, 4):
        store.keep(number, fd, asked.of(number))
        await a_turn()
    store.keep(4, fd, asked.of(4))
    # One end here, and one that the manager has.
    assert pipes() == before + 2 * 3
    store.close()
    assert pipes() == before + 3
    await a_turn()
    assert asked.told == []
    assert not any("REMOVE" in said for said in manager.heard())


@pytest.mark.parametrize("number", [0, 1, 35, 36, 36**8 - 1])
def test_a_name_is_read_back_and_fits(number: int) -> None:
    assert number_of(name_of(number)) == number
    assert len(name_of(number)) <= 8
