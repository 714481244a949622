"""The blocking client: a connection, its leases, and one-off questions.

A thin face on `operations`, driven by `exchange`. Nothing here waits longer than its budget: 2 s
for everything an operation does, plus the `wait_s` that a caller asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from sys import modules
from time import monotonic
from types import TracebackType
from typing import Any, Unpack

from libclient import operations
from libclient.asking import LeaseOptions, lease_fields
from libclient.decision import Decision, Event, EventHandler
from libclient.errors import NotGranted, RequestError, Unavailable
from libclient.exchange import Exchange
from libclient.framework import empty_cache
from libclient.held import Held
from libclient.policy_cache import cache_for, no_gpu_info
from libclient.tickets import ANSWER_S, Subscription
from libclient.where import SocketPath, socket_path

# As good as no limit, and small enough for poll, which counts milliseconds in 32 bits.
FOREVER_S = 2_000_000.0


class Lease(Held):
    """A lease, or the reason why there is none; see `Held` for the fields.

    A context manager: leaving it releases. It lives until `release`, the end of its connection
    or of the process, or until the daemon ends it. One that has a connection of its own ends with
    the last reference to this object; one of a client's with the last to the client.
    """

    __slots__ = ("_client", "_owned")

    def __init__(self, client: Client | None, decision: Decision, owned: bool) -> None:
        # Not through `super`: this is on the path of every lease.
        self._decision = decision
        self._client = client
        self._owned = owned

    def release(self) -> None:
        """Give the memory back; idempotent, and never raises for the daemon's part.

        Empties the cache of a framework that is loaded first. Raises ForkedClient in a child.
        """
        client = self._client
        if client is None:
            return
        try:
            client.give_back(self._decision)
        finally:
            if self._owned:
                client.close()

    def __enter__(self) -> Lease:
        """Return the lease, granted or not."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release, except in a forked child, which has nothing to release."""
        if self._client is not None and not self._client.forked:
            self.release()


class Client:
    """One connection to the daemon, for any number of threads.

    Its leases end with its `close`, or with the last reference to it and to its leases, whichever
    of them were kept. When the daemon goes away, it is found again and they go on;
    the next call connects anew in any case. Made by `connect`; a context manager.
    """

    def __init__(self, path: str, deadline_s: float) -> None:
        """Connect. Raises Unavailable."""
        self.path = path
        self.exchange = Exchange(path, deadline_s)

    @property
    def forked(self) -> bool:
        """Whether this is a forked child's useless copy."""
        return self.exchange.forked

    @property
    def closed(self) -> bool:
        """Whether there is no connection, and no lease that the library is bringing back.

        Unless that was by `close`, the next call connects anew.
        """
        return self.exchange.closed

    def fileno(self) -> int:
        """Return the connection's descriptor, -1 while there is none. It stays the client's."""
        return self.exchange.fileno()

    def call(self, op: str, *, timeout_s: float | None = None, **fields: object) -> dict[str, Any]:
        """Ask for any op of the wire contract; return the fields of the reply.

        `timeout_s` None is 2 s, plus `wait_s` where the fields have one. Raises RequestError for a
        refusal, Unavailable where no answer came. A lease asked for in this way is the caller's to
        renew and release.
        """
        if timeout_s is None:
            wait_s = fields.get("wait_s")
            timeout_s = ANSWER_S + (wait_s if isinstance(wait_s, int | float) else 0.0)
        return self._run(op, fields, timeout_s)

    def _run(self, op: str, fields: Mapping[str, object], timeout_s: float) -> dict[str, Any]:
        exchange = self.exchange
        operation = operations.call(exchange.session, op, fields)
        return exchange.run(operation, monotonic() + min(timeout_s, FOREVER_S))

    def lease(
        self,
        agent: str,
        memory: str | float | None = None,
        *,
        wait_s: float = 0,
        required: bool = False,
        on_event: EventHandler | None = None,
        **options: Unpack[LeaseOptions],
    ) -> Lease:
        """Ask for GPU memory; return a lease that says GPU or CPU, and why.

        `memory` is per GPU (`4GiB`, or MiB), None for the policy's default. Returns within
        `wait_s` + 2 s. `required` raises NotGranted in place of a CPU answer. `on_event` is called
        in the client's thread with events about this lease, the waiting included. Raises ValueError
        or TypeError for values that cannot be asked for, before anything is sent.
        """
        fields = lease_fields(agent, memory, wait_s, **options)
        exchange = self.exchange
        operation = operations.lease(exchange.session, Decision(on_event), fields, required)
        decision = exchange.run(operation, monotonic() + ANSWER_S + wait_s)
        return Lease(self, decision, False)

    def explain(
        self,
        agent: str,
        memory: str | float | None = None,
        *,
        wait_s: float = 0,
        **options: Unpack[LeaseOptions],
    ) -> dict[str, Any]:
        """Ask what `lease` would answer now; nothing changes. Raises as `call` does."""
        fields = lease_fields(agent, memory, wait_s, **options)
        return self._run("explain", fields, ANSWER_S)

    def release(self, lease: Lease | str) -> None:
        """Release a lease of this connection, given as such or by its token.

        By token it raises as `call` does; a `Lease` is released as by its own `release`.
        """
        if isinstance(lease, str):
            held = self.exchange.by_token(lease)
            if held is None:
                self.call("release", token=lease)
            else:
                self.give_back(held)
            return
        lease.release()

    def give_back(self, decision: Decision) -> None:
        """Release what a lease of this connection holds; see `Lease.release`."""
        if decision.granted and decision.ended is None:
            if "torch" in modules:
                empty_cache()
            exchange = self.exchange
            exchange.run(operations.release(exchange.session, decision), monotonic() + ANSWER_S)

    def gpu_info(self) -> dict[str, Any]:
        """Return the GPUs as the daemon sees them.

        Where none can be asked: `available` False, no `gpus`, and a `message` that says why.
        """
        try:
            return self.call("gpu_info")
        except (Unavailable, RequestError) as fault:
            return no_gpu_info(fault)

    def get_policy(self) -> dict[str, Any]:
        """Return the policy, at most GPU_ORCHESTRATOR_POLICY_TTL seconds old (30).

        `reachable` says whether it is the daemon's; where not, `safe_mode` is True.
        """
        cache = cache_for(self.path)
        document = cache.get(monotonic())
        if document is not None:
            return document
        try:
            reply: dict[str, Any] | str = self.call("policy_get")
        except (Unavailable, RequestError) as fault:
            reply = str(fault)
        return cache.put(reply, monotonic())

    def events(self, topics: Sequence[str] | None = None) -> EventStream:
        """Subscribe; return an iterator over the events. Raises as `call` does."""
        operation = operations.subscribe(self.exchange.session, topics)
        return EventStream(self, self.exchange.run(operation, monotonic() + ANSWER_S))

    def close(self) -> None:
        """Close the connection; every lease and wait of it ends. Idempotent."""
        self.exchange.close()

    def __enter__(self) -> Client:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


class EventStream(Iterator[Event]):
    """The events of one subscription, as maps. Waits for the next as long as it takes.

    Events that were not taken in time are dropped, and `events.lost` with their `count` comes in
    their place. Where the daemon was restarted, `daemon.resumed` or `connection.resumed` says that
    some may be missing. Raises Unavailable once the connection is gone for good. A context manager.
    """

    def __init__(self, client: Client, subscription: Subscription) -> None:
        self._exchange = client.exchange
        self._subscription = subscription

    def __next__(self) -> Event:
        """Return the next event."""
        return self.next()

    def next(self, timeout_s: float = FOREVER_S) -> Event:
        """Return the next event. Raises Unavailable (TIMEOUT) if none comes in time.

        A time of more than three weeks is cut to that.
        """
        operation = operations.next_event(self._exchange.session, self._subscription)
        return self._exchange.run(operation, monotonic() + min(timeout_s, FOREVER_S))

    def close(self) -> None:
        """End the subscription; the connection stays. Idempotent."""
        operation = operations.unsubscribe(self._exchange.session, self._subscription)
        self._exchange.run(operation, monotonic() + ANSWER_S)

    def __enter__(self) -> EventStream:
        """Return the stream."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the subscription."""
        self.close()


def connect(socket: SocketPath | None = None, *, timeout_s: float = ANSWER_S) -> Client:
    """Connect to the daemon at `socket` (else GPUORCH_SOCKET, else the default path).

    Raises Unavailable, with the reason, if that takes longer than `timeout_s` or cannot be.
    """
    return Client(socket_path(socket), monotonic() + timeout_s)


def lease(
    agent: str,
    memory: str | float | None = None,
    *,
    socket: SocketPath | None = None,
    required: bool = False,
    wait_s: float = 0,
    on_event: EventHandler | None = None,
    **options: Unpack[LeaseOptions],
) -> Lease:
    """Ask for a lease on a connection of its own, which its end closes.

    The arguments and the result are those of `Client.lease`; without a daemon the lease is for the
    CPU too. Connecting is part of the 2 s.
    """
    asked = lease_fields(agent, memory, wait_s, **options)
    start_s = monotonic()
    try:
        client = connect(socket)
    except Unavailable as fault:
        if required:
            raise NotGranted(fault.reason, fault.detail) from None
        decision = Decision(on_event)
        decision.refuse(fault.reason, fault.detail)
        return Lease(None, decision, True)
    try:
        operation = operations.lease(client.exchange.session, Decision(on_event), asked, required)
        decision = client.exchange.run(operation, start_s + ANSWER_S + wait_s)
    except BaseException:
        # Whatever was granted meanwhile ends with the connection.
        client.close()
        raise
    if not decision.live:
        client.close()
    return Lease(client, decision, True)


def gpu_info(socket: SocketPath | None = None) -> dict[str, Any]:
    """Return what `Client.gpu_info` returns, on a connection of its own, within 2 s in all."""
    start_s = monotonic()
    try:
        with connect(socket) as client:
            return client.call("gpu_info", timeout_s=start_s + ANSWER_S - monotonic())
    except (Unavailable, RequestError) as fault:
        return no_gpu_info(fault)


def get_policy(socket: SocketPath | None = None) -> dict[str, Any]:
    """Return what `Client.get_policy` returns, within 2 s in all; cached for the whole process."""
    path = socket_path(socket)
    cache = cache_for(path)
    start_s = monotonic()
    document = cache.get(start_s)
    if document is not None:
        return document
    try:
        with connect(path) as client:
            reply: dict[str, Any] | str = client.call(
                "policy_get", timeout_s=start_s + ANSWER_S - monotonic()
            )
    except (Unavailable, RequestError) as fault:
        reply = str(fault)
    return cache.put(reply, monotonic())
