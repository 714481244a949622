"""User names as uids: no name that anybody can write raises, and a look-up keeps nobody waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gpuorchd.host import users
from gpuorchd.host.users import UserNames, resolve_users


def test_what_is_no_name_is_nobody() -> None:
    names = ["root", "no such user", "", "a\0b", "\0", "x" * 60_000, "\ud800", "root\n"]
    assert resolve_users(names) == {"root": 0}


async def test_names_are_looked_up_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(names: tuple[str, ...]) -> dict[str, int]:
        asked.set()
        assert answer.wait(10)
        return dict.fromkeys(names, 7)

    monkeypatch.setattr(users, "resolve_users", slow)
    loop = asyncio.get_running_loop()
    looking = asyncio.create_task(UserNames(loop).resolve(["somebody"]))
    await loop.run_in_executor(None, asked.wait, 10)
    assert not looking.done()
    answer.set()
    assert await looking == {"somebody": 7}


async def test_a_look_up_that_nobody_waits_for_any_more_comes_to_nothing() -> None:
    looking = asyncio.create_task(UserNames(asyncio.get_running_loop()).resolve(["root"]))
    await asyncio.sleep(0)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    for thread in threading.enumerate():
        if thread.name == "users":
            thread.join(10)
