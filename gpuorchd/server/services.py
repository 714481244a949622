"""What the server room needs from the others, and the bounds that it keeps.

The start-up code fills in both. Nothing here has behaviour.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gpuorchd.core.model import DeviceUuid, Peer, ProcessKey, RequestId
from gpuorchd.views import DeviceStatus, Telemetry


class PeerNotTaken(Exception):
    """A peer that nothing can be promised to, for now or at all; `code` is the wire's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Keeping(Protocol):
    """What lets leases outlive the daemon: a table, and a store of connections where there is one.

    All of it returns at once.
    """

    @property
    def has_store(self) -> bool:
        """Whether connections outlive this process."""

    def refusal(self, stored: bool) -> str | None:
        """Say why no new lease or wait could be kept, None where one can."""

    def keep(self, conn: int, fd: int, then: Callable[[str | None], None]) -> None:
        """Put a connection into the store, then call with None or why it is not there."""

    def drop(self, conn: int) -> None:
        """Forget a connection that has ended, or is about to be closed."""

    def mark_half_sent(self, conn: int, on: bool) -> None:
        """Note that a part of a frame may be about to leave, or that no part of one is out."""


@dataclass(frozen=True, slots=True)
class Services:
    """What other rooms do for the server. All are called on the loop and return at once."""

    # The peer behind a connected descriptor; its process is watched from then on. The descriptor
    # stays the caller's. Called once for a connection, before its first event. Raises
    # `PeerNotTaken` where it cannot be known or watched; it may be called again then.
    identify: Callable[[int], Peer]
    # The same for a peer that is promised nothing: nobody is watched.
    look: Callable[[int], Peer]
    # The answer to `ready`: `ready` and `checks`.
    ready: Callable[[], Mapping[str, object]]
    device_status: Callable[[], DeviceStatus]
    telemetry: Callable[[], Mapping[DeviceUuid, Telemetry]]
    # Yields to lease work while it renders. One call is shared by all who ask meanwhile.
    render_metrics: Callable[[], Awaitable[str]]
    # Users' numbers by name, without those that do not exist. It may take long.
    resolve_users: Callable[[Iterable[str]], Awaitable[Mapping[str, int]]]
    # Send a signal, by its short name, through the process's pidfd while it has that uid.
    signal_peer: Callable[[ProcessKey, int, str], None]
    # A bug met while handling a request (op, id): log it and stop the daemon. The request has been
    # answered `internal`.
    on_bug: Callable[[Exception, str, RequestId], None]
    # None: nothing outlives the daemon.
    keeping: Keeping | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """Bounds and facts of the server. What happens at each bound is said where it is kept."""

    version: str
    # Members of this group are admins, besides root and the daemon's own user.
    admin_gid: int | None = None
    connections: int = 4_096
    connections_per_uid: int = 3_584
    # Connections over the bounds above that are kept until their first request was answered.
    refused_connections: int = 64
    subscriptions_per_connection: int = 16
    # Over this, a connection's requests are left unread until its replies have gone.
    unsent_bytes_per_connection: int = 262_144
    # Over this, replies larger than `small_reply_bytes` are refused and every connection's bound
    # shrinks to that figure.
    unsent_bytes: int = 67_108_864
    small_reply_bytes: int = 16_384
    # A connection that is being closed for its own fault, or is one too many, has so long to read
    # why and to close.
    linger_s: float = 5.0
    # What a stop waits for unsent replies.
    stop_s: float = 1.0
