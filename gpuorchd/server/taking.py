"""How a connection takes its requests: one at a time, as far as its turn goes.

Owns what has come in and was not taken yet. No more is taken while any of these holds: the last
request's answer takes time (`metrics`, changes that are kept on disk), too much is unsent, the end
has come, or it is others' turn (`turns`).
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from gpuorchd.core.model import ConnectionId, RequestId
from gpuorchd.server.credentials import Credentials
from gpuorchd.server.dispatch import VIEWS
from gpuorchd.server.faults import Fault
from gpuorchd.server.intake import Intake
from gpuorchd.server.outliving import Outliving
from gpuorchd.server.requests import AnyRequest
from gpuorchd.server.speaker import LATE_OP
from libclient.wire.framing import WHOLE_FRAME_BYTES

if TYPE_CHECKING:
    from gpuorchd.server.switchboard import Switchboard

# Requests taken from one connection before their answers are given to the kernel.
REQUESTS_PER_TURN: Final = 64


class Taking(Outliving):
    """The part of a connection that takes requests."""

    __slots__ = (
        "_closing",
        "_deferred_id",
        "_direct",
        "_held",
        "_in_line",
        "_intake",
        "deferred",
        "ended",
        "refusal",
        "sealed",
    )

    def __init__(
        self,
        board: Switchboard,
        number: ConnectionId,
        sock: socket.socket,
        who: Credentials,
        refusal: str | None,
    ) -> None:
        super().__init__(board, number, sock, who)
        self.refusal = refusal
        self.ended = False
        self.sealed = False
        self._closing = False
        self._intake = Intake()
        # Between frames and nothing in the way: a read that is one frame is taken as it is.
        self._direct = False
        # An answer that takes time is being waited for.
        self.deferred = False
        self._deferred_id: RequestId = None
        # In line for a turn, and the request that comes first in it, where that is known.
        self._in_line = False
        self._held: AnyRequest | Fault | None = None

    def defer(self, request_id: RequestId) -> None:
        """Take no further request until this one has been answered."""
        self.deferred = True
        self._deferred_id = request_id
        self._direct = False

    def answered(self, request_id: RequestId) -> None:
        """Go on taking requests where it was this answer that was waited for."""
        if self.deferred and self._deferred_id == request_id:
            self.go_on()
            self.board.tell_answered()

    def go_on(self) -> None:
        """Take further requests: the deferred one waits for nothing that they could overtake."""
        self.deferred = False
        self.op = LATE_OP
        if self.board.busy is not self:
            self._line_up()

    @property
    def wants_view(self) -> bool:
        """Whether the next of its requests is for a view."""
        return type(self._held) in VIEWS

    def take_turn(self, until_ns: int) -> None:
        """Take requests until then, one at least; line up again for the rest."""
        self._in_line = False
        if not self.ended:
            self._take_until(until_ns, free=True)

    def _run(self) -> None:
        """Take what has come in, as far as this turn of the loop allows."""
        turns = self.board.turns
        now_ns = turns.clock()
        if not self._in_line:
            self._take_until(turns.share(now_ns), free=False)
            turns.spend(now_ns)

    def _take_until(self, until_ns: int, *, free: bool) -> None:
        """Take requests until then; a first one all the same, but `free` alone a first view."""
        board = self.board
        clock = board.turns.clock
        board.busy = self
        taken = 0
        starved = False
        while taken < REQUESTS_PER_TURN and not self._is_halted():
            request = self._held or self._intake.next()
            if request is None:
                starved = True
                break
            self._held = request
            if not (taken == 0 and (free or type(request) not in VIEWS)) and clock() >= until_ns:
                break
            self._held = None
            self._take(request)
            taken += 1
            self.behind += 1
            if self.outbox.unsent_bytes > WHOLE_FRAME_BYTES and not self.outbox.blocked:
                self.flush()
        board.busy = None
        board.flush()
        if not self.outbox.unsent_bytes:
            self.behind = 0
        self._adjust(starved=starved)

    def _line_up(self) -> None:
        if not self._in_line:
            self._in_line = True
            self.board.turns.line_up(self)

    def _is_halted(self) -> bool:
        if self._closing or self.ended or self.sealed or self.deferred:
            return True
        unsent_bytes = self.outbox.unsent_bytes
        if self.kept and self.behind >= REQUESTS_PER_TURN and unsent_bytes:
            # As many answers are remembered as may have to be given again.
            return True
        return unsent_bytes > 0 and unsent_bytes > self.bound_bytes

    def _take(self, request: AnyRequest | Fault) -> None:
        """Answer one request, or see to it that it will be answered."""
        raise NotImplementedError

    def _adjust(self, *, starved: bool) -> None:
        """Read on, pause or finish, as what was just done leaves it."""
        raise NotImplementedError
