"""Who is at the other end of a connection, for the connection's whole life.

The credentials are the kernel's, of the moment of connecting. The process behind them is looked up
once, when the peer first asks for something that is promised to a process; from then on the core
knows the connection.
"""

from __future__ import annotations

import socket

from gpuorchd.core.events import ClientArrived, ClientLeft
from gpuorchd.core.model import ConnectionId, Peer
from gpuorchd.server.credentials import Credentials, is_admin
from gpuorchd.server.speaker import Speaker
from gpuorchd.server.switchboard import Switchboard


class Peered(Speaker):
    """The part of a connection that knows its peer."""

    __slots__ = ("_admin", "arrived", "credentials", "fd", "peer", "sock")

    def __init__(
        self, board: Switchboard, number: ConnectionId, sock: socket.socket, who: Credentials
    ) -> None:
        super().__init__(board, number, sock.fileno())
        self.sock = sock
        self.fd = sock.fileno()
        self.credentials = who
        # Known once the process was identified, which is when the core has heard of it.
        self.peer: Peer | None = None
        self.arrived = False
        # The admin group that was asked about, and the answer.
        self._admin: tuple[int | None, bool] | None = None

    def identify(self) -> Peer:
        """Find out who the peer is, and tell the core of it; once for a connection."""
        if self.peer is None:
            self.peer = self.board.services.identify(self.fd)
            self.arrived = True
            self.board.engine.submit(ClientArrived(self.number, self.peer))
        return self.peer

    def look(self) -> Peer:
        """Find out who the peer is, without promising it anything."""
        return self.peer or self.board.services.look(self.fd)

    def is_admin(self) -> bool:
        """Whether the peer may use admin ops."""
        gid = self.board.options.admin_gid
        if self._admin is None or self._admin[0] != gid:
            self._admin = (gid, is_admin(self.credentials, self.sock, gid))
        return self._admin[1]

    def leave(self) -> None:
        """Tell the core that the connection is over, if it knows it."""
        if self.arrived:
            self.arrived = False
            self.board.submit(ClientLeft(self.number))
