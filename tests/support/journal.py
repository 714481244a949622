"""What was asked and is not answered yet, and what the answers change: the observer's memory.

Owns the open requests, the waiting ones in their order, the changes that wait for the disk, and the
books. `Observer` drives it; nothing here looks at the core's state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core.model import Code, ConnectionId, RequestId
from gpuorchd.core.state import Settings
from tests.support.audit import Waiting, check_over_bound, counts, require
from tests.support.books import Books
from tests.support.entries import Held
from tests.support.rules import Rules

Asked = tuple[ConnectionId, RequestId]
AwaitsSettings = ev.PolicyChangeAsked | ev.CordonAsked
NEVER_NS = 2**63


class Journal:
    """Requests, waits and settings as they stand, kept from events and answers."""

    def __init__(self, settings: Settings, *, safe_mode: bool, cordons: Sequence[str]) -> None:
        self.books = Books(frozenset(cordons), settings.reading_max_age_ns)
        self.rules = Rules(self.books)
        self.rules.safe_mode = safe_mode
        self.waiting: list[Waiting] = []
        self.granted_total = 0
        self.denied_total = 0
        # Ended, and neither drained nor withheld yet.
        self.draining: set[str] = set()
        self.stopping = False
        self._settings = settings
        self._asked: Counter[Asked] = Counter()
        # Their clients have left: they may be answered and need not be.
        self._void: Counter[Asked] = Counter()
        self._changes: dict[Asked, AwaitsSettings] = {}
        self._sealed: dict[ConnectionId, str | None] = {}
        self._tokens: dict[str, ConnectionId] = {}
        self._lease_ids: set[str] = set()
        self._withheld: set[str] = set()
        self._arrivals = 0
        self._new: Waiting | None = None
        self._now_ns = 0

    # Requests and their answers.

    def _count(self, conn: ConnectionId, request_id: RequestId) -> None:
        asked = (conn, request_id)
        if self._asked[asked] > 0:
            self._asked[asked] -= 1
        else:
            require(self._void[asked] > 0, "what is answered was asked, once", asked)
            self._void[asked] -= 1

    def _request_of(self, effect: fx.AnswerDenial | fx.AnswerError) -> Waiting | None:
        new = self._new
        if new is not None and (new.conn, new.request_id) == (effect.conn, effect.request_id):
            self._new = None
            return new
        same = [x for x in self.waiting if (x.conn, x.request_id) == effect[:2]]
        if not same:
            return None
        chosen = min(same, key=lambda waiter: waiter.deadline_ns)
        self.waiting.remove(chosen)
        return chosen

    def _ahead(self, waiter: Waiting) -> list[Waiting]:
        return [other for other in self.waiting if other.place < waiter.place]

    def _live(self, token: str) -> Held | None:
        for lease in self.books.leases.values():
            if lease.token == token and lease.live:
                return lease
        return None

    def _end(self, lease: Held) -> None:
        self.draining.add(lease.lease_id)
        self.books.end(lease, self._now_ns, self.rules.policy.ns("drain_timeout_s"))

    def _no_tokens(self, value: object, owner: ConnectionId | None) -> None:
        if isinstance(value, str):
            if value in self._tokens:
                require(self._tokens[value] == owner, "tokens stay with their owner")
        elif isinstance(value, Mapping):
            for entry in value.items():
                self._no_tokens(entry, owner)
        elif isinstance(value, list | tuple | set | frozenset):
            for entry in value:
                self._no_tokens(entry, owner)

    # Leases whose connections were lost with the daemon.

    def _detach(self, conn: ConnectionId, due_ns: int) -> None:
        for lease in self.books.leases.values():
            if lease.conn == conn and lease.live:
                lease.detached_ns = due_ns

    def _reattached(self, event: ev.ReattachAsked, effect: fx.AnswerGrant) -> None:
        self._count(event.conn, event.request_id)
        record, peer = effect.lease, self.books.peers[event.conn]
        lease = self._live(event.token)
        require(lease is not None and lease.detached_ns is not None, "only what is detached", event)
        assert lease is not None
        require((lease.holder, lease.uid) == (peer.process, peer.uid), "its owner's", event)
        same = (record.lease_id, record.token, record.expires_ns, record.granted_ns)
        stood = (lease.lease_id, lease.token, lease.expires_ns, lease.granted_ns)
        require(same == stood, "the same lease comes back", same, stood)
        require((record.conn, record.request_id) == event[:2], "to who asked", record.conn)
        lease.conn, lease.request_id, lease.detached_ns = event.conn, event.request_id, None
        self._tokens[event.token] = event.conn

    def _not_come_back(self, lease: Held) -> None:
        assert lease.detached_ns is not None
        late = lease.detached_ns <= self._now_ns
        require(late or lease.holder in self.books.dead, "an owner has its time", lease)
        self._end(lease)

    def _not_reattached(self, event: ev.ReattachAsked, effect: fx.AnswerError) -> None:
        lease, peer = self._live(event.token), self.books.peers[event.conn]
        match effect.refusal.code:
            case Code.UNKNOWN_TOKEN:
                over = lease is None or (
                    lease.expires_ns is not None and lease.expires_ns <= self._now_ns
                )
                require(over, "a live lease is known", effect)
            case Code.LIMIT:
                counted = counts(self.books, self.waiting, event.conn, peer.uid)
                limits = self._settings.limits
                reached = counted["holders"] >= limits.holders
                reached |= counted["holders_per_uid"] >= limits.holders_per_uid
                require(reached, "only what passes a bound is refused for it", effect)
            case code:
                require(code is Code.NOT_OWNER, "an error of the contract", effect)
                assert lease is not None
                owner = (lease.holder, lease.uid) == (peer.process, peer.uid)
                detached = lease.detached_ns is not None
                require(not (owner and detached), "an owner gets its lease back", lease)

    # What settings change, before anything that follows from it.

    def _apply_settled(self, effects: Sequence[fx.Effect]) -> None:
        for effect in effects:
            if not isinstance(effect, fx.Answer | fx.AnswerPolicy):
                continue
            change = self._changes.pop((effect.conn, effect.request_id), None)
            if isinstance(effect, fx.AnswerPolicy) and effect.note is not None:
                require(effect.note == "SAFE_MODE", "a note of the contract", effect.note)
                require(self.rules.safe_mode, "read-only under SAFE_MODE alone")
                continue
            if isinstance(change, ev.CordonAsked):
                self._cordon(change)
            elif isinstance(change, ev.PolicyChangeAsked):
                self.rules.policy.change(change.changes)
                for waiter in self.waiting:
                    waiter.priority = self.rules.policy.priority(waiter.ask)
                self.waiting.sort(key=lambda waiter: waiter.place)
                wanted = change.changes.get("safe_mode")
                if isinstance(wanted, bool) and wanted != self.rules.safe_mode:
                    self._switch_safe_mode(wanted, effects)

    def _cordon(self, change: ev.CordonAsked) -> None:
        for seat in self.books.seats.values():
            if change.gpu in (seat.facts.uuid, seat.facts.index):
                seat.cordoned = change.reason is not None
                if seat.cordoned:
                    self.books.cordons.add(seat.facts.uuid)
                else:
                    self.books.cordons.discard(seat.facts.uuid)

    def _switch_safe_mode(self, wanted: bool, effects: Sequence[fx.Effect]) -> None:
        kinds = {type(effect) for effect in effects}
        self.rules.safe_mode = wanted
        if not wanted:
            require(fx.OpenDevices in kinds, "the end of SAFE_MODE looks for cards")
            self.rules.probing = True
            # Whether a holder still has to yield is left open.
            for lease in self.books.leases.values():
                if lease.revoke_ns:
                    lease.revoke_ns = (lease.revoke_ns[0], NEVER_NS)
            return
        require(fx.CloseDevices in kinds, "SAFE_MODE lets go of the driver")
        self.books.lose()
        due_ns = self._now_ns + self.rules.policy.ns("safe_mode_grace_s")
        for lease in self.books.leases.values():
            if lease.live:
                self._revoke(lease, due_ns, effects)

    def _revoke(self, lease: Held, due_ns: int, effects: Sequence[fx.Effect]) -> None:
        told = [
            effect
            for effect in effects
            if isinstance(effect, fx.Announce)
            and effect.name in ("lease.revoking", "lease.revoked")
            and effect.fields.get("lease_id") == lease.lease_id
            and effect.owner == lease.conn
        ]
        earlier, later = lease.revoke_ns or (due_ns, due_ns)
        if lease.revoke_ns is None:
            require(bool(told), "a holder is asked to yield", lease.lease_id)
        lease.revoke_ns = (min(earlier, due_ns), max(later, due_ns))

    # Answers to the ops on leases.

    def _answered(self, event: ev.Event, effect: fx.Answer) -> None:
        self._count(effect.conn, effect.request_id)
        self._no_tokens(effect.fields, effect.conn)
        match event:
            case ev.ReleaseAsked(conn, _, token):
                lease = self._live(token)
                require(lease is not None and lease.conn == conn, "only its owner releases", token)
                assert lease is not None
                self._end(lease)
            case ev.RenewAsked(conn, _, token):
                lease = self._live(token)
                require(lease is not None and lease.conn == conn, "only its owner renews", token)
                assert lease is not None
                expired = lease.expires_ns is not None and lease.expires_ns < self._now_ns
                require(not expired, "an expired lease does not come back", lease.lease_id)
                if lease.expires_ns is not None:
                    lease.expires_ns = self._now_ns + self._settings.ttl_ns
                told = effect.fields.get("expires_at_ns", "nothing")
                require(told == lease.expires_ns, "the time that is answered is kept", told)
            case ev.SealAsked(conn, _, signal):
                require(
                    not any(waiter.conn == conn for waiter in self.waiting),
                    "a connection with an open request is not sealed",
                )
                self._sealed[conn] = signal
                for lease in self.books.leases.values():
                    if lease.conn == conn:
                        lease.expires_ns = None
            case ev.RevokeAsked(_, _, lease_id, grace_ns, _):
                lease = next(
                    (x for x in self.books.leases.values() if x.lease_id == lease_id), None
                )
                require(lease is not None and lease.live, "only a live lease is revoked", lease_id)
                assert lease is not None
                earlier, later = lease.revoke_ns or (NEVER_NS, 0)
                due_ns = self._now_ns + grace_ns
                lease.revoke_ns = (min(earlier, due_ns), max(later, due_ns))
            case _:
                pass

    def _refused(self, event: ev.Event, effect: fx.AnswerError) -> None:
        self._count(effect.conn, effect.request_id)
        self._changes.pop((effect.conn, effect.request_id), None)
        code = effect.refusal.code
        if isinstance(event, ev.ReattachAsked):
            self._not_reattached(event, effect)
            return
        waiter = self._request_of(effect)
        if code is Code.SHUTTING_DOWN:
            require(self.stopping, "shutting_down only when it stops")
        elif code is Code.LIMIT:
            require(waiter is not None, "bounds are on leases and waits", effect)
            assert waiter is not None
            check_over_bound(self.books, self.waiting, self._settings.limits, waiter, effect)
        elif waiter is not None:
            allowed = code is Code.FORBIDDEN or (
                code in (Code.NOT_FOUND, Code.BAD_REQUEST) and waiter.ask.devices
            )
            require(bool(allowed), "an error of the contract", effect)
        if isinstance(event, ev.ReleaseAsked | ev.RenewAsked) and effect.conn == event.conn:
            lease = self._live(event.token)
            over = lease is None or (
                lease.expires_ns is not None and lease.expires_ns <= self._now_ns
            )
            owner = self._tokens.get(event.token)
            if code is Code.NOT_OWNER:
                require(owner != event.conn, "its owner is not told that it is not", effect)
            else:
                require(code is Code.UNKNOWN_TOKEN and over, "a live lease is known", effect)
