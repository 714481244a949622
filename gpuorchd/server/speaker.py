"""The outgoing half of a connection: replies, errors and events, in the form of its mode.

Everything that is said goes through `send` into the outbox and leaves at the end of the turn.
Nothing is said any more once a reply that ends the connection is in the outbox, or after
the answer to `seal`. How much may be unsent, for this connection and over all, is judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from gpuorchd.core.model import ConnectionId, RequestId
from gpuorchd.server import replies
from gpuorchd.server.faults import Fault
from gpuorchd.server.outbox import Outbox
from gpuorchd.server.replies import EventBody
from gpuorchd.server.subscriptions import Subscription
from gpuorchd.server.unasked import Unasked
from libclient.wire import vocabulary as words

if TYPE_CHECKING:
    from gpuorchd.server.switchboard import Switchboard

# What a late answer of the core belongs to, unless something else was deferred.
LATE_OP: Final = "lease"
UNSAYABLE: Final = "the request is refused for a value that no message can hold"


class Speaker:
    """What a connection says. `Connection` adds what it hears, and its life."""

    __slots__ = (
        "board",
        "encode",
        "in_dirty",
        "is_text",
        "muted",
        "next_subscription",
        "number",
        "op",
        "outbox",
        "subscriptions",
        "unasked",
    )

    def __init__(self, board: Switchboard, number: ConnectionId, fd: int) -> None:
        self.board = board
        self.number = number
        self.outbox = Outbox(fd, board.unsent)
        self.unasked: Unasked | None = None
        self.subscriptions: dict[int, Subscription] | None = None
        self.next_subscription = 1
        # The op that is being handled: an answer of the core does not say.
        self.op = LATE_OP
        self.is_text = False
        self.encode: Callable[[Any], bytes] = replies.encode_frame
        # Set while there is something to be flushed at the end of the turn.
        self.in_dirty = False
        # Nothing is put any more: the last thing to say is in the outbox, or it is all over.
        self.muted = False

    @property
    def unsent_bytes(self) -> int:
        """Bytes put and not yet taken by the kernel."""
        return self.outbox.unsent_bytes

    @property
    def bound_bytes(self) -> int:
        """How much may be unsent before no more requests are taken; less when all have much."""
        options = self.board.options
        if self.board.unsent.total_bytes > options.unsent_bytes:
            return min(options.unsent_bytes_per_connection, options.small_reply_bytes)
        return options.unsent_bytes_per_connection

    def speak_text(self) -> None:
        """Say everything in lines from now on."""
        self.is_text = True
        self.encode = replies.encode_line

    def send(self, data: bytes) -> None:
        """Send a frame or line at the end of this turn."""
        if self.muted:
            return
        self.outbox.put(data)
        if not self.in_dirty:
            self.in_dirty = True
            self.board.dirty.append(self)

    def send_now(self) -> None:
        """Send what was put, as far as the kernel takes it."""
        if self.in_dirty:
            self.board.flush()

    def put_event(self, body: EventBody, subscription: int | None, seq: int) -> None:
        """Send an event, in the form of this connection's mode."""
        form = body.line if self.is_text else body.frame
        self.send(form(subscription, seq))

    def reply(self, request_id: RequestId, fields: dict[str, object]) -> None:
        """Answer a request with a view. One too large for what is unsent already is refused."""
        board = self.board
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
        try:
            data = self.encode(message)
        except (ValueError, OverflowError):
            # Not known to happen: what was decoded can be encoded. A peer must not find out.
            data = self.encode(replies.error(None, fault.code, UNSAYABLE, None))
        self.send(data)
        self.board.count(fault.op or "unknown", fault.code)
        self.board.limits.add(fault)
        if fault.code in words.CLOSING:
            self.close_after_reply()

    def tell(self, name: str, fields: Mapping[str, object]) -> None:
        """Send an event that was not asked for."""
        if self.unasked is None:
            self.unasked = Unasked(self)
        self.unasked.tell(name, fields)

    def flush(self) -> None:
        """Send what was put, as far as the kernel takes it."""
        raise NotImplementedError

    def close_after_reply(self) -> None:
        """Say nothing more, and end when all that was said has left."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """Say what was held back while too much was unsent."""
        if self.unasked is not None:
            self.unasked.resume()
        for subscription in (self.subscriptions or {}).values():
            self.board.subscriptions.wake(subscription)

    def drop_subscriptions(self) -> None:
        """End every subscription of this connection."""
        for subscription in (self.subscriptions or {}).values():
            self.board.subscriptions.remove(subscription)
        self.subscriptions = None
