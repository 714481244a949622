"""What agents, admins and strangers do on the stage, move by move.

Every move is given all that it needs: nothing is chosen here, so a random simulator and a rule
machine that shrinks can both play it. A move that is impossible now does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpuorchd.core import events as ev
from gpuorchd.core.model import Ask, ConnectionId, DeviceUuid, Token
from tests.support.entries import Held
from tests.support.stage import Link, Stage
from tests.support.world import SECOND, Process

# Connections of admins, who lease nothing.
ADMIN = ConnectionId(1_000_000)


class Cast:
    """Agents and strangers by what they do. Lists are in order of appearance."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.strays: list[Process] = []
        self._requests = 0

    # Who is there.

    def agents(self) -> list[Process]:
        """List the processes that run and are no strays."""
        return [
            process
            for process in self.stage.world.processes.values()
            if process.running and process not in self.strays
        ]

    def links(self) -> list[Link]:
        """List the open connections of processes that run."""
        return [link for link in self.stage.links.values() if link.process.running]

    def held(self) -> list[Held]:
        """List the live leases whose holder runs."""
        running = {process.key for process in self.agents()}
        leases = self.stage.observer.books.leases.values()
        held = [x for x in leases if x.live and x.detached_ns is None]
        return [lease for lease in held if lease.holder in running]

    def _request(self) -> int:
        self._requests += 1
        return self._requests

    # Agents.

    def appear(self, uid: int, unit: str | None) -> Link:
        """Start an agent with one connection."""
        return self.stage.connect(self.stage.world.spawn(uid=uid, unit=unit))

    def ask(self, link: Link, ask: Ask, *, named: bool = True) -> None:
        """Ask for a lease, at times (in text mode) without an id."""
        self.stage.lease(link, self._request() if named else None, ask)

    def release(self, lease: Held, keep_mb: int) -> None:
        """Release a lease properly, keeping so much memory on each card all the same."""
        self.shrink_to_fit(lease, keep_mb)
        self.stage.submit(ev.ReleaseAsked(lease.conn, self._request(), lease.token))

    def shrink_to_fit(self, lease: Held, keep_mb: int) -> None:
        """Give back what the lease's tree uses beyond its other leases and `keep_mb`."""
        world = self.stage.world
        root = world.processes.get(lease.holder)
        if root is None:
            return
        for uuid, share in lease.shares.items():
            left_mb = world.allowed.get((lease.holder, uuid), 0) - share.memory_mb + keep_mb
            tree = [process for process in self.agents() if process.root() is root]
            for process in tree:
                used_mb = process.uses.get(uuid, 0)
                stays_mb = min(used_mb, max(0, left_mb))
                world.shrink(process, uuid, used_mb - stays_mb)
                left_mb -= stays_mb

    def release_by(self, link: Link, token: Token) -> None:
        """Ask for the release of a lease that may be somebody else's."""
        self.stage.submit(ev.ReleaseAsked(link.conn, self._request(), token))

    def renew(self, lease: Held) -> None:
        """Ask for more time."""
        self.stage.submit(ev.RenewAsked(lease.conn, self._request(), lease.token))

    def cancel(self, conn: ConnectionId, target: int | str) -> None:
        """Take back a request that waits, or that does not."""
        self.stage.submit(ev.CancelAsked(conn, self._request(), target))

    def seal(self, link: Link, signal: str | None) -> None:
        """Ask that a connection only hold from now on."""
        if link.arrived:
            self.stage.submit(ev.SealAsked(link.conn, self._request(), signal))

    def fork(self, parent: Process, *, inherits: bool) -> Process:
        """Fork; the child may keep the parent's connections open."""
        child = self.stage.world.spawn(parent)
        if inherits:
            for link in self.stage.links.values():
                if parent in link.keepers:
                    link.keepers.add(child)
        return child

    def grow(self, process: Process, uuid: DeviceUuid, memory_mb: int) -> None:
        """Allocate within the leases, as an agent that keeps to them."""
        self.stage.world.grow(process, uuid, memory_mb)

    # Strangers.

    def stray(self, uuid: DeviceUuid, memory_mb: int) -> None:
        """Let a process outside the system take memory."""
        process = self.stage.world.spawn(uid=0)
        self.strays.append(process)
        self.stage.world.grow_wild(process, uuid, memory_mb)

    # Admins.

    def change_policy(self, changes: Mapping[str, object], if_revision: int | None = None) -> None:
        """Ask for a change of policy."""
        self.stage.submit(ev.PolicyChangeAsked(ADMIN, self._request(), changes, if_revision, {}))

    def cordon(self, gpu: str | int, reason: str | None) -> None:
        """Cordon a card, or with no reason take the cordon back."""
        self.stage.submit(ev.CordonAsked(ADMIN, self._request(), gpu, reason))

    def revoke(self, lease_id: str, grace_ns: int) -> None:
        """Take a lease away."""
        self.stage.submit(ev.RevokeAsked(ADMIN, self._request(), lease_id, grace_ns, "wanted"))

    # Everybody.

    def settle(self) -> None:
        """Undo every disturbance: nothing is broken, cordoned, missing or odd any more."""
        stage, world = self.stage, self.stage.world
        for process in list(self.strays):
            stage.kill(process)
        self.strays.clear()
        for process in world.processes.values():
            process.opaque = False
        gone = False
        for card in world.cards.values():
            card.broken = None
            gone = gone or not card.present
            card.present = True
        self.change_policy({"safe_mode": False})
        self.change_policy(dict.fromkeys(("agents", "max_memory_per_agent_mb")))
        self.change_policy(dict.fromkeys(("allow_fractional_shares", "drain_timeout_s")))
        if gone:
            stage.tell_devices()
        stage.advance(SECOND)
        for uuid in world.cards:
            self.cordon(uuid, None)
        stage.advance(SECOND)

    def converge(self, rounds: int = 400) -> None:
        """Let everybody come to an end properly: all are served, and nothing stays behind."""
        self.settle()
        stage = self.stage
        for _ in range(rounds):
            if not stage.observer.waiting:
                break
            for lease in self.held():
                self.release(lease, keep_mb=0)
            for process in self.agents():
                for uuid, used_mb in tuple(process.uses.items()):
                    allowed_mb = stage.world.allowed.get((process.root().key, uuid), 0)
                    stage.world.shrink(process, uuid, max(0, used_mb - allowed_mb))
            stage.advance(SECOND // 4)
        assert not stage.observer.waiting, f"never served: {stage.observer.waiting}"
        for process in self.agents():
            stage.kill(process)
        stage.advance(30 * SECOND)
        for link in tuple(stage.links.values()):
            stage.close(link)
        stage.advance(30 * SECOND)
        check_empty(stage)
        self.check_whole_again()

    def check_whole_again(self) -> None:
        """Check that every card can be had whole, at once."""
        for card in tuple(self.stage.world.cards.values()):
            link = self.appear(0, None)
            granted = self.stage.observer.granted_total
            self.ask(link, Ask("last", card.capacity_mb, devices=(card.uuid,)))
            assert self.stage.observer.granted_total == granted + 1, f"{card.uuid} is not free"
            self.stage.kill(link.process)
            self.stage.advance(15 * SECOND)
        check_empty(self.stage)


def check_empty(stage: Stage) -> None:
    """Check that the core keeps nothing when everybody has left."""
    stage.observer.check_settled()
    state = stage.machine.state
    bytes_left = {uuid: stage.world.used_mb(uuid) for uuid in stage.world.cards}
    left: dict[str, object] = {
        "leases": state.leases,
        "tokens": state.tokens,
        "clients": state.clients,
        "holders": state.holders,
        "watched": state.watched,
        "queue": list(state.queue),
        "holders_by_uid": {uid: n for uid, n in state.holders_by_uid.items() if n},
        "leases_by_uid": {uid: n for uid, n in state.leases_by_uid.items() if n},
        "waiting_by_uid": {uid: n for uid, n in state.waiting_by_uid.items() if n},
        "pidfds": stage.watched,
        "bytes": {uuid: used_mb for uuid, used_mb in bytes_left.items() if used_mb},
        "deadline": stage.machine.next_deadline_ns(),
    }
    kept = {name: value for name, value in left.items() if value}
    assert not kept, f"still kept: {kept}"
    for device in state.devices.values():
        assert not device.parts, f"{device.uuid} still has {device.parts}"
        assert not device.claim_mb
        assert not device.draining_mb
        assert not device.charges
