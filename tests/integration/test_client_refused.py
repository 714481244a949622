"""A refusal that is the caller's doing is warned of at the caller's own line."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import libclient
from libclient import aio
from libclient.errors import RequestRefused
from tests.support.proxy import FakeDaemon, Served


def refuses(conn: Served) -> None:
    while True:
        conn.refuse(conn.request(), "bad_request")


def lease(path: str) -> None:
    libclient.lease("a", socket=path)


def clients_lease(path: str) -> None:
    with libclient.connect(path) as client:
        client.lease("a")


def awaited(path: str) -> None:
    async def ask() -> None:
        await aio.lease("a", socket=path)

    asyncio.run(ask())


def entered(path: str) -> None:
    async def ask() -> None:
        async with aio.lease("a", socket=path):
            pass

    asyncio.run(ask())


def clients_entered(path: str) -> None:
    async def ask() -> None:
        async with aio.connect(path) as client, client.lease("a"):
            pass

    asyncio.run(ask())


@pytest.mark.parametrize("ask", [lease, clients_lease, awaited, entered, clients_entered])
def test_the_warning_names_the_line_that_asked(tmp_path: Path, ask: Callable[[str], None]) -> None:
    with FakeDaemon(tmp_path, refuses) as daemon, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ask(daemon.path)
    (warning,) = [one for one in caught if one.category is RequestRefused]
    assert warning.filename == __file__
