"""What the asyncio client returns for something that takes time: to be awaited, or entered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar


class _Closable(Protocol):
    """What `async with` can leave."""

    async def aclose(self) -> None:
        """End it."""


C = TypeVar("C", bound=_Closable)


class Opening(Generic[C]):
    """Something that is being opened: await it, or enter it with `async with`."""

    def __init__(self, opened: Callable[[], Awaitable[C]]) -> None:
        self._open = opened
        self._value: C | None = None

    def __await__(self) -> Generator[Any, None, C]:
        """Open it."""
        return self._open().__await__()

    async def __aenter__(self) -> C:
        """Open it for the length of the block."""
        self._value = await self._open()
        return self._value

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        if self._value is not None:
            await self._value.aclose()
