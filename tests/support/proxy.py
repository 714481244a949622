"""Daemons that misbehave, and a proxy that can be made to, for tests of the client.

`FakeDaemon` listens on a Unix socket and runs a script for each connection, in a thread. The script
reads requests and answers, or does not. It ends when the connection does, and `close` ends both.
`Proxy` stands between a client and a real daemon; it passes bytes on until it is told to stop.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack

from libclient.wire.framing import MAX_REQUEST_BYTES, FrameSplitter, frame

# Nothing here takes this long; it keeps a failing test from hanging.
DEADLINE_S = 20.0


def grant_fields(number: int = 1, **changes: object) -> dict[str, Any]:
    """Return what a daemon answers to a `lease` that it grants."""
    return {
        "granted": True,
        "agent": "analyst",
        "lease_id": f"L{number}",
        "token": f"secret-{number}",
        "gpu": 0,
        "gpus": [{"index": 0, "uuid": "GPU-0", "memory_mb": 2_048}],
        "timestamp": 1_000.0,
        "waited_s": 0.0,
        "expires_at": None,
        "enforcement": "advisory",
        "env": {"CUDA_VISIBLE_DEVICES": "GPU-0"},
        **changes,
    }


def denial_fields(note: str = "INSUFFICIENT_MEMORY") -> dict[str, Any]:
    """Return what a daemon answers to a `lease` that it does not grant."""
    reasons = [{"gpu": 0, "reason": note, "detail": "needs 2048 MiB, 512 MiB free"}]
    return {
        "granted": False,
        "agent": "analyst",
        "gpu": None,
        "note": note,
        "reasons": reasons,
        "eta_s": 1.5,
    }


class Hangup(Exception):
    """The client closed the connection."""


class Served:
    """One connection of a fake daemon, as its script sees it."""

    def __init__(self, sock: socket.socket, seen: list[dict[str, Any]]) -> None:
        self.sock = sock
        self._seen = seen
        self._splitter = FrameSplitter(MAX_REQUEST_BYTES)
        self._seq = 0

    def request(self) -> dict[str, Any]:
        """Return the next request. Raises `Hangup` at the end."""
        while (payload := self._splitter.next_frame()) is None:
            data = self.sock.recv(65_536)
            if not data:
                raise Hangup
            self._splitter.feed(data)
        request: dict[str, Any] = msgpack.unpackb(payload)
        self._seen.append(request)
        return request

    def expect(self, op: str) -> dict[str, Any]:
        """Return the next request, which has to be this one."""
        request = self.request()
        assert request["op"] == op, f"{request['op']} came in place of {op}"
        return request

    def send(self, **message: object) -> None:
        """Send any message."""
        self.sock.sendall(frame(msgpack.packb(message)))

    def reply(self, request: dict[str, Any], **fields: object) -> None:
        """Answer a request."""
        self.send(id=request["id"], ok=True, **fields)

    def refuse(
        self, request: dict[str, Any], code: str, message: str = "no", *, retryable: bool = False
    ) -> None:
        """Answer a request with an error."""
        error = {"code": code, "message": message, "retryable": retryable}
        self.send(id=request["id"], ok=False, error=error)

    def event(self, name: str, **fields: object) -> None:
        """Send an event about the connection's own leases."""
        self._seq += 1
        self.send(event=name, seq=self._seq, time=1_000.0, **fields)

    def take_over(self, number: int = 1) -> bytes:
        """Go on as the daemon's next process would; return what it discards before the marker.

        `number` tells one nonce from another.
        """
        self._seq = 0
        nonce = bytes([number]) * 16
        self.event("daemon.resumed", epoch="e1", nonce=nonce)
        marker = b"\xff\xff\xff\xff" + nonce
        data = b""
        while marker not in data:
            more = self.sock.recv(65_536)
            if not more:
                raise Hangup
            data += more
        discarded, _, rest = data.partition(marker)
        self._splitter = FrameSplitter(MAX_REQUEST_BYTES)
        self._splitter.feed(rest)
        return discarded

    def wait_for_end(self) -> None:
        """Read on until the client closes; what it asks for is seen, and not answered."""
        while True:
            self.request()


Script = Callable[[Served], None]


def grant_everything(conn: Served, held: int = 0) -> None:
    """Answer as a daemon with endless memory would, of which so many leases are held already."""
    number = held
    while True:
        request = conn.request()
        if request["op"] == "lease":
            number += 1
            conn.reply(request, **grant_fields(number))
        else:
            conn.reply(request)


class FakeDaemon:
    """A listening socket and a script for every connection. A context manager.

    Of several scripts each connection gets the next one, and the last serves all that follow. In a
    folder where one was closed, another is what a client finds after a restart.
    """

    def __init__(self, folder: Path, *scripts: Script) -> None:
        self.path = str(folder / "fake.sock")
        Path(self.path).unlink(missing_ok=True)
        self.requests: list[dict[str, Any]] = []
        # What a script failed with: raised by `close`, so that a test cannot miss it.
        self.failures: list[BaseException] = []
        self._scripts = scripts or (grant_everything,)
        self._conns: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept, name="fake-daemon")
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._closing:
                sock.close()
                return
            script = self._scripts[min(len(self._conns), len(self._scripts) - 1)]
            self._conns.append(sock)
            thread = threading.Thread(
                target=self._serve, args=(sock, script), name="fake-connection"
            )
            thread.start()
            self._threads.append(thread)

    def _serve(self, sock: socket.socket, script: Script) -> None:
        try:
            script(Served(sock, self.requests))
        except (Hangup, ConnectionError):
            pass
        except BaseException as fault:
            # Whatever it is, it is the test's to see, in the thread that asserts.
            self.failures.append(fault)
        finally:
            sock.close()

    def ops(self) -> list[str]:
        """Return the ops that were asked for, in order, over all connections."""
        return [request["op"] for request in self.requests]

    def wait_for_op(self, op: str, count: int = 1) -> None:
        """Wait until an op was asked for that often."""
        wait_for(lambda: self.ops().count(op) >= count, f"{count} {op}, of {self.ops()}")

    def wait_for_hangup(self, deadline_s: float = DEADLINE_S) -> None:
        """Wait until there was a connection, and all that there were have ended."""
        wait_for(
            lambda: bool(self._threads) and not any(t.is_alive() for t in list(self._threads)),
            "the client to close its connection",
            deadline_s,
        )

    def close(self) -> None:
        """End all connections and scripts; raise what a script failed with."""
        self._closing = True
        # A thread in accept does not wake for a close; for a shutdown it does.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(DEADLINE_S)
        self._listener.close()
        for sock in self._conns:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                # Its script is done with it.
                pass
        for thread in self._threads:
            thread.join(DEADLINE_S)
        if self.failures:
            raise self.failures[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Proxy:
    """Passes bytes between clients and a real daemon, until it is told not to. A context manager.

    While `stopped`, it accepts and reads, and passes nothing on: what a client sees of a daemon
    that hangs. `cut` ends every connection.
    """

    def __init__(self, folder: Path, upstream: str) -> None:
        self.path = str(folder / "proxy.sock")
        self._upstream = upstream
        self._flowing = threading.Event()
        self._flowing.set()
        self._socks: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._start(self._accept)

    def stop(self) -> None:
        """Pass nothing on from now."""
        self._flowing.clear()

    def resume(self) -> None:
        """Pass on what was held back, and what follows."""
        self._flowing.set()

    def cut(self) -> None:
        """End every connection, on both sides."""
        for sock in self._socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                # Ended already.
                pass

    def close(self) -> None:
        """End everything."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self.resume()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        for sock in self._socks:
            sock.close()

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name="proxy")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            daemon = socket.socket(socket.AF_UNIX)
            daemon.connect(self._upstream)
            self._socks += [client, daemon]
            self._start(self._pump, client, daemon)
            self._start(self._pump, daemon, client)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                self._flowing.wait(DEADLINE_S)
                target.sendall(data)
        except OSError:
            # Either end is gone; the other hears of it below.
            pass
        try:
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            # Gone as well.
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition that no descriptor announces; fail naming it after the deadline."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)
