"""A second, independent account of who holds what, kept from events and answers alone.

Written from the contract, not from the core, and slow on purpose: sums are made anew from the
list of leases whenever they are asked for. Where the contract leaves a moment open (a timer that is
due but has not fired, a residue that its owner has leased again) a figure has two values: `least`
is what must be kept from others then, `most` what may be: for safety and for liveness. A card
is `murky` where its newest reading can be attributed in more than one way; there only the physical
truth is judged.
"""

from __future__ import annotations

from gpuorchd.core.model import (
    ConnectionId,
    DeviceFacts,
    DeviceUuid,
    Lease,
    Peer,
    ProcessKey,
    ProcessUse,
    Reading,
)
from tests.support.entries import Attribution, Held, Seat, Share


class Books:
    """Cards, leases and clients, as events and answers tell them."""

    def __init__(self, cordons: frozenset[str], reading_max_age_ns: int) -> None:
        self.now_ns = 0
        self.reading_max_age_ns = reading_max_age_ns
        self.seats: dict[DeviceUuid, Seat] = {}
        self.cordons = set(cordons)
        self.peers: dict[ConnectionId, Peer] = {}
        self.leases: dict[str, Held] = {}
        # No reading can be had of any card.
        self.blind = True
        self.dead: set[ProcessKey] = set()
        self._told: dict[DeviceUuid, Attribution] = {}

    # What is there.

    def of_holder(self, holder: ProcessKey) -> list[Held]:
        """List the leases of a process that keep bytes, oldest first."""
        return [lease for lease in self.leases.values() if lease.holder == holder]

    def holders(self) -> dict[ProcessKey, str | None]:
        """Name the processes that are connected or keep bytes, with their service."""
        found = {lease.holder: lease.unit for lease in self.leases.values()}
        for peer in self.peers.values():
            found[peer.process] = peer.unit
        return found

    def claims(self, uuid: DeviceUuid, *, most: bool) -> dict[ProcessKey, tuple[int, int]]:
        """Sum what each holder has on a card: live, and draining."""
        sums: dict[ProcessKey, tuple[int, int]] = {}
        for lease in self.leases.values():
            share = lease.shares.get(uuid)
            if share is None:
                continue
            live_mb, drain_mb = sums.get(lease.holder, (0, 0))
            if lease.live:
                live_mb += share.memory_mb
            else:
                drain_mb += share.most_mb if most else share.least_mb
            sums[lease.holder] = (live_mb, drain_mb)
        return sums

    def lent(self, lease: Held) -> bool:
        """Whether nobody but its holder can be using a draining lease: it may lease it again."""
        return not lease.live and lease.processes == {lease.holder}

    def kept_mb(self, uuid: DeviceUuid, holder: ProcessKey, *, most: bool) -> int:
        """Sum what drains of a holder's leases and is kept even from itself."""
        shares = [
            x.shares[uuid]
            for x in self.of_holder(holder)
            if uuid in x.shares and not x.live and not self.lent(x)
        ]
        return sum(share.most_mb if most else share.least_mb for share in shares)

    def charges(self, uuid: DeviceUuid, agent: str) -> int:
        """Sum what counts against an agent's cap on a card."""
        return sum(
            lease.shares[uuid].charge_mb
            for lease in self.leases.values()
            if lease.live and lease.agent == agent and uuid in lease.shares
        )

    def told(self, uuid: DeviceUuid) -> Attribution:
        """Tell the newest reading of a card apart; made once until something changes."""
        told = self._told.get(uuid)
        if told is None:
            reading = self.seats[uuid].reading
            assert reading is not None, "there is no reading to tell apart"
            told = self._told[uuid] = self.attribute(uuid, reading)
        return told

    def attribute(self, uuid: DeviceUuid, reading: Reading) -> Attribution:
        """Say which holder each process of a reading counts to."""
        holders = self.holders()
        used: dict[ProcessKey, int | None] = {}
        owners: dict[ProcessKey, ProcessKey] = {}
        loose = []
        murky = self.seats[uuid].doubtful if uuid in self.seats else False
        for use in reading.processes:
            candidates = self._candidates(uuid, use, holders)
            if not candidates:
                loose.append(use)
                continue
            murky = murky or len(set(candidates)) > 1
            owner = candidates[0]
            owners[use.process] = owner
            sum_mb = used.get(owner, 0)
            used[owner] = None if sum_mb is None or use.used_mb is None else sum_mb + use.used_mb
        return Attribution(used, owners, tuple(loose), murky)

    def _candidates(
        self, uuid: DeviceUuid, use: ProcessUse, holders: dict[ProcessKey, str | None]
    ) -> list[ProcessKey]:
        found = [use.process] if use.process in holders else []
        seen = [x for x in self.leases.values() if use.process in x.seen]
        if found and not self._may_claim(uuid, use.process):
            # It was a lease's before it connected itself, and has none of its own here.
            here = [x.holder for x in seen if self._may_claim(uuid, x.holder, x)]
            if here:
                return here
        found += [x.holder for x in seen]
        return found + self._kin(uuid, use, holders)

    def _may_claim(self, uuid: DeviceUuid, holder: ProcessKey, only: Held | None = None) -> bool:
        leases = self.of_holder(holder) if only is None else [only]
        shares = [x.shares[uuid] for x in leases if uuid in x.shares and not x.live]
        return any(x.live and uuid in x.shares for x in leases) or any(x.most_mb for x in shares)

    def _kin(
        self, uuid: DeviceUuid, use: ProcessUse, holders: dict[ProcessKey, str | None]
    ) -> list[ProcessKey]:
        """Name the holders that a process descends from, else the one it shares a service with."""
        found = [ancestor for ancestor in use.ancestors if ancestor in holders]
        if found or use.unit is None or use.process in holders:
            return found
        served = [lease for lease in self.leases.values() if lease.unit == use.unit]
        if len({lease.agent for lease in served}) == 1:
            found = [lease.holder for lease in served if uuid in lease.shares]
        return found

    def _doubt(self, lease: Held) -> None:
        """Put the attribution of a service's processes in doubt: who is alone in it has changed."""
        if lease.unit is None:
            return
        for seat in self.seats.values():
            if seat.reading is not None:
                served = any(use.unit == lease.unit for use in seat.reading.processes)
                seat.doubtful = seat.doubtful or served

    def unreadable(self, uuid: DeviceUuid) -> bool:
        """Whether nothing is known of a card: its newest reading failed, is old or missing."""
        seat = self.seats[uuid]
        stale = self.now_ns - seat.started_ns > self.reading_max_age_ns
        return self.blind or not seat.present or seat.failed or seat.reading is None or stale

    # What happens.

    def arrive(self, conn: ConnectionId, peer: Peer) -> None:
        """Note a connection that will ask for leases."""
        self._told.clear()
        self.peers[conn] = peer

    def leave(self, conn: ConnectionId) -> None:
        """Note its end; its leases end by `end`."""
        self._told.clear()
        process = self.peers.pop(conn).process
        for seat in self.seats.values():
            # Whom it counts to now is settled by the next reading.
            for use in seat.reading.processes if seat.reading is not None else ():
                if process in (use.process, *use.ancestors) and use.ancestors:
                    seat.doubtful = True

    def grant(self, record: Lease, peer: Peer, *, whole: bool) -> Held:
        """Note a grant; the holder's own residue goes over into it."""
        held = Held(
            record.lease_id,
            record.number,
            record.token,
            record.conn,
            record.request_id,
            peer.process,
            peer.unit,
            record.ask.agent,
            whole,
            {
                part.device.uuid: Share(part.memory_mb, part.charge_mb, 0, 0)
                for part in record.parts
            },
            record.granted_ns,
            record.expires_ns,
            peer.uid,
        )
        if peer.alive and peer.process not in self.dead:
            held.processes.add(peer.process)
        for uuid, share in held.shares.items():
            if self.seats[uuid].facts.drain_ns is None:
                self._lease_again(peer.process, uuid, share.memory_mb)
        self.leases[held.lease_id] = held
        self._doubt(held)
        self._told.clear()
        return held

    def _lease_again(self, holder: ProcessKey, uuid: DeviceUuid, memory_mb: int) -> None:
        for old in self.of_holder(holder):
            share = old.shares.get(uuid)
            if share is not None and self.lent(old):
                moved_mb = min(share.least_mb, memory_mb)
                share.least_mb -= moved_mb
                memory_mb -= moved_mb

    def end(self, lease: Held, now_ns: int, drain_timeout_ns: int) -> None:
        """Note a lease's end: its bytes drain."""
        lease.ended_ns = now_ns
        lease.timeouts_ns = (drain_timeout_ns, drain_timeout_ns)
        for uuid, share in lease.shares.items():
            at_once = self.seats[uuid].facts.drain_ns == 0
            share.least_mb = share.most_mb = 0 if at_once else share.memory_mb
        self.free_unreadable()
        self.sweep()

    def pass_time(self, now_ns: int, drain_timeout_ns: int, *, fired: bool) -> None:
        """Note what has come back by now. `fired`: the core was told of the time, too."""
        self.now_ns = now_ns
        for lease in self.leases.values():
            if lease.ended_ns is None:
                continue
            shortest, longest = lease.timeouts_ns
            lease.timeouts_ns = (
                min(shortest, drain_timeout_ns),
                max(longest, drain_timeout_ns),
            )
            late = now_ns >= lease.ended_ns + lease.timeouts_ns[0]
            for uuid, share in lease.shares.items():
                drain_ns = self.seats[uuid].facts.drain_ns
                if drain_ns is not None:
                    if now_ns >= lease.ended_ns + drain_ns:
                        share.least_mb = 0
                        if fired:
                            share.most_mb = 0
                elif late and (not lease.processes or self._shown(uuid, lease)):
                    share.least_mb = 0
        self.sweep()

    def _shown(self, uuid: DeviceUuid, lease: Held) -> bool:
        """Whether a reading since a lease's end tells what its holder uses."""
        seat = self.seats[uuid]
        assert lease.ended_ns is not None, "a live lease has not ended"
        if self.unreadable(uuid) or seat.started_ns < lease.ended_ns:
            return False
        return self.told(uuid).used.get(lease.holder, 0) is not None

    def withhold(self, lease: Held) -> None:
        """Note that the rest of a drain was given up: what was read since is outside leases."""
        lease.withheld = True
        assert lease.ended_ns is not None, "a live lease was withheld"
        for uuid, share in lease.shares.items():
            simulated = self.seats[uuid].facts.drain_ns is not None
            if not simulated and lease.processes and not self._shown(uuid, lease):
                # It may use these bytes for all that can be known.
                continue
            if share.least_mb == 0:
                share.most_mb = 0
                if not self._shown(uuid, lease) and not self.seats[uuid].doubtful:
                    # Its processes are gone, which frees; what they left is to be read first.
                    self.seats[uuid].failed = True
        self.sweep()

    def drained(self, lease: Held) -> None:
        """Note that the core calls a lease's bytes free."""
        for share in lease.shares.values():
            share.most_mb = 0
        self.sweep()

    def process_ended(self, process: ProcessKey) -> None:
        """Note a process's end; where nothing can be read, the last one's end frees."""
        self._told.clear()
        self.dead.add(process)
        for lease in self.leases.values():
            if lease.processes == {process}:
                lease.gone_ns = self.now_ns
            lease.processes.discard(process)
        self.free_unreadable()

    def free_unreadable(self) -> None:
        """Free what has no process left, on cards of which no reading can be had."""
        for lease in self.leases.values():
            if lease.live or lease.processes:
                continue
            for uuid, share in lease.shares.items():
                if self.seats[uuid].facts.drain_ns is None and self.unreadable(uuid):
                    share.least_mb = 0

    def read(self, started_ns: int, readings: tuple[Reading, ...], failures: set[str]) -> None:
        """Note fresh readings: what they show gone is free."""
        self._told.clear()
        for lease in self.leases.values():
            lease.seen &= lease.processes
        for uuid in failures:
            if uuid in self.seats:
                self.seats[DeviceUuid(uuid)].failed = True
        for reading in readings:
            seat = self.seats.get(reading.uuid)
            if seat is None:
                continue
            seat.reading, seat.started_ns = reading, started_ns
            seat.failed = seat.doubtful = False
            told = self.told(reading.uuid)
            holders = self.holders()
            for use in reading.processes:
                if use.process in holders:
                    continue
                kin = self._kin(reading.uuid, use, holders)[:1]
                for lease in self.leases.values():
                    share = lease.shares.get(reading.uuid)
                    if share is None or not (lease.live or share.most_mb):
                        continue
                    if [lease.holder] == kin:
                        lease.processes.add(use.process)
                        lease.seen.add(use.process)
            self._settle(reading.uuid, started_ns, told)
        self._told.clear()
        self.sweep()

    def _settle(self, uuid: DeviceUuid, started_ns: int, told: Attribution) -> None:
        if told.murky:
            for lease in self.leases.values():
                if uuid in lease.shares and not lease.live:
                    lease.shares[uuid].least_mb = 0
            return
        for holder, (live_mb, _) in self.claims(uuid, most=True).items():
            used_mb = told.used.get(holder, 0)
            draining = [x for x in self.of_holder(holder) if not x.live and uuid in x.shares]
            before = [x for x in draining if (x.ended_ns or 0) <= started_ns]
            if used_mb is None:
                # All that can be known is that nobody is left who could use it.
                for lease in before:
                    if not lease.processes and lease.gone_ns <= started_ns:
                        lease.shares[uuid].least_mb = lease.shares[uuid].most_mb = 0
                continue
            after_mb = sum(x.shares[uuid].most_mb for x in draining if x not in before)
            residue_mb = max(0, used_mb - live_mb)
            for lease in before:
                lease.shares[uuid].most_mb = min(lease.shares[uuid].most_mb, residue_mb)
            all_mb = sum(lease.shares[uuid].most_mb for lease in before)
            leasts = {
                lease.lease_id: residue_mb - after_mb - (all_mb - lease.shares[uuid].most_mb)
                for lease in before
            }
            for lease in before:
                share = lease.shares[uuid]
                share.least_mb = min(share.least_mb, max(0, leasts[lease.lease_id]))
                if lease.withheld or (not lease.processes and lease.gone_ns <= started_ns):
                    share.least_mb = share.most_mb = 0

    def sweep(self) -> None:
        """Forget leases of which nothing is kept."""
        for lease in tuple(self.leases.values()):
            if lease.live or any(share.most_mb for share in lease.shares.values()):
                continue
            del self.leases[lease.lease_id]
            self._doubt(lease)
            self._told.clear()
            connected = any(peer.process == lease.holder for peer in self.peers.values())
            if lease.seen or not connected:
                # Whom they count to now is settled by the next reading.
                for seat in self.seats.values():
                    uses = seat.reading.processes if seat.reading is not None else ()
                    if lease.seen or any(use.process == lease.holder for use in uses):
                        seat.doubtful = True

    def find(self, facts: tuple[DeviceFacts, ...]) -> None:
        """Note the cards that are present now, all of them."""
        self.blind = False
        here = {entry.uuid for entry in facts}
        for seat in self.seats.values():
            if seat.facts.uuid not in here:
                seat.present, seat.reading = False, None
        for entry in facts:
            seat = self.seats.setdefault(entry.uuid, Seat(entry))
            if not seat.present:
                # What was read on the way out may or may not count now that it is back.
                seat.present = seat.doubtful = True
            seat.cordoned = entry.uuid in self.cordons
        self.free_unreadable()

    def lose(self) -> None:
        """Note that no card can be used or read."""
        self.blind = True
        for seat in self.seats.values():
            seat.present, seat.reading = False, None
        self.free_unreadable()
