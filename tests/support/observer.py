"""An observer beside the core: sees events and effects, keeps its own books, and objects.

Checks after every event: every request is answered exactly once, leases and waits follow the rules
(`audit`), deadlines are kept, the owners are told what they must be told, tokens stay with their
owners. Reads nothing of the core's state. Broken promises raise `Violation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import assert_never

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core.model import ConnectionId, Note
from gpuorchd.core.state import Settings
from libclient.wire.vocabulary import EVENTS
from tests.support import audit
from tests.support.audit import Waiting, require
from tests.support.entries import Held
from tests.support.journal import Journal
from tests.support.world import SECOND, World

TELLS_PER_SECOND = 4
# A turn may leave work to the next (positions are told so), but not without end.
WAKES_IN_VAIN = 3


class Observer(Journal):
    """Judge a machine by what goes in and what comes out."""

    def __init__(
        self,
        settings: Settings,
        world: World | None = None,
        *,
        safe_mode: bool = False,
        cordons: Sequence[str] = (),
    ) -> None:
        super().__init__(settings, safe_mode=safe_mode, cordons=cordons)
        self._world = world
        self._woken = 0

    # The turn.

    def saw(self, event: ev.Event, effects: Sequence[fx.Effect], now_ns: int) -> None:
        """Check one event and what came of it."""
        fired = isinstance(event, ev.TimePassed)
        self._now_ns = now_ns
        self.books.pass_time(now_ns, self.rules.policy.ns("drain_timeout_s"), fired=fired)
        self._event(event)
        self._apply_settled(effects)
        for effect in effects:
            self._effect(event, effect)
        self._afterwards(event, effects)

    def check_next_deadline(self, event: ev.Event, next_ns: int | None) -> None:
        """Check that the core wants to be woken for everything that has its time."""
        due: list[int] = [waiter.deadline_ns for waiter in self.waiting]
        for lease in self.books.leases.values():
            if lease.ended_ns is None:
                due += [time for time in (lease.expires_ns,) if time is not None]
                due += [lease.revoke_ns[1]] if lease.revoke_ns else []
                due += [lease.detached_ns] if lease.detached_ns is not None else []
                continue
            for uuid, share in lease.shares.items():
                drain_ns = self.books.seats[uuid].facts.drain_ns
                if drain_ns is not None and share.most_mb:
                    due.append(lease.ended_ns + drain_ns)
                elif share.least_mb and not lease.withheld:
                    due.append(lease.ended_ns + lease.timeouts_ns[1])
        if due:
            require(next_ns is not None and next_ns <= min(due), "woken in time", next_ns, min(due))
        again = next_ns is not None and next_ns <= self._now_ns
        self._woken = self._woken + 1 if again and isinstance(event, ev.TimePassed) else 0
        require(self._woken < WAKES_IN_VAIN, "the core is not woken for ever", next_ns)

    def check_settled(self) -> None:
        """Check that nothing is left open: to be called when everybody has left."""
        require(not +self._asked, "every request is answered", self._asked)
        require(not self.waiting, "nobody waits for ever", len(self.waiting))
        require(not self.draining, "what drains comes back or is withheld", self.draining)

    # Events.

    def _event(self, event: ev.Event) -> None:
        self._new = None
        match event:
            case ev.ClientArrived(conn, peer):
                self.books.arrive(conn, peer)
            case ev.ClientLeft(conn):
                self._left(conn)
            case ev.ProcessEnded(process):
                self.books.process_ended(process)
            case ev.LeaseAsked():
                self._lease_asked(event)
            case ev.PolicyChangeAsked() | ev.CordonAsked():
                self._asked[event.conn, event.request_id] += 1
                self._changes[event.conn, event.request_id] = event
            case (
                ev.ReattachAsked()
                | ev.ReleaseAsked()
                | ev.RenewAsked()
                | ev.CancelAsked()
                | ev.SealAsked()
                | ev.RevokeAsked()
            ):
                self._asked[event.conn, event.request_id] += 1
            case ev.DevicesFound(devices):
                if not self.rules.safe_mode:
                    self.rules.probing = False
                    self.books.find(devices)
            case ev.DevicesLost():
                if not self.rules.safe_mode:
                    self.rules.probing = False
                    self.books.lose()
            case ev.ReadingsTaken(started_ns, readings, failures):
                self.books.read(started_ns, readings, {uuid for uuid, _ in failures})
            case ev.StopAsked():
                self.stopping = True
            case ev.Restored():
                self._restored(event)
            case ev.ConfigurationRead():
                self._settings = self._settings._replace(**event._asdict())
                self.books.reading_max_age_ns = event.reading_max_age_ns
            case (
                ev.SettingsPersisted()
                | ev.TimePassed()
                | ev.SealTold()
                | ev.RequestRepeated()
                | ev.ClientsGreeted()
            ):
                pass
            case _:
                assert_never(event)

    def _lease_asked(self, event: ev.LeaseAsked) -> None:
        peer = self.books.peers[event.conn]
        self._asked[event.conn, event.request_id] += 1
        self._tokens[event.token] = event.conn
        self._arrivals += 1
        priority = self.rules.policy.priority(event.ask)
        self._new = Waiting(
            event.conn,
            event.request_id,
            event.token,
            event.ask,
            peer.process,
            peer.uid,
            priority,
            self._arrivals,
            self._now_ns,
        )

    def _restored(self, event: ev.Restored) -> None:
        """Another daemon goes on: no card is known to it, and who left meanwhile has left."""
        self.books.lose()
        self.rules.probing = not self.rules.safe_mode
        for asked in self._changes:
            # The disk had not taken it: it was neither done nor answered.
            self._asked.pop(asked, None)
            self._void.pop(asked, None)
        self._changes.clear()
        for waiter in self.waiting:
            waiter.told_ns.clear()
        for lease in self.books.leases.values():
            if lease.live and lease.expires_ns is not None:
                lease.expires_ns = max(lease.expires_ns, self._now_ns + event.grace_ns)
        for conn in tuple(self.books.peers):
            if conn in event.lost:
                self._detach(conn, self._now_ns + event.grace_ns)
            if conn not in event.attached:
                self._left(conn)
        for lease in self.books.leases.values():
            if lease.detached_ns is not None:
                lease.detached_ns = self._now_ns + event.grace_ns

    def _left(self, conn: ConnectionId) -> None:
        for lease in [x for x in self.books.leases.values() if x.conn == conn and x.live]:
            if lease.detached_ns is None:
                self._end(lease)
        self.waiting = [waiter for waiter in self.waiting if waiter.conn != conn]
        for asked in [asked for asked in self._asked if asked[0] == conn]:
            self._void[asked] += self._asked.pop(asked)
        self._sealed.pop(conn, None)
        self.books.leave(conn)

    # Effects.

    def _effect(self, event: ev.Event, effect: fx.Effect) -> None:
        match effect:
            case fx.AnswerGrant() if isinstance(event, ev.ReattachAsked):
                self._reattached(event, effect)
            case fx.AnswerGrant():
                self._granted(effect)
            case fx.AnswerDenial():
                self._denied(event, effect)
            case fx.Answer():
                self._answered(event, effect)
            case fx.AnswerPolicy():
                self._count(effect.conn, effect.request_id)
            case fx.AnswerError():
                self._refused(event, effect)
            case fx.Announce():
                self._announced(effect)
            case fx.SignalPeer():
                require(
                    self._sealed.get(effect.conn) == effect.signal,
                    "only the peer of a sealed connection is signalled, as it asked",
                    effect,
                )
            case _:
                pass

    def _granted(self, effect: fx.AnswerGrant) -> None:
        record = effect.lease
        self._count(record.conn, record.request_id)
        new = self._new
        if new is not None and new.token == record.token:
            waiter, self._new = new, None
        else:
            same = [x for x in self.waiting if x.token == record.token]
            require(len(same) == 1, "a grant answers a request that is open", record.lease_id)
            waiter = same[0]
            self.waiting.remove(waiter)
        require(record.ask == waiter.ask, "a grant is what was asked for", record.ask)
        require(record.conn in self.books.peers, "no lease without a connection", record.lease_id)
        require(record.lease_id not in self._lease_ids, "a lease's id is its own", record.lease_id)
        require(record.granted_ns == self._now_ns, "granted now", record.granted_ns)
        require(record.waited_ns == self._now_ns - waiter.queued_ns, "waited so long", record)
        audit.check_grant(self.rules, record, waiter.holder, waiter.priority, self._ahead(waiter))
        ttl_ns = self._settings.ttl_ns
        sealed = record.conn in self._sealed
        expires_ns = self._now_ns + ttl_ns if ttl_ns and not sealed else None
        require(record.expires_ns == expires_ns, "the lease's time limit", record.expires_ns)
        before_mb = {
            part.device.uuid: sum(
                self.books.claims(part.device.uuid, most=False).get(waiter.holder, (0, 0))
            )
            for part in record.parts
        }
        held = self.books.grant(
            record, self.books.peers[record.conn], whole=self.rules.whole(record.ask)
        )
        self._lease_ids.add(record.lease_id)
        self.granted_total += 1
        if self._world is not None:
            audit.check_truth(self.rules, self._world, held, before_mb)

    def _denied(self, event: ev.Event, effect: fx.AnswerDenial) -> None:
        self._count(effect.conn, effect.request_id)
        entry = self._new is not None
        waiter = self._request_of(effect)
        if waiter is None:
            return
        self.denied_total += 1
        note = effect.denial.note
        require(effect.agent == waiter.ask.agent, "a denial names its agent", effect.agent)
        if note is Note.TIMEOUT:
            require(
                not entry and self._now_ns >= waiter.deadline_ns,
                "a wait ends at its time",
                waiter.request_id,
            )
        elif note is Note.CANCELLED:
            cancelled = isinstance(event, ev.CancelAsked) and (
                (event.conn, event.target) == (waiter.conn, waiter.request_id)
            )
            require(cancelled, "a wait is cancelled by its owner", waiter.request_id)
        else:
            audit.check_denial(
                self.rules, waiter.ask, waiter.holder, note, self._ahead(waiter), entry=entry
            )

    def _announced(self, effect: fx.Announce) -> None:
        require(effect.name in EVENTS, "an event of the catalogue", effect.name)
        self._no_tokens(effect.fields, None)
        self._no_tokens(effect.owner_fields or {}, effect.owner)
        lease = next(
            (x for x in self.books.leases.values() if x.lease_id == effect.fields.get("lease_id")),
            None,
        )
        match effect.name:
            case "lease.queued":
                self._queued(effect)
            case "lease.expired" | "lease.revoked":
                require(lease is not None and lease.live, "a live lease ends once", effect)
                assert lease is not None
                require(effect.owner == lease.conn, "its owner is told", effect)
                dues = [lease.expires_ns] if effect.name == "lease.expired" else []
                if effect.name == "lease.revoked" and lease.revoke_ns:
                    dues = [lease.revoke_ns[0]]
                due_ns = dues[0] if dues else None
                require(
                    due_ns is not None and due_ns <= self._now_ns, "no lease ends early", effect
                )
                self._end(lease)
            case "lease.released" if lease is not None and lease.detached_ns is not None:
                self._not_come_back(lease)
            case "lease.withheld":
                self._withheld_once(effect, lease)
            case "lease.drained":
                self._drained(effect, lease)
            case _:
                pass

    def _withheld_once(self, effect: fx.Announce, lease: Held | None) -> None:
        lease_id = str(effect.fields["lease_id"])
        require(lease_id not in self._withheld, "a drain is given up once", lease_id)
        self._withheld.add(lease_id)
        self.draining.discard(lease_id)
        require(lease is not None and not lease.live, "what is withheld had drained", lease_id)
        assert lease is not None
        assert lease.ended_ns is not None
        due_ns = lease.ended_ns + lease.timeouts_ns[0]
        require(self._now_ns >= due_ns, "a drain has its time", lease_id)
        self.books.withhold(lease)

    def _drained(self, effect: fx.Announce, lease: Held | None) -> None:
        lease_id = str(effect.fields["lease_id"])
        self.draining.discard(lease_id)
        if lease is None:
            return
        require(not lease.live, "only what has ended drains", lease_id)
        for uuid, share in lease.shares.items():
            seat = self.books.seats[uuid]
            if seat.reading is not None and self.books.told(uuid).murky:
                continue
            require(share.least_mb == 0, "what is called free is free", lease_id, uuid, share)
        self.books.drained(lease)

    def _queued(self, effect: fx.Announce) -> None:
        told = {**effect.fields, **(effect.owner_fields or {})}
        request_id = told.get("request_id")
        require("request_id" not in effect.fields, "a request's id is its owner's", effect)
        new = self._new
        if new is not None and (new.conn, new.request_id) == (effect.owner, request_id):
            require(new.ask.wait_ns > 0, "who does not wait is answered", request_id)
            self.waiting.append(new)
            self.waiting.sort(key=lambda waiter: waiter.place)
            self._new = None
        same = [x for x in self.waiting if (x.conn, x.request_id) == (effect.owner, request_id)]
        require(bool(same), "only who waits has a position", effect)
        position = told["position"]
        require(isinstance(position, int) and told.get("ahead") == position - 1, "ahead", told)
        assert isinstance(position, int)
        waiter = min(same, key=lambda x: abs(self.waiting.index(x) + 1 - position))
        place = self.waiting.index(waiter) + 1
        require(place == position, "a place that is told is true", place, effect)
        waiter.told_position = position
        waiter.told_ns.append(self._now_ns)
        full = len(waiter.told_ns) == TELLS_PER_SECOND + 1
        recent = full and waiter.told_ns[-1] - waiter.told_ns[0] < SECOND
        require(not recent, "at most four a second", list(waiter.told_ns))

    # After the turn.

    def _afterwards(self, event: ev.Event, effects: Sequence[fx.Effect]) -> None:
        require(self._new is None, "a request is answered or waits", self._new)
        open_ids = Counter((waiter.conn, waiter.request_id) for waiter in self.waiting)
        open_ids.update(asked for asked in self._changes if not self._void[asked])
        require(+self._asked == open_ids, "what does not wait is answered", self._asked, open_ids)
        if isinstance(event, ev.ClientLeft):
            kept = {asked for asked in self._changes if asked[0] == event.conn}
            self._void = Counter({asked: 1 for asked in self._void if asked in kept})
        if self.stopping or self.rules.safe_mode:
            require(not self.waiting, "nobody waits while nothing is granted")
            return
        closed = [x for x in self.waiting if not self.rules.policy.admits(x.ask, x.uid)]
        require(not closed, "nobody waits with a name that is closed to him", closed)
        audit.check_waiters(self.rules, self.waiting)
        audit.check_bounds(self.books, self.waiting, self._settings.limits)
        self._check_places(fired=isinstance(event, ev.TimePassed))
        if isinstance(event, ev.TimePassed):
            self._check_deadlines()

    def _check_places(self, *, fired: bool) -> None:
        for position, waiter in enumerate(self.waiting, 1):
            if waiter.position != position:
                waiter.position, waiter.moved_ns = position, self._now_ns
            late = fired and self._now_ns >= waiter.moved_ns + SECOND // TELLS_PER_SECOND
            told = waiter.told_position == position
            require(told or not late, "a waiter knows its place", position, waiter)

    def _check_deadlines(self) -> None:
        now_ns = self._now_ns
        for waiter in self.waiting:
            require(waiter.deadline_ns > now_ns, "a wait ends at its time", waiter)
        for lease in self.books.leases.values():
            if not lease.live:
                continue
            require(lease.expires_ns is None or lease.expires_ns > now_ns, "leases expire", lease)
            due_ns = lease.detached_ns
            require(due_ns is None or due_ns > now_ns, "a detachment ends", lease)
            require(lease.revoke_ns is None or lease.revoke_ns[1] > now_ns, "grace ends", lease)
