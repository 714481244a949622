"""Who has opened a file: the kernel's own word, through inotify, whatever process it was."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Self

IN_OPEN = 0x20
EVENT_BYTES = 16


class OpenWatch:
    """Counts how often a file is opened, from entering on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._seen = 0

    @property
    def count(self) -> int:
        """How often it has been opened so far."""
        try:
            # A watched file, unlike a folder, gives events without a name: all have one size.
            self._seen += len(os.read(self._fd, 4_096)) // EVENT_BYTES
        except BlockingIOError:
            pass
        return self._seen

    def __enter__(self) -> Self:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        path = os.fsencode(self._path)
        if self._fd < 0 or libc.inotify_add_watch(self._fd, path, IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
