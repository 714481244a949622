"""Carry an operation out in an asyncio task: the same generators, waited for by awaiting."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TypeVar

from libclient.errors import ForkedClient
from libclient.link_async import AsyncLink
from libclient.operations import Operation

T = TypeVar("T")


async def drive(link: AsyncLink, operation: Operation[T], timeout_s: float) -> T:
    """Return what the operation returns. Cancelled or out of time, it is undone first."""
    if link.forked:
        raise ForkedClient
    try:
        if link.session.ended is not None:
            link.begin()
        ticket = operation.send(None)
        ticket.deadline_s = link.loop.time() + timeout_s
        link.flush()
        if not ticket.done:
            if link.session.outgoing and link.hopeless:
                raise link.too_late()
            answered: asyncio.Future[None] = link.loop.create_future()
            ticket.wake = partial(_settle, answered)
            timer = link.loop.call_later(timeout_s, _time_is_over, answered, link)
            try:
                await answered
            finally:
                timer.cancel()
                ticket.wake = None
        operation.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    except BaseException as fault:
        # Cancellation too: what was asked for must be given back before the task ends.
        try:
            operation.throw(fault)
        except StopIteration as end:
            instead: T = end.value
            return instead
        finally:
            link.flush()
    raise AssertionError("an operation has one step")


def _settle(answered: asyncio.Future[None]) -> None:
    if not answered.done():
        answered.set_result(None)


def _time_is_over(answered: asyncio.Future[None], link: AsyncLink) -> None:
    if not answered.done():
        answered.set_exception(link.too_late())
