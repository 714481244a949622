"""One client's connection: bytes in, requests one at a time, replies out in order.

The first byte decides between frames and text for the connection's whole life. Requests are taken
one at a time, and no more of them are read while any of these holds: the last one's answer takes
time (`metrics`, changes that are kept on disk), too much is unsent, or a turn's share of requests
has been taken. Reading is paused meanwhile, so what is kept unparsed is bounded by one read and
one request; the peer's end is then watched for apart.

States: open → closing (a reply that ends the connection is on its way, or the input of text mode
is over) → ended. `sealed` stands beside them: nothing more is sent, and what comes in is thrown
away. Everything here runs on the loop, and nothing that a peer does raises.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gpuorchd.core.events import ClientArrived, ClientLeft
from gpuorchd.core.model import ConnectionId, Peer, RequestId
from gpuorchd.server import dispatch, replies
from gpuorchd.server.credentials import Credentials, is_admin
from gpuorchd.server.faults import Fault, read_frame, read_line
from gpuorchd.server.lines import LineSplitter, LineTooLong
from gpuorchd.server.outbox import Outbox
from gpuorchd.server.replies import EventBody
from gpuorchd.server.requests import AnyRequest
from gpuorchd.server.subscriptions import Subscription
from gpuorchd.server.unasked import Unasked
from libclient.wire import vocabulary as words
from libclient.wire.framing import (
    HEADER,
    HEADER_BYTES,
    MAX_REQUEST_BYTES,
    TEXT_FIRST,
    TEXT_LAST,
    WHOLE_FRAME_BYTES,
    EmptyFrame,
    FrameSplitter,
    FrameTooLarge,
)

if TYPE_CHECKING:
    from gpuorchd.server.switchboard import Switchboard

# Requests taken from one connection before others have their turn, and before their answers are
# given to the kernel.
REQUESTS_PER_TURN: Final = 64
# What a connection that is being closed may still send before it is cut off.
DISCARD_BYTES: Final = 1_048_576

# What a late answer of the core belongs to, unless something else was deferred.
LEASE_OP: Final = "lease"

_length_at = HEADER.unpack_from


class Connection(asyncio.BufferedProtocol):
    """One accepted connection. `refusal` is set on one that is over a bound: it is told so.

    `on_lost` is called once, when the loop has let go of a connection that it had taken in.
    """

    __slots__ = (
        "_admin",
        "_again",
        "_board",
        "_closing",
        "_deferred",
        "_deferred_id",
        "_direct",
        "_discarded",
        "_frames",
        "_input_ended",
        "_lines",
        "_muted",
        "_on_lost",
        "_paused",
        "_shut",
        "_transport",
        "_watched",
        "arrived",
        "credentials",
        "encode",
        "ended",
        "fd",
        "in_dirty",
        "next_subscription",
        "number",
        "op",
        "outbox",
        "peer",
        "refusal",
        "sealed",
        "sock",
        "subscriptions",
        "unasked",
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
        self._board = board
        self.number = number
        self.sock = sock
        self.fd = sock.fileno()
        self.credentials = credentials
        self._on_lost = on_lost
        self.refusal = refusal
        self.outbox = Outbox(self.fd, board.unsent)
        self.unasked: Unasked | None = None
        self.subscriptions: dict[int, Subscription] | None = None
        self.next_subscription = 1
        # Known once the process was identified, which is when the core has heard of it.
        self.peer: Peer | None = None
        self.arrived = False
        # The op that is being handled: an answer of the core does not say. Late ones are leases.
        self.op = LEASE_OP
        self.encode = replies.encode_frame
        # Set while this connection has something to be flushed at the end of the turn.
        self.in_dirty = False
        self.sealed = False
        self.ended = False
        self._transport: asyncio.Transport | None = None
        self._frames: FrameSplitter | None = None
        self._lines: LineSplitter | None = None
        # Frames, nothing pending, nothing in the way: a read that is one frame is taken as it is.
        self._direct = False
        self._paused = False
        self._watched = False
        self._deferred = False
        self._deferred_id: RequestId = None
        self._closing = False
        # Nothing more is put: the last reply is in the outbox, or it is all over.
        self._muted = False
        self._shut = False
        self._discarded = 0
        self._input_ended = False
        self._again = False
        self._admin: bool | None = None

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin. The transport reads; what is written goes around it, through the outbox."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._board.connected(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Lend the buffer that all connections read into; it is emptied in the same call."""
        return self._board.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take in what was read."""
        view = self._board.buffer
        if self._direct and nbytes > HEADER_BYTES:
            length = _length_at(view)[0]
            if length == nbytes - HEADER_BYTES and length <= MAX_REQUEST_BYTES:
                board = self._board
                board.busy = self
                self._take(read_frame(view[HEADER_BYTES:nbytes]))
                board.busy = None
                board.flush()
                if self.outbox.unsent_bytes or self._deferred or self._closing or self.sealed:
                    self._adjust(starved=True)
                return
        if self._closing or self.sealed:
            self._discard(nbytes)
        elif not self.ended:
            self._feed(bytes(view[:nbytes]))
            self._run()

    def eof_received(self) -> bool:
        """Take note of the end of input; say whether to stay open."""
        if self.ended or self._lines is None or self.sealed or self._shut:
            self.end()
            return False
        self._end_input()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over, in whatever way. An error is a normal end here."""
        self.end()
        self._board.disconnected(self)
        self._on_lost(self)

    # What the watch calls.

    def on_writable(self) -> None:
        """Send on, and take more requests once enough has left."""
        self.outbox.flush()
        self.flushed()
        if self.ended or self._over_bound(half=True):
            return
        if self.unasked is not None:
            self.unasked.resume()
        for subscription in (self.subscriptions or {}).values():
            self._board.subscriptions.catch_up(subscription)
        self._run()

    def on_peer_half_closed(self) -> None:
        """The peer will send nothing more: in frame mode its end, in text mode the last line's."""
        if self._lines is None or self.sealed or self._shut:
            self.close()
        # In text mode the loop tells it when it reads again; till then only death matters.

    def on_peer_gone(self) -> None:
        """The peer has closed altogether while nothing was read from it."""
        self.close()

    # What the rest of the room calls.

    @property
    def unsent_bytes(self) -> int:
        """Bytes put and not yet taken by the kernel."""
        return self.outbox.unsent_bytes

    @property
    def is_text(self) -> bool:
        """Whether it speaks lines."""
        return self._lines is not None

    @property
    def is_crowded(self) -> bool:
        """Whether so much is unsent that what can be left out is."""
        return self._over_bound()

    def send(self, data: bytes) -> None:
        """Send a frame or line at the end of this turn."""
        if self._muted or self.sealed:
            return
        self.outbox.put(data)
        if not self.in_dirty:
            self.in_dirty = True
            self._board.dirty.append(self)

    def put_event(self, body: EventBody, subscription: int | None, seq: int) -> None:
        """Send an event, in the form of this connection's mode."""
        form = body.frame if self._lines is None else body.line
        self.send(form(subscription, seq))

    def send_now(self) -> None:
        """Send what was put, as far as the kernel takes it."""
        if self.in_dirty:
            self._board.flush()

    def reply(self, request_id: RequestId, fields: dict[str, object]) -> None:
        """Answer a request with a view. One too large for what is unsent already is refused."""
        board = self._board
        data = self.encode({"id": request_id, "ok": True, **fields})
        options = board.options
        full = board.unsent.total_bytes > options.unsent_bytes
        if full and len(data) > options.small_reply_bytes:
            message = (
                f"more than {options.unsent_bytes} bytes of replies are unsent over all "
                f"connections; this bound is reached for replies over {options.small_reply_bytes}"
            )
            self.refuse(Fault(words.LIMIT, message, None, request_id, self.op))
            return
        board.count(self.op, "ok")
        self.send(data)

    def refuse(self, fault: Fault) -> None:
        """Answer a request with an error; some end the connection."""
        message = replies.error(fault.request_id, fault.code, fault.message, fault.field)
        self.send(self.encode(message))
        self._board.count(fault.op or "unknown", fault.code)
        if fault.code in words.CLOSING:
            self._close_after_reply()

    @property
    def is_deferred(self) -> bool:
        """Whether an answer that takes time is being waited for."""
        return self._deferred

    def defer(self, request_id: RequestId) -> None:
        """Take no further request until this one has been answered."""
        self._deferred = True
        self._deferred_id = request_id

    def answered(self, request_id: RequestId) -> None:
        """Go on taking requests where it was this answer that was waited for."""
        if self._deferred and self._deferred_id == request_id:
            self._deferred = False
            self.op = LEASE_OP
            if self._board.busy is not self:
                self._run_soon()

    def seal(self) -> None:
        """Send nothing after what is in the outbox, and throw away what comes in."""
        self.sealed = True
        self._direct = False
        self._drop_subscriptions()

    def identify(self) -> Peer:
        """Find out who the peer is, and tell the core of it; once for a connection."""
        if self.peer is None:
            self.peer = self._board.services.identify(self.fd)
            self.arrived = True
            self._board.engine.submit(ClientArrived(self.number, self.peer))
        return self.peer

    def is_admin(self) -> bool:
        """Whether the peer may use admin ops."""
        if self._admin is None:
            gid = self._board.options.admin_gid
            self._admin = is_admin(self.credentials, self.sock, gid)
        return self._admin

    def flushed(self) -> None:
        """See to what the kernel did not take. Called after every flush."""
        outbox = self.outbox
        if outbox.broken:
            self._abort()
        elif outbox.blocked or self._watched:
            self._watch()
        if self._closing and not outbox.unsent_bytes and not self.ended:
            self._shut_output()

    def close(self) -> None:
        """End the connection now; what is unsent is lost."""
        self.end()
        self._abort()

    def end(self) -> None:
        """Let go of all that the connection held. The loop closes the descriptor later."""
        if self.ended:
            return
        self.ended = self._muted = True
        self._direct = False
        self.outbox.drop()
        if self._watched:
            self._watched = False
            self._board.watch.drop(self.fd)
        self._drop_subscriptions()
        self._leave()

    # Input.

    def _feed(self, data: bytes) -> None:
        if self._frames is not None:
            self._frames.feed(data)
        elif self._lines is not None:
            self._lines.feed(data)
        elif TEXT_FIRST <= data[0] <= TEXT_LAST:
            self._lines = LineSplitter()
            self._lines.feed(data)
            self.encode = replies.encode_line
        else:
            self._frames = FrameSplitter(MAX_REQUEST_BYTES)
            self._frames.feed(data)

    def _run(self) -> None:
        board = self._board
        board.busy = self
        taken = 0
        starved = False
        while not self._is_halted() and taken < REQUESTS_PER_TURN:
            request = self._next()
            if request is None:
                starved = True
                break
            self._take(request)
            taken += 1
            if self.outbox.unsent_bytes > WHOLE_FRAME_BYTES and not self.outbox.blocked:
                self.outbox.flush()
        board.busy = None
        board.flush()
        self._adjust(starved=starved)

    def _run_soon(self) -> None:
        if not self._again:
            self._again = True
            self._board.loop.call_soon(self._run_again)

    def _run_again(self) -> None:
        self._again = False
        if not self.ended:
            self._run()

    def _next(self) -> AnyRequest | Fault | None:
        try:
            if self._frames is not None:
                payload = self._frames.next_frame()
                return None if payload is None else read_frame(payload)
            while self._lines is not None and (line := self._lines.next_line()) is not None:
                request = read_line(line)
                if request is not None:
                    return request
        except FrameTooLarge as error:
            message = f"a frame of {error.announced} bytes is announced; allowed: {error.limit}"
            return Fault(words.FRAME_TOO_LARGE, message)
        except LineTooLong as error:
            message = f"a line has {error.seen} bytes or more; allowed: {MAX_REQUEST_BYTES}"
            return Fault(words.FRAME_TOO_LARGE, message)
        except EmptyFrame:
            return Fault(words.BAD_FRAME, "a frame of 0 bytes is announced; allowed: 1 or more")
        return None

    def _take(self, request: AnyRequest | Fault) -> None:
        if self.refusal is not None:
            self._refuse_all(request)
        elif isinstance(request, Fault):
            repeated = dispatch.repeated(self._board, self, request.request_id, request.op)
            self.refuse(repeated or request)
        else:
            dispatch.handle(self._board, self, request)

    def _refuse_all(self, request: AnyRequest | Fault) -> None:
        request_id = request.request_id if isinstance(request, Fault) else request.id
        assert self.refusal is not None
        self.refuse(Fault(words.LIMIT, self.refusal, None, request_id))
        self._close_after_reply()

    def _is_halted(self) -> bool:
        return self.ended or self._closing or self.sealed or self._deferred or self._over_bound()

    def _over_bound(self, *, half: bool = False) -> bool:
        unsent_bytes = self.outbox.unsent_bytes
        if not unsent_bytes:
            return False
        board = self._board
        bound = board.options.unsent_bytes_per_connection
        if board.unsent.total_bytes > board.options.unsent_bytes:
            bound = min(bound, board.options.small_reply_bytes)
        return unsent_bytes > (bound // 2 if half else bound)

    def _adjust(self, *, starved: bool) -> None:
        """Read on or pause, as what was just done leaves it."""
        if self.ended:
            return
        discarding = self._closing or self.sealed
        halted = self._is_halted()
        if self._input_ended:
            if starved and not halted:
                self._finish_text()
        elif discarding or (starved and not halted):
            self._resume()
        else:
            self._pause()
        if not halted and not starved:
            self._run_soon()
        self._direct = (
            self._frames is not None
            and not halted
            and not self._paused
            and not self._frames.pending_bytes
            and self.refusal is None
        )

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
        if self._closing:
            self._discarded += nbytes
            if self._discarded > DISCARD_BYTES:
                self.close()

    # The end.

    def _end_input(self) -> None:
        """Text mode: what has come in is answered; then waits are cancelled and leases end."""
        assert self._lines is not None
        self._input_ended = True
        self._lines.end()
        self._watch()
        self._run()

    def _close_after_reply(self) -> None:
        self._closing = self._muted = True
        self._direct = False
        self._drop_subscriptions()
        self._leave()

    def _finish_text(self) -> None:
        self._closing = True
        # The core answers those who wait before it forgets the connection.
        self._leave()
        self.flushed()

    def _leave(self) -> None:
        if self.arrived:
            self.arrived = False
            self._board.submit(ClientLeft(self.number))

    def _shut_output(self) -> None:
        """Everything is with the kernel: say so, and give the peer some time to close."""
        if self._input_ended:
            self.close()
        elif not self._shut:
            self._shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.close()
                return
            self._board.linger(self)

    def _watch(self) -> None:
        """Watch for what the loop does not tell."""
        if self.ended:
            return
        unread = self._paused or self._input_ended
        if unread or self.outbox.blocked:
            half_close = self._paused and self._lines is None
            self._board.watch.set(
                self.fd, self, writable=self.outbox.blocked, half_close=half_close
            )
            self._watched = True
        elif self._watched:
            self._watched = False
            self._board.watch.drop(self.fd)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _drop_subscriptions(self) -> None:
        for subscription in (self.subscriptions or {}).values():
            self._board.subscriptions.remove(subscription)
        self.subscriptions = None
