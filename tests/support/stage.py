"""The stage: world, machine and observer together, with everything that a daemon's shells would do.

Events go in by `submit` alone; the observer sees each with its effects, and the core's own
invariants are checked. What takes time (a reading, a dying process, the disk, a late timer) lies on
the agenda; `advance` moves the clock from one entry to the next, and nothing else does. How long
each takes, and what fails, is the `Pace`'s: fixed here, random in the simulator.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core import invariants
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import (
    Ask,
    ConnectionId,
    DeviceFacts,
    DeviceUuid,
    Peer,
    ProcessKey,
    Reading,
    RequestId,
    Token,
)
from gpuorchd.core.placement import Plan
from gpuorchd.core.state import Settings
from tests.support.observer import Observer
from tests.support.pace import Pace
from tests.support.recorded import Table
from tests.support.world import Process, World

TRACE_EVENTS = 30


class Link:
    """A connection. It lives until the last process that has it open closes it."""

    def __init__(self, conn: ConnectionId, process: Process) -> None:
        self.conn = conn
        self.process = process
        self.keepers = {process}
        self.arrived = False
        self.open = True


class Stage:
    """A daemon's core in its world."""

    def __init__(
        self,
        facts: tuple[DeviceFacts, ...],
        *,
        settings: Settings | None = None,
        pace: Pace | None = None,
        safe_mode: bool = False,
    ) -> None:
        settings = (settings or Settings(epoch="stage"))._replace(keeps=True)
        self.pace = pace or Pace()
        self.world = World(facts)
        self.settings = settings
        self.machine = Machine(settings, safe_mode=safe_mode)
        self.table = Table()
        self.observer = Observer(settings, self.world, safe_mode=safe_mode)
        self.links: dict[ConnectionId, Link] = {}
        self.watched: set[ProcessKey] = set()
        self.driver_open = not safe_mode
        self.steps = 0
        self.trace: deque[str] = deque(maxlen=TRACE_EVENTS)
        self.persisting = False
        # False once a promise was broken: what follows means nothing.
        self.sound = True
        # Which daemon this is: what an earlier one had begun comes to nothing.
        self._life = 0
        self._agenda: list[tuple[int, int, Callable[[], None]]] = []
        self._entries = 0
        self._timer: tuple[int, int] | None = None
        self._reading = False
        self._reading_wanted = False
        self._periodic_on = False
        self._conns = 0
        self._tokens = 0
        if self.driver_open:
            self._later_here(self.pace.probe_ns(), self._probed)

    # Time.

    def advance(self, by_ns: int) -> None:
        """Let time pass, and all that happens in it."""
        self.advance_to(self.world.now_ns + by_ns)

    def advance_to(self, until_ns: int) -> None:
        """Let time pass until a moment."""
        while True:
            due_ns = self._next_ns()
            if due_ns is None or due_ns > until_ns:
                break
            self.world.now_ns = max(self.world.now_ns, due_ns)
            if self._agenda and self._agenda[0][0] <= self.world.now_ns:
                heapq.heappop(self._agenda)[2]()
            else:
                self._timer = None
                self.submit(ev.TimePassed())
        self.world.now_ns = max(self.world.now_ns, until_ns)

    def _next_ns(self) -> int | None:
        dues = [self._agenda[0][0]] if self._agenda else []
        dues += [self._timer[1]] if self._timer else []
        return min(dues, default=None)

    def _later(self, delay_ns: int, action: Callable[[], None]) -> None:
        self._entries += 1
        heapq.heappush(self._agenda, (self.world.now_ns + delay_ns, self._entries, action))

    def _later_here(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Do something later, if this daemon still lives then."""
        life = self._life

        def act() -> None:
            if life == self._life:
                action()

        self._later(delay_ns, act)

    # The turn.

    def submit(self, event: ev.Event) -> list[fx.Effect]:
        """Hand the core one event, check what it does, and carry it out."""
        now_ns = self.world.now_ns
        self.sound = False
        self.trace.append(f"{now_ns / 1e9:.6f} {event}")
        effects = self.machine.handle(event, now_ns)
        self.trace.extend(f"      {brief(effect)}" for effect in effects)
        self.steps += 1
        self.observer.saw(event, effects, now_ns)
        invariants.check(self.machine.state, now_ns)
        self.table.saw(self.machine.state, effects)
        next_ns = self.machine.next_deadline_ns()
        self.observer.check_next_deadline(event, next_ns)
        if next_ns is None:
            self._timer = None
        elif self._timer is None or self._timer[0] != next_ns:
            self._timer = (next_ns, max(now_ns, next_ns) + self.pace.timer_late_ns())
        self.sound = True
        self._believe()
        for effect in effects:
            self._carry_out(effect)
        return effects

    def _believe(self) -> None:
        allowed = self.world.allowed = {}
        for lease in self.observer.books.leases.values():
            if lease.live:
                for uuid, share in lease.shares.items():
                    key = (lease.holder, uuid)
                    allowed[key] = allowed.get(key, 0) + share.memory_mb

    def _carry_out(self, effect: fx.Effect) -> None:
        match effect:
            case fx.TakeReading():
                self.want_reading()
            case fx.WatchProcess(process):
                self.watched.add(process)
                if process not in self.world.processes:
                    self._later(0, lambda: self._tell_end(process))
            case fx.ForgetProcess(process):
                self.watched.discard(process)
            case fx.PersistSettings():
                assert not self.persisting, "one change on its way to the disk at a time"
                self.persisting = True
                failure = "no space left" if self.pace.persist_fails() else None
                self._later_here(self.pace.persist_ns(), lambda: self._persisted(failure))
            case fx.OpenDevices():
                self.driver_open = True
                self._later_here(self.pace.probe_ns(), self._probed)
            case fx.CloseDevices():
                self.driver_open = False
            case _:
                pass

    def _persisted(self, failure: str | None) -> None:
        self.persisting = False
        self.submit(ev.SettingsPersisted(failure))

    # Cards.

    def _probed(self) -> None:
        if not self.driver_open:
            return
        self.tell_devices()
        if self.pace.reading_every_ns and not self._periodic_on:
            self._periodic()

    def _periodic(self) -> None:
        self._periodic_on = self.driver_open
        if self.driver_open:
            self.want_reading()
            self._later_here(self.pace.reading_every_ns, self._periodic)

    def tell_devices(self) -> None:
        """Say which cards there are now."""
        if not self.driver_open:
            return
        found = self.world.found()
        if found:
            self.submit(ev.DevicesFound(found))
            self.want_reading()
        else:
            self.submit(ev.DevicesLost("no card answers"))

    def want_reading(self) -> None:
        """Have all cards read; a reading that has started already does not do."""
        self._reading_wanted = True
        if not self._reading:
            self._reading = True
            self._later_here(self.pace.reading_wait_ns(), self._start_reading)

    def _real_cards(self) -> list[DeviceUuid]:
        return [
            card.uuid
            for card in self.world.cards.values()
            if card.present and card.facts.drain_ns is None
        ]

    def _start_reading(self) -> None:
        self._reading_wanted = False
        started_ns = self.world.now_ns
        first = {uuid: self.world.look(uuid) for uuid in self._real_cards()}
        self._later_here(self.pace.reading_takes_ns(), lambda: self._end_reading(started_ns, first))

    def _end_reading(self, started_ns: int, first: dict[DeviceUuid, Reading]) -> None:
        readings, failures = [], []
        for uuid, early in first.items():
            card = self.world.cards[uuid]
            if card.broken or self.pace.reading_fails():
                failures.append((uuid, card.broken or "did not answer"))
                continue
            late = self.world.look(uuid)
            listed = late if self.pace.listed_last else early
            free_mb = min(early.free_mb, late.free_mb)
            used_mb = card.capacity_mb - free_mb
            readings.append(Reading(uuid, free_mb, used_mb, listed.processes))
        event = ev.ReadingsTaken(started_ns, tuple(readings), tuple(failures))
        self._later_here(self.pace.reading_takes_ns(), lambda: self._deliver(event))

    def _deliver(self, event: ev.ReadingsTaken) -> None:
        self._reading = False
        if not self.driver_open:
            return
        if event.readings or event.failures:
            self.submit(event)
        if self._reading_wanted:
            self.want_reading()

    # Processes and their connections.

    def connect(self, process: Process) -> Link:
        """Open a connection; the core hears of it with its first lease request."""
        self._conns += 1
        link = self.links[ConnectionId(self._conns)] = Link(ConnectionId(self._conns), process)
        return link

    def arrive(self, link: Link) -> None:
        """Tell the core of a connection, if it does not know it."""
        if link.arrived:
            return
        link.arrived = True
        process = link.process
        process.peer = True
        peer = Peer(process.key, process.uid, 0, process.unit, not process.gone)
        if peer.alive:
            self.watched.add(process.key)
        self.submit(ev.ClientArrived(link.conn, peer))

    def lease(self, link: Link, request_id: RequestId, ask: Ask) -> list[fx.Effect]:
        """Ask for a lease; what `explain` says just before has to come true."""
        self.arrive(link)
        self._tokens += 1
        token = Token(f"token-{self._tokens}")
        peer = self.observer.books.peers[link.conn]
        foretold = self.machine.explain(peer, ask, self.world.now_ns, link.conn)
        effects = self.submit(ev.LeaseAsked(link.conn, request_id, ask, token))
        check_foretold(foretold, effects, link.conn, request_id)
        return effects

    def close(self, link: Link) -> None:
        """End a connection."""
        if not link.open:
            return
        link.open = False
        del self.links[link.conn]
        if link.arrived:
            self.submit(ev.ClientLeft(link.conn))

    def kill(self, process: Process) -> None:
        """Kill a process: its connections end soon, its memory comes back later."""
        if not process.running:
            return
        self.world.kill(process)
        self._later(self.pace.hangup_ns(), lambda: self._hang_up(process))
        self._later(self.pace.memory_back_ns(), lambda: self._gone(process))

    def _hang_up(self, process: Process) -> None:
        for link in tuple(self.links.values()):
            link.keepers.discard(process)
            if not link.keepers:
                self.close(link)

    def _gone(self, process: Process) -> None:
        self.world.finish(process)
        self._later(self.pace.pidfd_after_ns(), lambda: self._tell_end(process.key))

    def _tell_end(self, process: ProcessKey) -> None:
        if process in self.watched:
            self.watched.discard(process)
            self.submit(ev.ProcessEnded(process))


def check_foretold(
    foretold: object, effects: list[fx.Effect], conn: ConnectionId, request_id: RequestId
) -> None:
    """Check that a dry run told what then happened."""
    for effect in effects:
        match effect:
            case fx.AnswerGrant(lease) if (lease.conn, lease.request_id) == (conn, request_id):
                assert isinstance(foretold, Plan), f"granted, foretold {foretold}"
                return
            case fx.AnswerDenial() if effect[:2] == (conn, request_id):
                assert effect.denial == foretold, f"{effect.denial}, foretold {foretold}"
                return
            case fx.AnswerError() if effect[:2] == (conn, request_id):
                assert effect.refusal == foretold, f"{effect.refusal}, foretold {foretold}"
                return
            case _:
                continue
    assert not isinstance(foretold, Plan), "waits, although a grant was foretold"


def brief(effect: fx.Effect) -> str:
    """Show an effect in one line of a trace."""
    if isinstance(effect, fx.AnswerGrant):
        lease = effect.lease
        parts = ", ".join(f"{part.device.uuid}:{part.memory_mb}" for part in lease.parts)
        return f"AnswerGrant({lease.conn} {lease.request_id!r} {lease.lease_id} on {parts})"
    return str(effect)
