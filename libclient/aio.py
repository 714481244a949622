"""The asyncio client: the same names as the blocking one, to be awaited.

What takes time is both awaitable and an async context manager:

    async with libclient.aio.lease("analyst", "2GiB") as lease: ...
    client = await libclient.aio.connect()

Cancelling a task that waits for a lease gives the lease back, whether or not it was granted
meanwhile. A client belongs to the loop it was made on.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Unpack

from libclient import operations
from libclient.asking import LeaseOptions, lease_fields
from libclient.decision import Decision, Event, EventHandler
from libclient.drive_async import drive
from libclient.errors import ForkedClient, NotGranted, RequestError, Unavailable
from libclient.framework import empty_cache
from libclient.held import Held
from libclient.link_async import AsyncLink
from libclient.opening import Opening
from libclient.policy_cache import cache_for, no_gpu_info
from libclient.tickets import ANSWER_S, Subscription
from libclient.where import socket_path

# As good as no limit.
FOREVER_S = 2_000_000.0


class AsyncLease(Held):
    """A lease, or the reason why there is none; see `Held` for the fields.

    It lives until `release`, the end of its connection or of the process, or until the daemon ends
    it. One that has a connection of its own ends with the last reference to this object; one of a
    client's with the last to the client.
    """

    __slots__ = ("_client", "_owned")

    def __init__(self, client: AsyncClient | None, decision: Decision, owned: bool) -> None:
        super().__init__(decision)
        self._client = client
        self._owned = owned

    async def release(self) -> None:
        """Give the memory back; idempotent, and never raises for the daemon's part.

        Empties the cache of a framework that is loaded first. Raises ForkedClient in a child.
        """
        client = self._client
        if client is None:
            return
        if client.link.forked:
            raise ForkedClient
        try:
            await client.give_back(self._decision)
        finally:
            if self._owned:
                client.close()

    async def aclose(self) -> None:
        """Release, except in a forked child, which has nothing to release."""
        if self._client is not None and not self._client.link.forked:
            await self.release()

    async def __aenter__(self) -> AsyncLease:
        """Return the lease, granted or not."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release."""
        await self.aclose()


class AsyncClient:
    """One connection to the daemon, for any number of tasks of one loop.

    Its leases end with its `close`, or with the last reference to it and to its leases, whichever
    of them were kept. When the daemon goes away, it is found again and they go on;
    the next call connects anew in any case. Made by `connect`.
    """

    def __init__(self, path: str, link: AsyncLink) -> None:
        self.path = path
        self.link = link

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        """Close what nobody can use any more, in the loop's own time."""
        link = self.link
        if link.closed:
            return
        warn(f"unclosed {self!r} of {self.path}", ResourceWarning, source=self)
        if link.loop.is_closed():
            link.sock.close()
        else:
            # Whichever thread this is: the collector runs in any.
            link.loop.call_soon_threadsafe(link.close)

    @property
    def closed(self) -> bool:
        """Whether there is no connection, and no lease that the library is bringing back.

        Unless that was by `close`, the next call connects anew.
        """
        return self.link.closed

    def fileno(self) -> int:
        """Return the connection's descriptor, -1 while there is none. It stays the client's."""
        return self.link.sock.fileno()

    async def call(
        self, op: str, *, timeout_s: float | None = None, **fields: object
    ) -> dict[str, Any]:
        """Ask for any op of the wire contract; return the fields of the reply.

        `timeout_s` None is 2 s, plus `wait_s` where the fields have one. Raises RequestError for a
        refusal, Unavailable where no answer came.
        """
        if timeout_s is None:
            wait_s = fields.get("wait_s")
            timeout_s = ANSWER_S + (wait_s if isinstance(wait_s, int | float) else 0.0)
        return await drive(
            self.link, operations.call(self.link.session, op, fields), min(timeout_s, FOREVER_S)
        )

    def lease(
        self,
        agent: str,
        memory: str | float | None = None,
        *,
        wait_s: float = 0,
        required: bool = False,
        on_event: EventHandler | None = None,
        **options: Unpack[LeaseOptions],
    ) -> Opening[AsyncLease]:
        """Ask for GPU memory; the lease says GPU or CPU, and why.

        Arguments and outcomes are those of the blocking `Client.lease`. `on_event` is called by
        the loop.
        """
        fields = lease_fields(agent, memory, wait_s, **options)
        session = self.link.session

        async def ask() -> AsyncLease:
            operation = operations.lease(session, Decision(on_event), fields, required)
            return AsyncLease(self, await drive(self.link, operation, ANSWER_S + wait_s), False)

        return Opening(ask)

    async def explain(
        self,
        agent: str,
        memory: str | float | None = None,
        *,
        wait_s: float = 0,
        **options: Unpack[LeaseOptions],
    ) -> dict[str, Any]:
        """Ask what `lease` would answer now; takes what it takes, and changes nothing."""
        asked = lease_fields(agent, memory, wait_s, **options)
        return await self.call("explain", timeout_s=ANSWER_S, **asked)

    async def release(self, lease: AsyncLease | str) -> None:
        """Release a lease of this connection, given as such or by its token.

        By token it raises as `call` does; an `AsyncLease` is released as by its own `release`.
        """
        if isinstance(lease, str):
            held = self.link.session.by_token(lease)
            if held is None:
                await self.call("release", token=lease)
            else:
                await self.give_back(held)
            return
        await lease.release()

    async def give_back(self, decision: Decision) -> None:
        """Release what a lease of this connection holds; see `AsyncLease.release`."""
        if decision.live:
            empty_cache()
            await drive(self.link, operations.release(self.link.session, decision), ANSWER_S)

    async def gpu_info(self) -> dict[str, Any]:
        """Return the GPUs as the daemon sees them; falls back as the blocking client does."""
        try:
            return await self.call("gpu_info")
        except (Unavailable, RequestError) as fault:
            return no_gpu_info(fault)

    async def get_policy(self) -> dict[str, Any]:
        """Return the policy; cached, and falls back, as the blocking client does."""
        cache = cache_for(self.path)
        document = cache.get(monotonic())
        if document is not None:
            return document
        try:
            reply: dict[str, Any] | str = await self.call("policy_get")
        except (Unavailable, RequestError) as fault:
            reply = str(fault)
        return cache.put(reply, monotonic())

    def events(self, topics: Sequence[str] | None = None) -> AsyncEventStream:
        """Return an async iterator over events; it subscribes when it is first asked."""
        return AsyncEventStream(self, topics)

    def close(self) -> None:
        """Close the connection; every lease and wait of it ends. Idempotent."""
        self.link.close()

    async def aclose(self) -> None:
        """Close."""
        self.close()

    async def __aenter__(self) -> AsyncClient:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


class AsyncEventStream(AsyncIterator[Event]):
    """The events of one subscription, as maps; see the blocking `EventStream`."""

    def __init__(self, client: AsyncClient, topics: Sequence[str] | None) -> None:
        # The client, too: its connection ends with the last who knows it.
        self._client = client
        self._link = client.link
        self._topics = topics
        self._subscription: Subscription | None = None

    async def open(self) -> None:
        """Subscribe now, where events from this moment on are wanted. Raises as `call` does."""
        if self._subscription is None:
            operation = operations.subscribe(self._link.session, self._topics)
            self._subscription = await drive(self._link, operation, ANSWER_S)

    async def __anext__(self) -> Event:
        """Return the next event. Raises Unavailable once the connection is gone."""
        await self.open()
        assert self._subscription is not None
        operation = operations.next_event(self._link.session, self._subscription)
        return await drive(self._link, operation, FOREVER_S)

    async def aclose(self) -> None:
        """End the subscription; the connection stays. Idempotent."""
        if self._subscription is not None:
            operation = operations.unsubscribe(self._link.session, self._subscription)
            await drive(self._link, operation, ANSWER_S)

    async def __aenter__(self) -> AsyncEventStream:
        """Subscribe."""
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the subscription."""
        await self.aclose()


def connect(socket: str | None = None, *, timeout_s: float = ANSWER_S) -> Opening[AsyncClient]:
    """Connect to the daemon at `socket` (else GPUORCH_SOCKET, else the default path).

    Raises Unavailable, with the reason, if that takes longer than `timeout_s` or cannot be.
    """
    return Opening(lambda: _connect(socket_path(socket), timeout_s))


async def _connect(path: str, timeout_s: float) -> AsyncClient:
    link = AsyncLink(path)
    await link.connect(monotonic() + timeout_s)
    return AsyncClient(path, link)


def lease(
    agent: str,
    memory: str | float | None = None,
    *,
    socket: str | None = None,
    required: bool = False,
    wait_s: float = 0,
    on_event: EventHandler | None = None,
    **options: Unpack[LeaseOptions],
) -> Opening[AsyncLease]:
    """Ask for a lease on a connection of its own, which its end closes.

    The arguments and the result are those of `AsyncClient.lease`; without a daemon the lease is for
    the CPU too. Connecting is part of the 2 s.
    """
    asked = lease_fields(agent, memory, wait_s, **options)
    path = socket_path(socket)

    async def ask() -> AsyncLease:
        end_s = monotonic() + ANSWER_S + wait_s
        try:
            client = await _connect(path, ANSWER_S)
        except Unavailable as fault:
            if required:
                raise NotGranted(fault.reason, fault.detail) from None
            decision = Decision(on_event)
            decision.refuse(fault.reason, fault.detail)
            return AsyncLease(None, decision, True)
        try:
            operation = operations.lease(client.link.session, Decision(on_event), asked, required)
            decision = await drive(client.link, operation, end_s - monotonic())
        except BaseException:
            # Whatever was granted meanwhile ends with the connection.
            client.close()
            raise
        if not decision.live:
            client.close()
        return AsyncLease(client, decision, True)

    return Opening(ask)


async def gpu_info(socket: str | None = None) -> dict[str, Any]:
    """Return what `AsyncClient.gpu_info` returns, on a connection of its own, within 2 s in all."""
    try:
        return await _ask_once(socket_path(socket), "gpu_info")
    except (Unavailable, RequestError) as fault:
        return no_gpu_info(fault)


async def get_policy(socket: str | None = None) -> dict[str, Any]:
    """Return what `AsyncClient.get_policy` returns, within 2 s in all."""
    path = socket_path(socket)
    cache = cache_for(path)
    document = cache.get(monotonic())
    if document is not None:
        return document
    try:
        reply: dict[str, Any] | str = await _ask_once(path, "policy_get")
    except (Unavailable, RequestError) as fault:
        reply = str(fault)
    return cache.put(reply, monotonic())


async def _ask_once(path: str, op: str) -> dict[str, Any]:
    end_s = monotonic() + ANSWER_S
    async with connect(path) as client:
        return await client.call(op, timeout_s=max(0.0, end_s - monotonic()))
