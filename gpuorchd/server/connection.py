"""One client's connection: its life from accept to close.

Reading is paused while no more requests are taken (`taking`), so what is kept unparsed is bounded;
the peer's end is then watched for apart.

States: open, then closing (a reply that ends the connection is on its way, or the input of text
mode is over), then ended. `sealed` stands beside them: nothing more is sent, and what comes in is
thrown away. Everything here runs on the loop, and nothing that a peer does raises.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, cast

from gpuorchd.core.model import ConnectionId, Peer
from gpuorchd.server.credentials import Credentials
from gpuorchd.server.dispatch import VIEWS, find_repeated, handle
from gpuorchd.server.faults import Fault, read_frame
from gpuorchd.server.intake import Intake
from gpuorchd.server.marker import MarkerWait
from gpuorchd.server.outliving import shut
from gpuorchd.server.requests import AnyRequest
from gpuorchd.server.taking import Taking
from libclient.wire import vocabulary as words
from libclient.wire.framing import HEADER, HEADER_BYTES

if TYPE_CHECKING:
    from gpuorchd.server.switchboard import Switchboard

# What a connection that is being closed may still send before it is cut off.
DISCARD_BYTES: Final = 1_048_576

_length_at = HEADER.unpack_from


class Connection(Taking, asyncio.BufferedProtocol):
    """One accepted connection. `refusal` is set on one that is over a bound: it is told so.

    `on_lost` is called once, when the loop has let go of a connection that it had taken in.
    """

    __slots__ = (
        "_discarded",
        "_on_lost",
        "_paused",
        "_shut",
        "_transport",
        "_watched",
    )

    def __init__(
        self,
        board: Switchboard,
        number: ConnectionId,
        sock: socket.socket,
        credentials: Credentials,
        on_lost: Callable[[Connection], None],
        refusal: str | None = None,
    ) -> None:
        super().__init__(board, number, sock, credentials, refusal)
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._watched = False
        # All that was said is with the kernel, and the peer was told that nothing more comes.
        self._shut = False
        self._discarded = 0

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin. The transport reads; what is written goes around it, through the outbox."""
        # uvloop's transports have the methods and are no subclass.
        self._transport = cast("asyncio.Transport", transport)
        self.board.connected(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Lend the buffer that all connections read into; it is emptied in the same turn."""
        return self.board.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take in what was read."""
        board = self.board
        view = board.buffer
        direct = self._direct
        # The buffer has room for no frame over the limit: one that is here whole is within it.
        if direct and nbytes > HEADER_BYTES and _length_at(view)[0] == nbytes - HEADER_BYTES:
            request = read_frame(view[HEADER_BYTES:nbytes])
            if type(request) in VIEWS:
                self._held = request
                self._run()
                return
            board.busy = self
            if isinstance(request, Fault):
                self._take(request)
            else:
                handle(board, self, request)
            board.busy = None
            board.flush()
            if not self._direct or self.outbox.unsent_bytes:
                self.behind += 1
                self._adjust(starved=True)
            return
        if self._closing or self.sealed:
            self._discard(nbytes)
        elif self.marker is not None:
            self._await_marker(self.marker, bytes(view[:nbytes]))
        elif not self.ended:
            self._intake.feed(bytes(view[:nbytes]))
            if self._intake.is_text and not self.is_text:
                self.speak_text()
            self._run()

    def eof_received(self) -> bool:
        """Take note of the end of input; say whether to stay open."""
        if self.ended or self.sealed or self._shut or not self.is_text:
            self.end()
            return False
        # Text mode: what has come in is answered; then waits are cancelled and leases end.
        self._intake.end()
        self._watch()
        self._run()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over, in whatever way. An error is a normal end here."""
        self.end()
        self.board.disconnected(self)
        self._on_lost(self)

    # What the watch calls.

    def on_writable(self) -> None:
        """Send on, and take more requests once enough has left."""
        self.outbox.flush()
        self._flushed()
        if not self.outbox.unsent_bytes:
            self.behind = 0
        if not self.ended and self.outbox.unsent_bytes <= self.bound_bytes // 2:
            self.catch_up()
            self._run()

    def on_peer_half_closed(self) -> None:
        """The peer will send nothing more, which outside text mode is its end."""
        if self.sealed or self._shut or not self.is_text:
            self.close()

    def on_peer_gone(self) -> None:
        """The peer has closed altogether while nothing was read from it."""
        self.close()

    # What the rest of the room calls.

    def resume(self, peer: Peer | None, *, sealed: bool) -> None:
        """Go on with a connection that outlived a daemon; `peer` None: it holds nothing yet."""
        self.peer = peer
        self.arrived = peer is not None
        self.keep()
        if sealed:
            self.seal_told = True
            self.seal()
        else:
            self._intake = Intake(frames=True)
            self.greet()

    def seal(self) -> None:
        """Send nothing after what is in the outbox, and throw away what comes in."""
        self.sealed = self.muted = True
        self._direct = False
        self.drop_subscriptions()

    def flush(self) -> None:
        """Send what was put, as far as the kernel takes it."""
        outbox = self.outbox
        if outbox.blocked:
            # The watch tells when it can go on: trying before is a wasted call.
            return
        if not outbox.flush() or self._watched or self._closing or self.sealed:
            self._flushed()

    def _flushed(self) -> None:
        """See to what the kernel did not take, and to what was waiting for it to take all."""
        outbox = self.outbox
        if outbox.blocked or self._watched:
            self._watch()
        if self.sealed and not outbox.unsent_bytes and not self.ended:
            self.tell_sealed()
        if outbox.broken:
            self._abort()
        elif self._closing and not outbox.unsent_bytes and not self.ended:
            self._shut_output()

    def close_after_reply(self) -> None:
        """Say nothing more, and end when all that was said has left, or after a while."""
        self._closing = self.muted = True
        self._direct = False
        self.drop_subscriptions()
        self.leave()
        self.board.linger(self)

    def close(self) -> None:
        """End the connection now; what is unsent is lost."""
        if self.kept and not self.ended:
            shut(self.sock)
        self.end()
        self._abort()

    def end(self) -> None:
        """Let go of all that the connection held. The loop closes the descriptor later."""
        if self.ended:
            return
        self.ended = self.muted = True
        self._direct = False
        self.outbox.drop()
        if self._watched:
            self._watched = False
            self.board.watch.drop(self.fd)
        self.drop_subscriptions()
        if self.kept:
            self.leave_store()
        self.leave()

    # Taking requests.

    def _await_marker(self, marker: MarkerWait, data: bytes) -> None:
        rest = marker.feed(data)
        if rest is None:
            return
        self.marker = None
        if rest:
            self._intake.feed(rest)
        self._run()

    def _take(self, request: AnyRequest | Fault) -> None:
        if self.refusal is not None:
            request_id = request.request_id if isinstance(request, Fault) else request.id
            self.refuse(Fault(words.LIMIT, self.refusal, None, request_id))
            self.close_after_reply()
        elif isinstance(request, Fault):
            repeated = find_repeated(self.board, self, request.request_id, request.op)
            self.refuse(repeated or request)
        else:
            handle(self.board, self, request)

    def _adjust(self, *, starved: bool) -> None:
        """Read on, pause or finish, as what was just done leaves it."""
        if self.ended:
            return
        intake = self._intake
        halted = self._is_halted()
        if intake.has_ended:
            if starved and not halted:
                self._finish_text()
        elif self._closing or self.sealed or (starved and not halted):
            self._resume()
        else:
            self._pause()
        if not halted and not starved:
            self._line_up()
        free = not halted and not self._paused and self.refusal is None and self.marker is None
        self._direct = free and intake.is_between_frames

    def _pause(self) -> None:
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()
            self._watch()

    def _resume(self) -> None:
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()
            self._watch()

    def _discard(self, nbytes: int) -> None:
        self._discarded += nbytes
        if self._closing and self._discarded > DISCARD_BYTES:
            self.close()

    # The end.

    def _finish_text(self) -> None:
        self._closing = True
        # The core answers those who wait before it forgets the connection.
        self.leave()
        self._flushed()

    def _shut_output(self) -> None:
        """Everything is with the kernel: say so, and let the peer close."""
        if self._intake.has_ended:
            self.close()
        elif not self._shut:
            self._shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.close()

    def _watch(self) -> None:
        if self.ended:
            return
        blocked = self.outbox.blocked
        if blocked or self._paused or self._intake.has_ended:
            half_close = self._paused and not self.is_text
            self.board.watch.set(self.fd, self, writable=blocked, half_close=half_close)
            self._watched = True
        elif self._watched:
            self._watched = False
            self.board.watch.drop(self.fd)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
