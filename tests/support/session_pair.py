"""The client's session and a daemon's end of the same conversation, back to back, without sockets.

Bytes that the session wants to send are handed to the daemon's end, which decodes them; what the
daemon's end says is fed to the session in one piece, or cut as the test likes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import msgpack
import pytest

from libclient import operations, resume
from libclient.decision import Decision, Event
from libclient.session import Session
from libclient.tickets import Ticket
from libclient.wire.framing import MAX_REQUEST_BYTES, FrameSplitter, frame
from tests.support.proxy import grant_fields


class SessionPair:
    """Both ends. Time stands still until the test moves it."""

    def __init__(self) -> None:
        self.session = Session()
        self.now_s = 100.0
        self._splitter = FrameSplitter(MAX_REQUEST_BYTES)
        self._seq = 0

    def asked(self) -> list[dict[str, Any]]:
        """Carry over what the session sends; return the requests in it."""
        self._splitter.feed(self.session.outgoing)
        self.session.outgoing = b""
        found = []
        while (payload := self._splitter.next_frame()) is not None:
            found.append(msgpack.unpackb(payload))
        return found

    def resume(self, number: int = 1, changes: dict[str, object] | None = None) -> None:
        """Say that the daemon's next process has the connection. `number` makes the nonce."""
        self._seq = 0
        fields = {"epoch": "e1", "nonce": bytes([number]) * 16, **(changes or {})}
        self.send(self.event("daemon.resumed", **fields))

    def asked_again(self, number: int = 1) -> list[dict[str, Any]]:
        """Carry over what is sent, which has to begin with the marker; return the requests."""
        marker = b"\xff" * 4 + bytes([number]) * 16
        assert self.session.outgoing.startswith(marker)
        self.session.outgoing = self.session.outgoing[len(marker) :]
        self.reset()
        return self.asked()

    @staticmethod
    def decode(payload: bytes) -> dict[str, Any]:
        """Return a request as the daemon's end reads it."""
        request: dict[str, Any] = msgpack.unpackb(payload)
        return request

    def reset(self) -> None:
        """Forget the half of a request that another process had read."""
        self._splitter = FrameSplitter(MAX_REQUEST_BYTES)

    def rejoin(self) -> list[dict[str, Any]]:
        """Give the session a new connection; return what it asks there at once."""
        resume.rejoin(self.session, self.now_s)
        self.reset()
        self._seq = 0
        return self.asked()

    def at_rest(self) -> bool:
        """Whether nothing is held and nothing is to come."""
        return not self.session.expects_input

    def feed(self, data: bytes) -> None:
        """Give the session bytes."""
        self.session.feed(data, self.now_s)

    def send(self, *messages: dict[str, Any]) -> None:
        """Say these messages, in one piece."""
        self.feed(b"".join(frame(msgpack.packb(message)) for message in messages))

    def send_in_pieces(self, messages: Iterable[dict[str, Any]], sizes: Iterable[int]) -> None:
        """Say these messages, cut into pieces of these sizes and the rest."""
        data = b"".join(frame(msgpack.packb(message)) for message in messages)
        for size in sizes:
            if data:
                self.feed(data[:size])
                data = data[size:]
        if data:
            self.feed(data)

    def event(self, name: str, **fields: object) -> dict[str, Any]:
        """Return an event about the connection's own leases, with its `seq`."""
        self._seq += 1
        return {"event": name, "seq": self._seq, "time": 1_000.0, **fields}


def ok(request: dict[str, Any], **fields: object) -> dict[str, Any]:
    """Return the answer to a request."""
    return {"id": request["id"], "ok": True, **fields}


def refused(request: dict[str, Any], code: str) -> dict[str, Any]:
    """Return the refusal of a request."""
    error = {"code": code, "message": "no", "retryable": False}
    return {"id": request["id"], "ok": False, "error": error}


def result_of(operation: Generator[Ticket, None, Any]) -> Any:
    """Resume an operation whose answer is here; return what it returns."""
    with pytest.raises(StopIteration) as end:
        operation.send(None)
    return end.value.value


class Asked:
    """A lease that was asked for and not answered."""

    def __init__(self, pair: SessionPair, *, required: bool = False, **fields: object) -> None:
        self.events: list[Event] = []
        self.decision = Decision(self.events.append)
        self.operation = operations.lease(
            pair.session, self.decision, {"agent": "analyst", **fields}, required
        )
        self.ticket = self.operation.send(None)
        (self.request,) = pair.asked()


def held_lease(pair: SessionPair, number: int = 1, **changes: object) -> Asked:
    """Ask for a lease and grant it."""
    asked = Asked(pair)
    pair.send(ok(asked.request, **grant_fields(number, **changes)))
    assert asked.ticket.done
    return asked


def tell(pair: SessionPair) -> None:
    """Call the handlers that are to be called."""
    for handler, event in pair.session.notices:
        handler(event)
    pair.session.notices.clear()
