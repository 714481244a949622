"""Who could be served by the rules: a second, independent account of admission and of the queue.

Owns the policy as it was changed, what there is room for by the books, and the note that a refusal
should carry. Decides nothing for the core; the observer compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from gpuorchd.core.model import Ask, DeviceUuid, Note, Priority, ProcessKey
from tests.support.books import Books
from tests.support.entries import Seat

WORDS = {
    "critical": Priority.CRITICAL,
    "normal": Priority.NORMAL,
    "background": Priority.BACKGROUND,
}
DEFAULTS: Mapping[str, object] = {
    "max_memory_per_agent_mb": 0,
    "allow_fractional_shares": True,
    "kill_on_oom": False,
    "default_memory_mb": 2_048,
    "exclusive_stray_mb": 512,
    "safe_mode_grace_s": 30.0,
    "drain_timeout_s": 10.0,
    "agents": {},
}
# A request kept from these waits for its own agent, for an admin or for the card: it stands in
# nobody's way.
NOT_FOR_MEMORY = frozenset({Note.QUOTA, Note.CORDONED, Note.UNHEALTHY})
WALK = (
    Note.QUOTA,
    Note.CORDONED,
    Note.UNHEALTHY,
    Note.RESERVED,
    Note.INSUFFICIENT_MEMORY,
)


class Verdict(NamedTuple):
    """What the rules say of a request now. `note` None: it is to be granted."""

    note: Note | None
    wanted: frozenset[DeviceUuid] = frozenset()
    # Waiting cannot help; the note may then be any that says so.
    final: bool = False
    # The books do not allow a judgement.
    doubtful: bool = False


class PolicyBook:
    """The policy, kept as the plain map that admins see."""

    def __init__(self) -> None:
        self.values: dict[str, object] = dict(DEFAULTS)

    def change(self, changes: Mapping[str, object]) -> None:
        """Apply an accepted change; None returns a field to its default."""
        for name, value in changes.items():
            if name != "safe_mode":
                self.values[name] = DEFAULTS[name] if value is None else value

    def whole(self, name: str) -> int:
        """Give a field that is a whole number."""
        value = self.values[name]
        assert isinstance(value, int)
        return value

    def ns(self, name: str) -> int:
        """Give a field that is a number of seconds, in nanoseconds."""
        value = self.values[name]
        assert isinstance(value, int | float)
        return int(value * 1_000_000_000)

    @property
    def fractional(self) -> bool:
        """Whether a lease may take a part of a card."""
        return self.values["allow_fractional_shares"] is True

    def rule(self, agent: str) -> Mapping[str, object]:
        """Give the overrides of an agent: by name, else those of `*`."""
        agents = self.values["agents"]
        assert isinstance(agents, Mapping)
        rule = agents.get(agent) or agents.get("*") or {}
        assert isinstance(rule, Mapping)
        return rule

    def number(self, agent: str, name: str, otherwise: str) -> int:
        """Give a number of an agent's rule, else that of the policy."""
        value = self.rule(agent).get(name)
        return value if isinstance(value, int) else self.whole(otherwise)

    def priority(self, ask: Ask) -> Priority:
        """Say which class a request is in."""
        rule = self.rule(ask.agent)
        named = rule.get("priority")
        chosen = ask.priority
        if chosen is None:
            chosen = WORDS[named] if isinstance(named, str) else Priority.NORMAL
        highest = rule.get("max_priority")
        return max(chosen, WORDS[highest]) if isinstance(highest, str) else chosen

    def admits(self, ask: Ask, uid: int) -> bool:
        """Whether a user may use the name that he asks under."""
        users = self.rule(ask.agent).get("users")
        return not isinstance(users, list) or uid in users


class Rules:
    """Judge requests by the books and the policy."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.policy = PolicyBook()
        self.safe_mode = False
        # No probe has ended since the start, or since SAFE_MODE ended.
        self.probing = True

    def chosen(self, ask: Ask) -> list[Seat]:
        """List the cards that a request may choose from."""
        return [
            seat
            for seat in self.books.seats.values()
            if seat.present
            and (not ask.devices or {seat.facts.uuid, seat.facts.index} & set(ask.devices))
        ]

    def asked_mb(self, ask: Ask) -> int:
        """Say what a request stands for on each card."""
        if ask.memory_mb or ask.exclusive:
            return ask.memory_mb
        return self.policy.number(ask.agent, "default_memory_mb", "default_memory_mb")

    def whole(self, ask: Ask) -> bool:
        """Whether a request takes whole cards."""
        return ask.exclusive or not self.policy.fractional

    def charge_mb(self, ask: Ask, seat: Seat) -> int:
        """Say what a request counts against its agent's cap."""
        return seat.capacity_mb if ask.exclusive and self.policy.fractional else self.asked_mb(ask)

    def verdict(
        self, ask: Ask, holder: ProcessKey, *, most: bool, reserved: frozenset[DeviceUuid]
    ) -> Verdict:
        """Judge a request for the cards that nobody ahead wants."""
        if self.safe_mode:
            return Verdict(Note.SAFE_MODE, final=True)
        seats = self.chosen(ask)
        if self.books.blind or not any(seat.present for seat in self.books.seats.values()):
            return Verdict(Note.NO_GPU, final=not self.probing)
        if self.policy.rule(ask.agent).get("gpu") is False:
            return Verdict(Note.POLICY, final=True)
        asked_mb = self.asked_mb(ask)
        cap_mb = self.policy.number(ask.agent, "max_memory_mb", "max_memory_per_agent_mb")
        large = [seat for seat in seats if seat.capacity_mb >= asked_mb]
        allowed = [seat for seat in seats if not 0 < cap_mb < self.charge_mb(ask, seat)]
        if len(large) < ask.gpus or len(allowed) < ask.gpus:
            enough = len(large) >= ask.gpus
            return Verdict(Note.QUOTA if enough else Note.INSUFFICIENT_MEMORY, final=True)
        possible = [seat for seat in large if seat in allowed]
        if len(possible) < ask.gpus:
            return Verdict(Note.QUOTA, final=True)
        return self._walk(ask, holder, possible, most, reserved)

    def _walk(
        self,
        ask: Ask,
        holder: ProcessKey,
        seats: list[Seat],
        most: bool,
        reserved: frozenset[DeviceUuid],
    ) -> Verdict:
        reasons: dict[DeviceUuid, Note | None] = {}
        for seat in seats:
            reasons[seat.facts.uuid] = self.reason(ask, holder, seat, most, reserved)
        doubtful = any(self._murky(seat) for seat in seats)
        left = set(reasons)
        for note in WALK:
            left -= {uuid for uuid, reason in reasons.items() if reason is note}
            if len(left) < ask.gpus:
                if note in NOT_FOR_MEMORY:
                    return Verdict(note, doubtful=doubtful)
                wanted = frozenset(
                    seat.facts.uuid
                    for seat in seats
                    if reasons[seat.facts.uuid] not in NOT_FOR_MEMORY
                    and not (
                        reasons[seat.facts.uuid] is Note.INSUFFICIENT_MEMORY
                        and self._foreign(ask, holder, seat, most)
                    )
                )
                if len(wanted) < ask.gpus:
                    wanted = frozenset()
                return Verdict(note, wanted, doubtful=doubtful)
        return Verdict(None, doubtful=doubtful)

    def _murky(self, seat: Seat) -> bool:
        return seat.reading is not None and self.books.told(seat.facts.uuid).murky

    def healthy(self, seat: Seat) -> bool:
        """Whether a card's use is known."""
        return seat.facts.drain_ns is not None or not self.books.unreadable(seat.facts.uuid)

    def reason(
        self,
        ask: Ask,
        holder: ProcessKey,
        seat: Seat,
        most: bool,
        reserved: frozenset[DeviceUuid],
    ) -> Note | None:
        """Name the first reason for which a card does not serve a request, if there is one."""
        uuid = seat.facts.uuid
        cap_mb = self.policy.number(ask.agent, "max_memory_mb", "max_memory_per_agent_mb")
        charge_mb = self.charge_mb(ask, seat)
        if cap_mb and self.books.charges(uuid, ask.agent) + charge_mb > cap_mb:
            return Note.QUOTA
        if seat.cordoned:
            return Note.CORDONED
        if not self.healthy(seat):
            return Note.UNHEALTHY
        if uuid in reserved:
            return Note.RESERVED
        fits = (
            self._whole_fits(seat, holder, most) if self.whole(ask) else self._not_taken_whole(uuid)
        ) and self.room_mb(seat, holder, most=most) >= max(1, self.asked_mb(ask))
        return None if fits else Note.INSUFFICIENT_MEMORY

    def _not_taken_whole(self, uuid: DeviceUuid) -> bool:
        for lease in self.books.leases.values():
            if lease.whole and lease.live and uuid in lease.shares:
                return False
        return True

    def _whole_fits(self, seat: Seat, holder: ProcessKey, most: bool) -> bool:
        uuid = seat.facts.uuid
        for other, (live_mb, drain_mb) in self.books.claims(uuid, most=most).items():
            if other == holder and not most and seat.facts.drain_ns is None:
                drain_mb = self.books.kept_mb(uuid, holder, most=most)
            if live_mb or drain_mb:
                return False
        return self._strays_fit(seat, holder, frozenset())

    def _strays_fit(self, seat: Seat, holder: ProcessKey, others: Set[ProcessKey]) -> bool:
        """Whether all but a holder's own and those of `others` leave a card to be taken."""
        if seat.reading is None:
            return True
        told = self.books.told(seat.facts.uuid)
        strays_mb = 0
        for use in seat.reading.processes:
            owner = told.owners.get(use.process)
            if owner == holder or owner in others or use.process == holder:
                continue
            if holder in use.ancestors and owner is None:
                continue
            if use.used_mb is None:
                return False
            strays_mb += use.used_mb
        return strays_mb <= self.policy.whole("exclusive_stray_mb")

    def _foreign(self, ask: Ask, holder: ProcessKey, seat: Seat, most: bool) -> bool:
        """Whether a card that is not enough would not be even if all leases on it ended."""
        if seat.reading is None or seat.facts.drain_ns is not None:
            return False
        uuid = seat.facts.uuid
        held = {other for other, sums in self.books.claims(uuid, most=most).items() if any(sums)}
        if self.whole(ask) and not self._strays_fit(seat, holder, held):
            return True
        told = self.books.told(uuid)
        used = [told.used.get(other, 0) for other in held | {holder}]
        if None in used:
            return False
        reach_mb = seat.reading.free_mb + sum(mb or 0 for mb in used)
        return min(seat.capacity_mb, reach_mb) < max(1, self.asked_mb(ask))

    def room_mb(self, seat: Seat, holder: ProcessKey, *, most: bool) -> int:
        """Say how much a holder could lease on a card, by ledger and by reading."""
        uuid = seat.facts.uuid
        claims = self.books.claims(uuid, most=most)
        own_live_mb, own_drain_mb = claims.pop(holder, (0, 0))
        others_mb = sum(live_mb + drain_mb for live_mb, drain_mb in claims.values())
        ledger_mb = seat.capacity_mb - others_mb - own_live_mb
        if seat.facts.drain_ns is not None:
            return ledger_mb - own_drain_mb
        own_kept_mb = self.books.kept_mb(uuid, holder, most=most)
        ledger_mb -= own_kept_mb
        assert seat.reading is not None, "an unread card has no room to speak of"
        told = self.books.told(uuid)
        unmet_mb = sum(
            max(0, live_mb + drain_mb - (told.used.get(other) or 0))
            for other, (live_mb, drain_mb) in claims.items()
        )
        own_used_mb = told.used.get(holder) or 0
        if holder not in told.used:
            own_used_mb = sum(
                use.used_mb or 0
                for use in told.loose
                if use.process == holder or holder in use.ancestors
            )
        kept_free_mb = seat.reading.free_mb - unmet_mb
        if not most:
            # Leasing what it uses already takes nothing from anybody.
            kept_free_mb = max(0, kept_free_mb)
        return min(ledger_mb, kept_free_mb + own_used_mb - own_live_mb - own_kept_mb)


def reserved_by(verdicts: Iterable[Verdict]) -> frozenset[DeviceUuid]:
    """Join the cards that those ahead wait for."""
    return frozenset().union(*(verdict.wanted for verdict in verdicts))
