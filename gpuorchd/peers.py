"""Who is at the other end of a connection, within the bounds on how many are watched.

Joins the devices' room, which knows processes, and the server, which asks: each error becomes the
answer that the peer gets. What is promised to a process needs its end to be seen, so a peer of
which nothing can be known is refused.
"""

from __future__ import annotations

from collections.abc import Callable

from gpuorchd.config import Config
from gpuorchd.core.model import Peer
from gpuorchd.core.state import State
from gpuorchd.devices.processes import ProcessWatch
from gpuorchd.server.services import PeerNotTaken
from libclient.wire.vocabulary import FORBIDDEN, LIMIT


class Peers:
    """The peers of connections. Call it on the loop."""

    def __init__(self, processes: ProcessWatch, state: State, config: Config) -> None:
        self._processes = processes
        self._state = state
        self.set_bounds(config)

    def set_bounds(self, config: Config) -> None:
        """Keep other bounds from now on; what is over a lower one stays."""
        self._bound = config.max_processes
        self._bound_per_uid = config.max_processes_per_uid

    def look(self, fd: int) -> Peer:
        """Find out who a peer is that is promised nothing. Raises `PeerNotTaken`."""
        return _known(self._processes.look, fd)

    def identify(self, fd: int) -> Peer:
        """Find out who a peer is, and watch its process. Raises `PeerNotTaken`."""
        peer = _known(self._processes.identify, fd)
        process = peer.process
        if process in self._state.holders or process in self._state.watched:
            return peer
        if self._processes.count > self._bound:
            bound = f"{self._bound} processes are watched for their end"
            variable = "GPUORCH_MAX_PROCESSES"
        elif self._processes.count_of(peer.uid) > self._bound_per_uid:
            bound = f"{self._bound_per_uid} processes of one user are watched for their end"
            variable = "GPUORCH_MAX_PROCESSES_PER_UID"
        else:
            return peer
        self._processes.release_unused(process)
        raise PeerNotTaken(LIMIT, f"at most {bound} ({variable}); this bound is reached")


def _known(ask: Callable[[int], Peer], fd: int) -> Peer:
    try:
        peer = ask(fd)
    except OSError as error:
        # Most likely no descriptor is left; or /proc hides the processes of others.
        code = FORBIDDEN if isinstance(error, PermissionError) else LIMIT
        reason = f"the peer's process cannot be watched: {error.strerror}"
        raise PeerNotTaken(code, reason) from None
    if peer.process.pid <= 0:
        # All of them would look like one process, of which no end is ever seen.
        reason = "the peer is in a pid namespace that this daemon does not see into"
        raise PeerNotTaken(FORBIDDEN, f"{reason}: nothing can be known of its process")
    return peer
