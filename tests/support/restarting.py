"""A daemon that is killed at the test's word, again and again, for tests of its clients.

It does by its connections and leases what the contract says of a restart. One thread serves all
connections. A kill strikes between any two reads of it: some requests are then carried out without
an answer, as those of a process that died in between. With `keep` the connections outlive it, as
with a descriptor store; without, they are lost and leases wait to be reattached. It has endless
memory. What breaks the contract fails it, and the test at its `close`.
"""

from __future__ import annotations

import queue
import random
import selectors
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack

from libclient.wire.framing import MAX_REQUEST_BYTES, FrameSplitter, frame
from tests.support.proxy import DEADLINE_S, grant_fields, wait_for

NONCE_BYTES = 16


class Held:
    """One connection, and what outlives the process of it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.splitter = FrameSplitter(MAX_REQUEST_BYTES)
        # What has to come before anything counts.
        self.marker = b""
        self.before_marker = b""
        self.seq = 0
        self.outcomes: dict[int, dict[str, Any]] = {}

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; to one that is gone, nothing."""
        try:
            self.sock.sendall(frame(msgpack.packb(message)))
        except OSError:
            # Its end is read in its turn.
            pass


class RestartingDaemon:
    """See the head of this file. A context manager; `seed` chooses what is cut off when."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = str(folder / "again.sock")
        self.served = 0
        self.failures: list[BaseException] = []
        self.leases: dict[str, Held] = {}
        self.detached: set[str] = set()
        self.answered_before = 0
        self._random = random.Random(seed)
        self._number = 0
        self._conns: set[Held] = set()
        self._kills: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._killed = threading.Semaphore(0)
        self._ear, self._mouth = socket.socketpair()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="restarting-daemon")
        self._thread.start()

    def kill(self, *, keep: bool) -> None:
        """End the process; the next one is there at once."""
        self._kills.put(keep)
        self._mouth.send(b"k")
        assert self._killed.acquire(timeout=DEADLINE_S)

    def wait_until_served(self, more: int) -> None:
        """Wait until so many more requests were answered."""
        until = self.served + more
        wait_for(lambda: bool(self.failures) or self.served >= until, f"{more} answers")

    def wait_until_settled(self, tokens: set[str | None]) -> None:
        """Wait until these leases are held and no others.

        Those that nobody reattached do not count: a grace ends them.
        """
        wait_for(
            lambda: bool(self.failures) or set(self.leases) == tokens,
            f"{len(tokens)} leases, not {len(self.leases)}",
        )

    def close(self) -> None:
        """End it for good; raise what it failed with."""
        self._kills.put(None)
        self._mouth.send(b"k")
        self._thread.join(DEADLINE_S)
        for conn in self._conns:
            conn.sock.close()
        for sock in (self._listener, self._ear, self._mouth):
            sock.close()
        self._selector.close()
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

    # -- the thread

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._ear:
                        self._ear.recv(1)
                        keep = self._kills.get()
                        if keep is None:
                            return
                        self._be_killed(keep)
                        self._killed.release()
                        # What was ready then is of another process.
                        break
                    if key.fileobj is self._listener:
                        conn = Held(self._listener.accept()[0])
                        self._conns.add(conn)
                        self._selector.register(conn.sock, selectors.EVENT_READ, conn)
                    else:
                        self._read(key.data, answering=True)
        except BaseException as fault:
            # Whatever it is, it is the test's to see, in the thread that asserts.
            self.failures.append(fault)
            self._killed.release()

    def _be_killed(self, keep: bool) -> None:
        for conn in list(self._conns):
            if self._random.random() < 0.5:
                self._read(conn, answering=False)
            if conn not in self._conns:
                continue
            if not keep:
                self._forget(conn, detach=True)
                continue
            nonce = self._random.randbytes(NONCE_BYTES)
            conn.marker = b"\xff" * 4 + nonce
            conn.before_marker = b""
            conn.splitter = FrameSplitter(MAX_REQUEST_BYTES)
            conn.send(
                {"event": "daemon.resumed", "seq": 1, "time": 0.0, "epoch": "e", "nonce": nonce}
            )
            if conn.outcomes and self._random.random() < 0.3:
                self._answer_early(conn)

    def _answer_early(self, conn: Held) -> None:
        """Answer a request that waited, before it is asked for again: it is answered twice."""
        last_id = max(conn.outcomes)
        if not conn.outcomes[last_id].pop("unanswered", False):
            return
        self.answered_before += 1
        conn.send(conn.outcomes[last_id])

    def _read(self, conn: Held, *, answering: bool) -> None:
        try:
            data = conn.sock.recv(65_536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(conn, detach=False)
            return
        if conn.marker:
            conn.before_marker += data
            if conn.marker not in conn.before_marker:
                return
            data = conn.before_marker.partition(conn.marker)[2]
            conn.marker = conn.before_marker = b""
        conn.splitter.feed(data)
        while (payload := conn.splitter.next_frame()) is not None:
            request = msgpack.unpackb(payload)
            reply = conn.outcomes.get(request["id"])
            if reply is None:
                reply = {"id": request["id"], **self._carry_out(conn, request)}
                conn.outcomes[request["id"]] = reply
                if not answering:
                    reply["unanswered"] = True
            if answering:
                reply.pop("unanswered", None)
                conn.send(reply)
                self.served += 1

    def _carry_out(self, conn: Held, request: dict[str, Any]) -> dict[str, Any]:
        token = request.get("token", "")
        match request["op"]:
            case "lease":
                self._number += 1
                fields = grant_fields(self._number)
                self.leases[fields["token"]] = conn
                return {"ok": True, **fields}
            case "release" if self.leases.get(token) is conn:
                del self.leases[token]
                return {"ok": True, "released": True, "token": token}
            case "reattach" if token in self.detached:
                self.detached.remove(token)
                self.leases[token] = conn
                return {"ok": True, **grant_fields(int(token.rpartition("-")[2]))}
            case "release" | "reattach":
                error = {"code": "unknown_token", "message": "no such lease", "retryable": False}
                return {"ok": False, "error": error}
            case _:
                return {"ok": True}

    def _forget(self, conn: Held, *, detach: bool) -> None:
        held = [token for token, holder in self.leases.items() if holder is conn]
        for token in held:
            del self.leases[token]
        if detach:
            self.detached.update(held)
        self._selector.unregister(conn.sock)
        self._conns.discard(conn)
        conn.sock.close()
