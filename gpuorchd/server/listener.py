"""The server: accepts connections within bounds, and ends them all when the daemon stops.

The listening socket is the host's: it comes listening, is never unlinked here and stays open when
the server has stopped. Over a bound a connection is not dropped in silence: its first request is
answered `limit`, naming the bound. Only few are kept for that; over those, connections are closed
at once.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Mapping
from typing import Final

from gpuorchd.core.model import ConnectionId
from gpuorchd.core.state import State
from gpuorchd.engine import Engine
from gpuorchd.server.bounds import UNTOLD
from gpuorchd.server.connection import Connection
from gpuorchd.server.credentials import Credentials, credentials_of
from gpuorchd.server.services import Options, Services
from gpuorchd.server.switchboard import Switchboard

# One turn of the loop accepts no more than this many: those that are there already go between.
ACCEPTS_PER_TURN: Final = 32
# When the kernel has no descriptor or memory for a connection, the next try comes after so long.
ACCEPT_PAUSE_S: Final = 0.1
OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Server:
    """Serve the wire contract on one listening socket."""

    def __init__(
        self,
        engine: Engine,
        services: Services,
        options: Options,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._services = services
        self._options = options
        self._board = Switchboard(engine, services, options, self._loop)
        self._listening: socket.socket | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._next_number = 1
        self._by_uid: dict[int, int] = {}
        self._accepted = 0
        self._refused = 0
        self._opening: set[asyncio.Task[object]] = set()
        # Times that a connection could not be accepted for want of descriptors or memory.
        self.accept_failures = 0

    @property
    def request_counts(self) -> dict[tuple[str, str], int]:
        """Requests answered, by op and outcome: `ok`, `granted`, a note, or an error's code."""
        return self._board.request_counts

    @property
    def connections(self) -> int:
        """Connections that are open, those being refused left out."""
        return self._accepted

    @property
    def unsent_bytes(self) -> int:
        """Bytes of replies and events that kernels do not take, over all connections."""
        return self._board.unsent.total_bytes

    @property
    def subscribers(self) -> int:
        """Subscriptions to events, over all connections."""
        return self._board.subscriptions.count

    @property
    def events_lost(self) -> int:
        """Events that subscribers were told to have lost, since the start."""
        return self._board.subscriptions.lost_total

    @property
    def limits_reached(self) -> Mapping[str, int]:
        """How often each bound was met since the start, by its name."""
        return self._board.limits.by_bound

    def resume(
        self, stored: Mapping[ConnectionId, socket.socket], state: State, first_number: int
    ) -> None:
        """Go on with connections that outlived a daemon; what they hold is in `state`.

        New ones are numbered from `first_number`. Their sockets are taken over.
        """
        self._next_number = first_number
        for number, sock in stored.items():
            client = state.clients.get(number)
            sock.setblocking(False)
            connection = Connection(
                self._board, number, sock, credentials_of(sock), self._lost, None
            )
            self._count(connection, 1)
            # What the core says meanwhile reaches it.
            self._board.connected(connection)
            connection.resume(
                None if client is None else client.peer,
                sealed=client is not None and client.sealed and client.seal_told,
            )
            self._begin(connection)
        # Nothing else may happen for long, and until it is greeted a client does not go on.
        self._board.flush()

    def set_options(self, options: Options) -> None:
        """Keep other bounds from now on. What is over a lower one stays; nothing more is let in."""
        self._options = self._board.options = options

    def serve(self, listening: socket.socket) -> None:
        """Begin to accept on a listening Unix stream socket, which stays the caller's."""
        listening.setblocking(False)
        self._listening = listening
        self._loop.add_reader(listening.fileno(), self._accept)

    def stop_accepting(self) -> None:
        """Take in no further connection; the listening socket may be closed from now on."""
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        if self._listening is not None:
            self._loop.remove_reader(self._listening.fileno())
            self._listening = None

    async def stop(self) -> None:
        """Accept nothing more, give and send what is to be answered, close everything.

        Answers that take time, and kernels that do not take what is unsent, are waited for: a
        second at most.

        The engine is told of the stop before, so that waiting requests have their answers and
        holders hear of it; requests that come meanwhile are answered `shutting_down`.
        """
        self.stop_accepting()
        board = self._board
        board.flush()
        deadline = self._loop.time() + self._options.stop_s
        await board.answers_given(deadline)
        while board.unsent.total_bytes and self._loop.time() < deadline:
            await board.watch.told(deadline - self._loop.time())
        await asyncio.gather(*self._opening, return_exceptions=True)
        await board.close()

    def _accept(self) -> None:
        assert self._listening is not None
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_RESOURCES:
                    self._pause_accepting()
                    return
                # The connection was gone before it was accepted.
                continue
            self._open(sock)

    def _pause_accepting(self) -> None:
        assert self._listening is not None
        self.accept_failures += 1
        self._loop.remove_reader(self._listening.fileno())
        self._resume = self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again)

    def _accept_again(self) -> None:
        self._resume = None
        if self._listening is not None:
            self._loop.add_reader(self._listening.fileno(), self._accept)

    def _open(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            credentials = credentials_of(sock)
        except OSError:
            sock.close()
            return
        refusal = self._over_bound(credentials)
        if refusal is not None and self._refused >= self._options.refused_connections:
            sock.close()
            self._board.limits.add_bound(UNTOLD)
            return
        number = ConnectionId(self._next_number)
        self._next_number += 1
        connection = Connection(self._board, number, sock, credentials, self._lost, refusal)
        self._count(connection, 1)
        self._begin(connection)

    def _begin(self, connection: Connection) -> None:
        sock = connection.sock
        task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: connection, sock))
        self._opening.add(task)
        task.add_done_callback(lambda done: self._opened(done, connection))

    def _opened(self, task: asyncio.Task[object], connection: Connection) -> None:
        self._opening.discard(task)
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and error is None:
            return
        # It never came to life: nobody will report its end.
        connection.end()
        self._board.disconnected(connection)
        connection.sock.close()
        self._count(connection, -1)
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self._services.on_bug(error, "accept", None)

    def _lost(self, connection: Connection) -> None:
        self._count(connection, -1)

    def _over_bound(self, credentials: Credentials) -> str | None:
        options = self._options
        if self._accepted >= options.connections:
            return f"at most {options.connections} connections; this bound is reached"
        if self._by_uid.get(credentials.uid, 0) >= options.connections_per_uid:
            return (
                f"at most {options.connections_per_uid} connections of one user; this bound is "
                f"reached for uid {credentials.uid}"
            )
        return None

    def _count(self, connection: Connection, change: int) -> None:
        if connection.refusal is not None:
            self._refused += change
            return
        self._accepted += change
        uid = connection.credentials.uid
        left = self._by_uid.get(uid, 0) + change
        if left:
            self._by_uid[uid] = left
        else:
            del self._by_uid[uid]
