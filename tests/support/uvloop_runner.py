"""Run a test's coroutine on the loop that the daemon uses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

# The library opens a pipe with its first loop and keeps it for the process: not a test's leak.
uvloop.new_event_loop().close()


def on_uvloop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `test` to its end on a loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())
