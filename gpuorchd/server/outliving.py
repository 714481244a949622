"""What a connection does to outlive the daemon: it is kept, greeted by the next, and let go.

Owns what is known of one connection in the descriptor store. A kept connection says before a part
of a frame may leave, because what is cut cannot be mended by another daemon; and it takes no more
requests than answers are remembered.
"""

from __future__ import annotations

import contextlib
import socket
from functools import partial

from gpuorchd.core.events import SealTold
from gpuorchd.core.model import ConnectionId
from gpuorchd.server.credentials import Credentials
from gpuorchd.server.marker import MarkerWait
from gpuorchd.server.peered import Peered
from gpuorchd.server.switchboard import Switchboard


class Outliving(Peered):
    """The part of a connection that is about its store and its resumption."""

    __slots__ = ("behind", "kept", "marker", "seal_told")

    def __init__(
        self, board: Switchboard, number: ConnectionId, sock: socket.socket, who: Credentials
    ) -> None:
        super().__init__(board, number, sock, who)
        # In the descriptor store, or on its way there.
        self.kept = False
        # Set while what an earlier daemon was told is thrown away.
        self.marker: MarkerWait | None = None
        # Requests taken since all answers were with the kernel.
        self.behind = 0
        # It is recorded that the peer knows of its seal.
        self.seal_told = False

    def keep(self) -> None:
        """Be in the descriptor store from now on."""
        self.kept = True
        keeping = self.board.services.keeping
        assert keeping is not None, "kept by nobody"
        self.outbox.set_guard(partial(keeping.mark_half_sent, self.number))

    def keep_no_more(self) -> None:
        """Be out of the store: it did not take the connection."""
        self.kept = False
        self.outbox.set_guard(None)

    def greet(self) -> None:
        """Tell the client that another daemon is here, and await its marker."""
        self.marker = MarkerWait()
        epoch = self.board.state.settings.epoch
        self.tell("daemon.resumed", {"epoch": epoch, "nonce": self.marker.nonce})

    def tell_sealed(self) -> None:
        """Have it recorded, once, that the answer to `seal` has left."""
        if not self.seal_told:
            self.seal_told = True
            self.board.submit(SealTold(self.number))

    def leave_store(self) -> None:
        """Be forgotten by the store: the connection has ended."""
        keeping = self.board.services.keeping
        if keeping is not None:
            keeping.drop(self.number)


def shut(sock: socket.socket) -> None:
    """End a connection for everyone who has it open: the store's copy would keep it alive."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
