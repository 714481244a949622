"""The state machine: every event comes in here, and every effect goes out.

`handle` is the whole interface that changes anything: an event and the time in, effects out, in
the order in which they are to be carried out. Handlers for leases are here, by the event's type,
the rest is beside it: `placement` (where to), `leases` (their life), `drain` (their end), `serving`
(the queue), `settings` (policy, cordons). After each event those who wait are served if they can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpuorchd.core import (
    asking,
    bounds,
    drain,
    inventory,
    leases,
    placement,
    recovery,
    serving,
    snapshot,
)
from gpuorchd.core import settings as settings_room
from gpuorchd.core.asking import STOPPING
from gpuorchd.core.effects import Announce, Answer, AnswerError, Effect
from gpuorchd.core.events import (
    CancelAsked,
    ClientArrived,
    ClientLeft,
    ClientsGreeted,
    ConfigurationRead,
    CordonAsked,
    DevicesFound,
    DevicesLost,
    Event,
    LeaseAsked,
    PolicyChangeAsked,
    ProcessEnded,
    ReadingsTaken,
    ReattachAsked,
    ReleaseAsked,
    RenewAsked,
    RequestRepeated,
    Restored,
    RevokeAsked,
    SealAsked,
    SealTold,
    SettingsPersisted,
    StopAsked,
    TimePassed,
)
from gpuorchd.core.model import (
    NS_PER_S,
    Ask,
    Client,
    Code,
    ConnectionId,
    Denial,
    Lease,
    LeaseId,
    LeaseState,
    Note,
    Peer,
    Refusal,
    RequestId,
    Token,
    Waiter,
)
from gpuorchd.core.placement import Plan
from gpuorchd.core.policy import DEFAULT, Policy
from gpuorchd.core.state import Settings, State

# Why a lease is over whose connection or process has ended.
GONE = "disconnected"


class Machine:
    """All decisions of the daemon. Deterministic: same events and times, same effects."""

    def __init__(
        self,
        settings: Settings,
        *,
        policy: Policy = DEFAULT,
        revision: int = 1,
        safe_mode: bool = False,
        cordons: Mapping[str, str] | None = None,
    ) -> None:
        self.state = State(
            settings,
            policy,
            revision=revision,
            safe_mode=safe_mode,
            probing=not safe_mode,
            cordons=dict(cordons or {}),
        )
        self._desk = settings_room.Desk()
        self._handlers: dict[type, Callable[[Any, int, list[Effect]], None]] = {
            LeaseAsked: self._lease,
            ReleaseAsked: self._release,
            RenewAsked: self._renew,
            CancelAsked: self._cancel,
            SealAsked: self._seal,
            SealTold: self._seal_told,
            ReattachAsked: self._reattach,
            RequestRepeated: self._repeat,
            Restored: self._restore,
            ClientsGreeted: self._tell_owners,
            RevokeAsked: self._revoke,
            ClientArrived: self._arrive,
            ClientLeft: self._leave,
            ProcessEnded: self._process_ended,
            ReadingsTaken: self._readings,
            DevicesFound: self._devices_found,
            DevicesLost: self._devices_lost,
            CordonAsked: self._change_settings,
            PolicyChangeAsked: self._change_settings,
            SettingsPersisted: self._persisted,
            ConfigurationRead: self._configure,
            TimePassed: self._time_passed,
            StopAsked: self._stop,
        }

    def handle(self, event: Event, now_ns: int, unix_ns: int = 0) -> list[Effect]:
        """Take in one event; return what is to be done, in order.

        `unix_ns` is the same moment in unix time, which no decision depends on.
        """
        self.state.unix_offset_ns = unix_ns - now_ns
        out: list[Effect] = []
        self._handlers[type(event)](event, now_ns, out)
        state = self.state
        while state.unsettled:
            if state.waiters:
                serving.serve(state, now_ns, out)
            else:
                serving.nobody_waits(state)
        # With the answers that are held back: yet another daemon has to give them.
        commit = snapshot.changes(state, out) if state.settings.keeps else None
        if state.unrepeated:
            out = recovery.hold_back(state, out)
        if commit is not None:
            # What is promised is recorded first.
            out.insert(0, commit)
        return out

    def next_deadline_ns(self) -> int | None:
        """When `TimePassed` is to be said next, None where nothing is pending."""
        return self.state.deadlines.next_ns()

    def explain(
        self, peer: Peer, ask: Ask, now_ns: int, conn: ConnectionId | None = None
    ) -> Plan | Denial | Refusal:
        """Decide what `lease` would answer `conn` now, by the same code; change nothing."""
        return asking.explain(self.state, peer, ask, now_ns, conn)

    def _lease(self, event: LeaseAsked, now_ns: int, out: list[Effect]) -> None:
        state = self.state
        ask = event.ask
        client = state.clients[event.conn]
        refusal = asking.refusal(state, client, ask)
        if refusal is not None:
            out.append(AnswerError(event.conn, event.request_id, refusal))
            return
        priority = state.policy.priority(state.policy.rule(ask.agent), ask.priority)
        found = placement.place(state, ask, client.holder.process, now_ns, state.wanted[priority])
        asked = Waiter(
            state.queued_total + 1,
            event.token,
            event.conn,
            event.request_id,
            ask,
            client.holder,
            priority,
            now_ns,
            now_ns + ask.wait_ns,
        )
        if isinstance(found, Plan):
            recovery.begin_holding(state, client)
            leases.grant(state, asked, found, now_ns, out)
        elif found.final or not ask.wait_ns:
            serving.deny(asked, found, now_ns, out)
        else:
            refusal = bounds.over_waits(state, client)
            if refusal is not None:
                out.append(AnswerError(event.conn, event.request_id, refusal))
                return
            recovery.begin_holding(state, client)
            serving.enqueue(state, asked, found, now_ns, out)

    def _own(
        self,
        conn: ConnectionId,
        request_id: RequestId,
        token: Token,
        now_ns: int,
        out: list[Effect],
    ) -> Lease | None:
        """Find the live lease of a token, on its own connection; else answer why not."""
        lease = self.state.tokens.get(token)
        if lease is not None and lease.expires_ns is not None and lease.expires_ns <= now_ns:
            # Its time has come, if not yet the word of it: an expired lease does not come back.
            leases.expire(self.state, lease, now_ns, out)
            lease = None
        if lease is not None and lease.conn == conn:
            return lease
        if lease is None:
            refusal = Refusal(Code.UNKNOWN_TOKEN, "no live lease has this token", "token")
        else:
            refusal = Refusal(Code.NOT_OWNER, "the lease belongs to another connection", "token")
        out.append(AnswerError(conn, request_id, refusal))
        return None

    def _release(self, event: ReleaseAsked, now_ns: int, out: list[Effect]) -> None:
        lease = self._own(event.conn, event.request_id, event.token, now_ns, out)
        if lease is not None:
            fields = {"released": True, "token": event.token}
            out.append(Answer(event.conn, event.request_id, fields))
            leases.end(self.state, lease, leases.released(lease, "released"), now_ns, out)

    def _renew(self, event: RenewAsked, now_ns: int, out: list[Effect]) -> None:
        lease = self._own(event.conn, event.request_id, event.token, now_ns, out)
        if lease is None:
            return
        if lease.expires_ns is not None:
            lease.expires_ns = now_ns + self.state.settings.ttl_ns
            self.state.changed_leases[lease.number] = lease
            self.state.deadlines.set((leases.TTL, lease.lease_id), lease.expires_ns)
        out.append(Answer(event.conn, event.request_id, {"expires_at_ns": lease.expires_ns}))

    def _cancel(self, event: CancelAsked, now_ns: int, out: list[Effect]) -> None:
        client = self.state.clients.get(event.conn)
        waiter = client.requests.get(event.target) if client is not None else None
        if not isinstance(waiter, Waiter):
            message = f"no request {event.target!r} waits on this connection"
            refusal = Refusal(Code.UNKNOWN_REQUEST, message, "request_id")
            out.append(AnswerError(event.conn, event.request_id, refusal))
            return
        out.append(Answer(event.conn, event.request_id, {"cancelled": True}))
        serving.end_wait(self.state, waiter, Note.CANCELLED, now_ns, out)

    def _seal(self, event: SealAsked, now_ns: int, out: list[Effect]) -> None:
        client = self.state.clients.get(event.conn)
        requests = tuple(client.requests.values()) if client is not None else ()
        if client is None or not requests or any(isinstance(r, Waiter) for r in requests):
            why = "another request is unanswered" if requests else "the connection holds no lease"
            refusal = Refusal(Code.BAD_REQUEST, f"cannot seal: {why}")
            out.append(AnswerError(event.conn, event.request_id, refusal))
            return
        client.sealed = True
        client.signal = event.signal
        self.state.changed_clients[client.conn] = client
        for lease in requests:
            assert isinstance(lease, Lease)
            if lease.expires_ns is not None and lease.expires_ns > now_ns:
                lease.expires_ns = None
                self.state.changed_leases[lease.number] = lease
                self.state.deadlines.drop((leases.TTL, lease.lease_id))
        out.append(Answer(event.conn, event.request_id, {"sealed": True}))
        for lease in requests:
            if isinstance(lease, Lease) and lease.state is LeaseState.REVOKING:
                # It was told on the connection, which nobody may read any more.
                leases.signal(self.state, lease, out)
                break

    def _seal_told(self, event: SealTold, now_ns: int, out: list[Effect]) -> None:
        client = self.state.clients.get(event.conn)
        if client is not None:
            client.seal_told = True
            self.state.changed_clients[client.conn] = client

    def _reattach(self, event: ReattachAsked, now_ns: int, out: list[Effect]) -> None:
        client = self.state.clients[event.conn]
        refusal = STOPPING if self.state.stopping else bounds.over_holders(self.state, client)
        if refusal is not None:
            out.append(AnswerError(event.conn, event.request_id, refusal))
        else:
            recovery.reattach(self.state, event, now_ns, out)

    def _repeat(self, event: RequestRepeated, now_ns: int, out: list[Effect]) -> None:
        recovery.repeat(self.state, event, out)

    def _restore(self, event: Restored, now_ns: int, out: list[Effect]) -> None:
        state = self.state
        recovery.rebuild(state, event, now_ns, out)
        ended, lost = recovery.fates(state, event)
        for client in ended:
            self._leave(ClientLeft(client.conn), now_ns, out)
        for client in lost:
            recovery.forget(state, client)
            self._end_waits(client, now_ns, out)
            recovery.detach(state, client, now_ns + event.grace_ns)
            drain.leave(state, client, out)

    def _tell_owners(self, event: ClientsGreeted, now_ns: int, out: list[Effect]) -> None:
        recovery.tell_owners(self.state, now_ns, out)

    def _revoke(self, event: RevokeAsked, now_ns: int, out: list[Effect]) -> None:
        lease = self.state.leases.get(LeaseId(event.lease_id))
        if lease is None or lease.state is LeaseState.DRAINING:
            message = f"no live lease {event.lease_id!r}; see allocations"
            refusal = Refusal(Code.NOT_FOUND, message, "lease_id")
            out.append(AnswerError(event.conn, event.request_id, refusal))
            return
        # The answer goes first: the lease may be the asker's own.
        left_ns = event.grace_ns
        pending_ns = self.state.deadlines.due_ns((leases.REVOKE, lease.lease_id))
        if pending_ns is not None:
            left_ns = min(left_ns, max(0, pending_ns - now_ns))
        fields = {"lease_id": lease.lease_id, "deadline_s": left_ns / NS_PER_S}
        out.append(Answer(event.conn, event.request_id, fields))
        leases.ask_back(self.state, lease, event.reason, event.grace_ns, now_ns, out)

    def _arrive(self, event: ClientArrived, now_ns: int, out: list[Effect]) -> None:
        drain.arrive(self.state, event.conn, event.peer)

    def _leave(self, event: ClientLeft, now_ns: int, out: list[Effect]) -> None:
        client = self.state.clients[event.conn]
        recovery.forget(self.state, client)
        self._end_waits(client, now_ns, out)
        for lease in tuple(client.requests.values()):
            assert isinstance(lease, Lease)
            leases.end(self.state, lease, leases.released(lease, GONE), now_ns, out)
        drain.leave(self.state, client, out)

    def _end_waits(self, client: Client, now_ns: int, out: list[Effect]) -> None:
        for request in tuple(client.requests.values()):
            if isinstance(request, Waiter):
                serving.end_wait(self.state, request, Note.CANCELLED, now_ns, out)

    def _process_ended(self, event: ProcessEnded, now_ns: int, out: list[Effect]) -> None:
        state = self.state
        drain.process_ended(state, event.process, now_ns, out)
        for lease in recovery.detached_of(state, event.process):
            leases.end(state, lease, leases.released(lease, GONE), now_ns, out)

    def _readings(self, event: ReadingsTaken, now_ns: int, out: list[Effect]) -> None:
        # A reading that was on its way when SAFE_MODE came says nothing any more.
        if not self.state.safe_mode:
            drain.take_readings(self.state, event, now_ns, out)

    def _devices_found(self, event: DevicesFound, now_ns: int, out: list[Effect]) -> None:
        if not self.state.safe_mode:
            inventory.found(self.state, event.devices, out)

    def _devices_lost(self, event: DevicesLost, now_ns: int, out: list[Effect]) -> None:
        if not self.state.safe_mode:
            inventory.lost(self.state, event.reason, now_ns, out)

    def _change_settings(
        self, event: PolicyChangeAsked | CordonAsked, now_ns: int, out: list[Effect]
    ) -> None:
        settings_room.ask(self.state, self._desk, event, out)

    def _persisted(self, event: SettingsPersisted, now_ns: int, out: list[Effect]) -> None:
        settings_room.persisted(self.state, self._desk, event.failure, now_ns, out)

    def _configure(self, event: ConfigurationRead, now_ns: int, out: list[Effect]) -> None:
        state = self.state
        state.settings = state.settings._replace(**event._asdict())
        # A reading may count now that did not, or count no more.
        state.unsettled = state.upheaval = True

    def _time_passed(self, event: TimePassed, now_ns: int, out: list[Effect]) -> None:
        state = self.state
        while (key := state.deadlines.pop_due(now_ns)) is not None:
            if key == serving.POSITIONS:
                serving.tell_positions(state, now_ns, out)
                continue
            kind, name = key
            if key == serving.STALE:
                state.unsettled = True
                continue
            if kind == leases.WAIT:
                serving.end_wait(state, state.waiters[name], Note.TIMEOUT, now_ns, out)
                continue
            lease = state.leases[name]
            if kind == leases.TTL:
                leases.expire(state, lease, now_ns, out)
            elif kind == leases.REVOKE:
                leases.revoke_now(state, lease, lease.revoke_reason, now_ns, out)
            elif kind == leases.DETACH:
                leases.end(state, lease, leases.released(lease, GONE), now_ns, out)
            elif kind == drain.DRAINED:
                drain.timed_out(state, lease, now_ns, out)
            else:
                drain.overdue(state, lease, now_ns, out)

    def _stop(self, event: StopAsked, now_ns: int, out: list[Effect]) -> None:
        state = self.state
        state.stopping = True
        for waiter in tuple(state.queue):
            serving.drop(state, waiter)
            out.append(AnswerError(waiter.conn, waiter.request_id, STOPPING))
        out.append(Announce("daemon.stopping", {}))
        told = (client.conn for client in state.clients.values() if client.requests)
        out += (Announce("daemon.stopping", {}, conn, private=True) for conn in told)
