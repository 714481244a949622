"""Open files: raise the limit to what the bounds need, or lower the bound to what the limit gives.

Every connection and every watched process takes one descriptor. A daemon that runs out of them in
the middle of its work can neither accept nor watch, so the sum is made once, at start.
"""

from __future__ import annotations

import resource
from typing import NamedTuple

from gpuorchd.host.start import StartError

# Listener, event loop, log, lock, the probe's pipes, HTTP scrapes, files opened for a moment.
SPARE_FILES = 128
# Below this the daemon could not serve even a small host.
CONNECTIONS_MIN = 16


class FittedBounds(NamedTuple):
    """The bounds that the open-file limit allows."""

    max_connections: int
    max_processes: int
    open_files: int
    needed_files: int

    @property
    def lowered(self) -> bool:
        """Whether the limit is too small for what was asked."""
        return self.open_files < self.needed_files


def fit_open_files(max_connections: int, max_processes: int) -> FittedBounds:
    """Raise this process's open-file limit for these bounds, and lower them where it stays short.

    Raises `StartError` where not even a handful of connections fits.
    """
    needed = max_connections + max_processes + SPARE_FILES
    open_files = _raise_open_files(needed)
    if open_files >= needed:
        return FittedBounds(max_connections, max_processes, open_files, needed)
    connections, processes = fitted(open_files, max_connections, max_processes)
    if connections < min(CONNECTIONS_MIN, max_connections):
        raise StartError(
            f"the limit of open files is {open_files}, which leaves {connections} connections; "
            f"at least {2 * CONNECTIONS_MIN + SPARE_FILES} open files are needed "
            "(LimitNOFILE=, ulimit -n)"
        )
    return FittedBounds(connections, processes, open_files, needed)


def fitted(open_files: int, max_connections: int, max_processes: int) -> tuple[int, int]:
    """Share out too few descriptors: processes get at most half, connections the rest."""
    room = max(0, open_files - SPARE_FILES)
    processes = min(max_processes, room // 2)
    return min(max_connections, room - processes), processes


def _raise_open_files(needed: int) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _reaches(soft, needed):
        return _number(soft, needed)
    if not _reaches(hard, needed):
        try:
            # Allowed to root, up to what the kernel has as its own bound.
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
            return needed
        except (ValueError, OSError):
            needed = hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return needed


def _reaches(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed


def _number(limit: int, needed: int) -> int:
    return needed if limit == resource.RLIM_INFINITY else limit
