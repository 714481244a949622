"""Events that a connection gets unasked: about its leases and waits, and the daemon's end.

They have numbers of their own and no subscription. An owner that does not read is not told of
every place in the queue that it passes: only the latest place of each request is kept and told
when it reads again. What comes while even that is too much is counted and told as `events.lost`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from gpuorchd.core.model import Waiter
from gpuorchd.server.replies import EventBody
from libclient.wire.vocabulary import EVENTS_LOST

if TYPE_CHECKING:
    from gpuorchd.server.speaker import Speaker

QUEUED: Final = "lease.queued"
# Unsent bytes at which even what must not be missed is only counted: twice the bound at which a
# connection's requests are left unread.
CROWDED_TIMES: Final = 2


class Unasked:
    """The unasked events of one connection."""

    __slots__ = ("_lost", "_places", "_seq", "_speaker")

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self._seq = 0
        self._lost = 0
        # The latest place of each waiting request, while there is no telling it.
        self._places: dict[str, Mapping[str, object]] = {}

    def tell(self, name: str, fields: Mapping[str, object]) -> None:
        """Tell the owner, now or in short when it reads again."""
        speaker = self._speaker
        if speaker.unsent_bytes and speaker.unsent_bytes > speaker.bound_bytes:
            if name == QUEUED:
                # By the name that every wait has: a line of text may have no id.
                self._places[str(fields["queue_id"])] = fields
                return
            bound = speaker.board.options.unsent_bytes_per_connection
            if speaker.unsent_bytes > CROWDED_TIMES * bound:
                self._lost += 1
                return
        self._put(name, fields)

    def resume(self) -> None:
        """Tell what was held back, as far as it still holds."""
        if self._lost:
            lost, self._lost = self._lost, 0
            self._put(EVENTS_LOST, {"count": lost})
        if self._places:
            places, self._places = self._places, {}
            client = self._speaker.board.state.clients.get(self._speaker.number)
            requests = client.requests.values() if client is not None else ()
            waiting = {each.queue_id for each in requests if isinstance(each, Waiter)}
            for queue_id, fields in places.items():
                if queue_id in waiting:
                    self._put(QUEUED, fields)

    def _put(self, name: str, fields: Mapping[str, object]) -> None:
        self._seq += 1
        body = EventBody(name, fields, self._speaker.board.unix_s())
        self._speaker.put_event(body, None, self._seq)
