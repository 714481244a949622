"""Interrupts at a chosen step of a chosen function, as Ctrl-C would strike there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any


@contextmanager
def interrupt_at(step: int, *codes: CodeType) -> Iterator[Callable[[], bool]]:
    """Raise KeyboardInterrupt once, before that step of these functions taken together.

    Gives what tells whether there was such a step. The interrupt is let through.
    """
    left = step
    struck = False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left, struck
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not struck:
            left -= 1
            if left < 0:
                struck = True
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: struck
    finally:
        sys.settrace(before)
