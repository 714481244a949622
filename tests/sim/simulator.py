"""A seeded simulation: random moves with faults on, then faults off, and it must come to rest.

`Simulation(seed).run(steps)` plays acts. An act is some hundred events in a world whose cards,
limits and troubles are drawn from the seed; the observer and the core's own invariants judge every
event (safety). Then all troubles end, everybody is served and leaves, and nothing may be left
(liveness). One `random.Random` makes every choice, so a seed tells the whole story.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from gpuorchd.core import events as ev
from gpuorchd.core.model import NS_PER_S, Ask, DeviceFacts, DeviceUuid, Priority, Token
from gpuorchd.core.state import Limits, Settings
from tests.support.cast import Cast
from tests.support.pace import RandomPace
from tests.support.restarted import restart
from tests.support.stage import Stage
from tests.support.world import MS, SECOND, Process, card

AGENTS = ("analyst", "scout", "critic", "memory", "balancer")
# Events of one act, before it comes to rest.
ACT_STEPS = 1_500
SMALL_LIMITS = Limits(
    holders=6,
    holders_per_uid=5,
    leases=9,
    leases_per_uid=8,
    leases_per_connection=4,
    waiting=7,
    waiting_per_uid=6,
    waiting_per_connection=3,
)


class Simulation:
    """One seed's story."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.steps = 0
        self.acts = 0
        self.grants = 0
        self.denials = 0
        self.cast = Cast(Stage(()))
        self.stage = self.cast.stage
        self.strays = "none"

    def run(self, steps: int) -> None:
        """Play acts until so many events were handled."""
        while self.steps < steps:
            self.play(min(ACT_STEPS, steps - self.steps))

    def play(self, steps: int) -> None:
        """Play one act and let it come to rest."""
        self._set_up()
        stage, pace = self.stage, self.stage.pace
        moves, weights = self._moves()
        try:
            while stage.steps < steps:
                self.rng.choices(moves, weights)[0]()
                self._pass_time()
                if self._faithful:
                    assert not stage.world.ooms, f"out of memory within leases: {stage.world.ooms}"
            assert isinstance(pace, RandomPace)
            pace.faults = False
            self.cast.converge()
        except Exception as error:
            # Whatever goes wrong, the story that led there is what helps.
            error.add_note(self.story())
            raise
        self.steps += stage.steps
        self.acts += 1
        self.grants += stage.observer.granted_total
        self.denials += stage.observer.denied_total

    def story(self) -> str:
        """Tell how to see this again, and what happened last."""
        command = f"python -m tests.sim --seed {self.seed} --steps {self.steps + ACT_STEPS}"
        return "\n".join([f"again: {command}", *self.stage.trace])

    def _set_up(self) -> None:
        rng = self.rng
        kind = rng.choice(("real", "real", "simulated", "mixed"))
        drain_ms = rng.choice((0, 100, 12_000))
        count = rng.choice((1, 1, 2, 3, 4))
        facts = tuple(self._card(index, kind, drain_ms) for index in range(count))
        settings = Settings(
            epoch=f"act-{self.acts}",
            limits=SMALL_LIMITS if rng.random() < 0.3 else Limits(),
            ttl_ns=rng.choice((0, 0, 5 * SECOND)),
        )
        pace = RandomPace(rng)
        self.stage = Stage(facts, settings=settings, pace=pace, safe_mode=rng.random() < 0.1)
        self.cast = Cast(self.stage)
        self.strays = rng.choice(("none", "early", "wild"))
        if self.strays == "early":
            for uuid in self.stage.world.cards:
                self.cast.stray(uuid, rng.randrange(1, 3_000))
        self._units = rng.random() < 0.4
        self._troubled = rng.random() < 0.5
        self._unit = 0
        self._nested = rng.random() < 0.2
        # Nobody takes memory behind the core's back, and no child takes some of its parent's lease
        # along when it becomes a holder itself: then no allocation within a lease may ever fail.
        self._faithful = self.strays != "wild" and not self._nested

    def _card(self, index: int, kind: str, drain_ms: int) -> DeviceFacts:
        total_mb = self.rng.choice((8_000, 8_000, 10_000, 24_576))
        simulated = kind == "simulated" or (kind == "mixed" and index % 2 == 1)
        if simulated:
            return card(index, total_mb, drain_ms=drain_ms)
        return card(index, total_mb, reserved_mb=self.rng.choice((0, 615)))

    def _moves(self) -> tuple[list[Callable[[], None]], list[int]]:
        table: list[tuple[Callable[[], None], int]] = [
            (self._appear, 6),
            (self._ask, 28),
            (self._release, 12),
            (self._renew, 4),
            (self._cancel, 3),
            (self._wrong, 2),
            (self._seal, 2 if self._troubled else 0),
            (self._close, 2),
            (self._kill, 6),
            (self._fork, 8),
            (self._grow, 40),
            (self._shrink, 4),
            (self._admin, 3),
            (self._trouble, 2 if self._troubled else 0),
            (self._spurious, 1),
            (self._restart, 1),
            (self._stray, 3 if self.strays == "wild" else 0),
        ]
        return [move for move, _ in table], [weight for _, weight in table]

    def _pass_time(self) -> None:
        draw = self.rng.random()
        if draw < 0.5:
            return
        if draw < 0.9:
            self.stage.advance(self.rng.randrange(60 * MS))
        elif draw < 0.995:
            self.stage.advance(self.rng.randrange(SECOND))
        else:
            self.stage.advance(self.rng.randrange(12 * SECOND))

    # Moves.

    def _uuid(self) -> DeviceUuid:
        return self.rng.choice(tuple(self.stage.world.cards))

    def _agent(self) -> Process | None:
        agents = self.cast.agents()
        return self.rng.choice(agents) if agents else None

    def _appear(self) -> None:
        if len(self.cast.agents()) >= 9:
            return
        unit = None
        if self._units:
            # One service per agent, as it should be; where anything goes, some share one.
            self._unit += 1
            number = self.rng.randrange(6) if self.strays == "wild" else self._unit
            unit = f"unit-{number}.service"
        link = self.cast.appear(1_000 + self.rng.randrange(2), unit)
        if self.rng.random() < 0.3:
            self.stage.connect(link.process)

    def _ask(self) -> None:
        links = self.cast.links()
        if not links or len(self.stage.observer.waiting) > 10:
            return
        link = self.rng.choice(links)
        rng = self.rng
        cards = self.stage.world.cards
        gpus = 1 if rng.random() < 0.8 else rng.randrange(1, len(cards) + 2)
        named = tuple(
            rng.choice((each.uuid, each.facts.index))
            for each in cards.values()
            if rng.random() < 0.7
        )
        wait_ns = rng.choice((0, NS_PER_S // 2, 5 * NS_PER_S, 60 * NS_PER_S, 60 * NS_PER_S))
        ask = Ask(
            agent=rng.choice(AGENTS),
            memory_mb=rng.choice(
                (0, 500, 500, 2_000, 2_000, 4_000, 6_500, rng.randrange(1, 26_000))
            ),
            gpus=gpus,
            exclusive=rng.random() < 0.1,
            priority=rng.choice((None, *Priority)),
            wait_ns=wait_ns,
            devices=named if rng.random() < 0.2 else (),
        )
        self.cast.ask(link, ask, named=wait_ns > 0 or rng.random() < 0.8)

    def _release(self) -> None:
        held = self.cast.held()
        if held:
            keep_mb = self.rng.choice((0, 0, 500, 3_000))
            self.cast.release(self.rng.choice(held), keep_mb)

    def _renew(self) -> None:
        held = self.cast.held()
        if held:
            self.cast.renew(self.rng.choice(held))

    def _cancel(self) -> None:
        waiting = self.stage.observer.waiting
        if not waiting:
            return
        waiter = self.rng.choice(waiting)
        links = self.cast.links()
        conn = waiter.conn if self.rng.random() < 0.8 or not links else self.rng.choice(links).conn
        if waiter.request_id is not None:
            self.cast.cancel(conn, waiter.request_id)

    def _wrong(self) -> None:
        links = self.cast.links()
        if not links:
            return
        link = self.rng.choice(links)
        leases = list(self.stage.observer.books.leases.values())
        token = self.rng.choice(leases).token if leases else Token("nobody's")
        if self.rng.random() < 0.3:
            token = Token("nobody's")
        mine = any(lease.token == token and lease.conn == link.conn for lease in leases)
        if not mine:
            self.cast.release_by(link, token)

    def _seal(self) -> None:
        links = self.cast.links()
        if links:
            self.cast.seal(self.rng.choice(links), self.rng.choice((None, "TERM")))

    def _close(self) -> None:
        links = self.cast.links()
        if links:
            self.stage.close(self.rng.choice(links))

    def _kill(self) -> None:
        agent = self._agent()
        if agent is not None:
            self.stage.kill(agent)

    def _fork(self) -> None:
        agent = self._agent()
        if agent is None or len(self.cast.agents()) >= 14:
            return
        draw = self.rng.random()
        if draw < 0.3:
            child = self.stage.world.spawn_detached(agent)
        else:
            child = self.cast.fork(agent, inherits=draw < 0.45)
        if self._nested and self.rng.random() < 0.3:
            self.stage.connect(child)

    def _grow(self) -> None:
        agent = self._agent()
        if agent is not None:
            self.cast.grow(agent, self._uuid(), self.rng.randrange(200, 12_000))

    def _shrink(self) -> None:
        agent = self._agent()
        if agent is not None:
            self.stage.world.shrink(agent, self._uuid(), self.rng.randrange(6_000))

    def _stray(self) -> None:
        draw = self.rng.random()
        strays = [process for process in self.cast.strays if process.running]
        if draw < 0.4 or not strays:
            if len(strays) < 3:
                self.cast.stray(self._uuid(), self.rng.randrange(100, 6_000))
        elif draw < 0.7:
            self.stage.world.grow_wild(
                self.rng.choice(strays), self._uuid(), self.rng.randrange(2_000)
            )
        else:
            self.stage.kill(self.rng.choice(strays))

    def _spurious(self) -> None:
        self.stage.submit(ev.TimePassed())

    def _restart(self) -> None:
        links = list(self.stage.links.values())
        gone = self.rng.sample(links, min(len(links), self.rng.choice((0, 0, 1, 3))))
        restart(self.stage, gone, emptied=self.rng.random() < 0.4)

    def _admin(self) -> None:
        rng = self.rng
        if self.stage.machine.state.safe_mode:
            # Not for long: nothing is granted meanwhile.
            also = self._changes() if rng.random() < 0.3 else {}
            self.cast.change_policy({**also, "safe_mode": rng.random() < 0.1})
            return
        match rng.randrange(7):
            case 0:
                gpu = rng.choice((self._uuid(), 0, 99))
                self.cast.cordon(gpu, rng.choice(("hot", None)))
            case 1 | 2:
                self.cast.cordon(self._uuid(), None)
            case 3 | 4:
                leases = list(self.stage.observer.books.leases.values())
                name = rng.choice(leases).lease_id if leases else "nothing"
                self.cast.revoke(name, rng.choice((0, SECOND, 10 * SECOND)))
            case 5:
                self.cast.change_policy(self._changes(), rng.choice((None, None, None, 1)))
            case _:
                if rng.random() < 0.15:
                    self.cast.change_policy({"safe_mode": True})

    def _changes(self) -> dict[str, object]:
        rng = self.rng
        changes: dict[str, object] = {
            "max_memory_per_agent_mb": rng.choice((0, 0, None, 4_000, 9_000)),
            "allow_fractional_shares": rng.choice((True, True, None, False)),
            "default_memory_mb": rng.choice((None, 1_000, 3_000)),
            "exclusive_stray_mb": rng.choice((0, 512, 2_000)),
            "safe_mode_grace_s": rng.choice((0, 2, 30)),
            "drain_timeout_s": rng.choice((None, 2.5, 15)),
            "agents": rng.choice(
                (
                    None,
                    {},
                    {"scout": {"gpu": False}, "critic": {"max_memory_mb": 2_000}},
                    {"*": {"default_memory_mb": 700, "priority": "background"}},
                    {"scout": {"users": [1_000]}, "critic": {"priority": "critical"}},
                    {"analyst": {"max_priority": "normal"}, "*": {"max_memory_mb": 6_000}},
                )
            ),
            "no_such_field": 1,
            "kill_on_oom": "perhaps",
        }
        weights = [3] * (len(changes) - 2) + [1, 1]
        names = rng.choices(list(changes), weights, k=rng.choice((1, 1, 2)))
        return {name: changes[name] for name in names}

    def _trouble(self) -> None:
        rng = self.rng
        cards = self.stage.world.cards
        each = cards[self._uuid()]
        ill = [other for other in cards.values() if other.broken]
        away = [other for other in cards.values() if not other.present]
        if ill and rng.random() < 0.7:
            rng.choice(ill).broken = None
        elif away and rng.random() < 0.7:
            rng.choice(away).present = True
            self.stage.tell_devices()
        elif rng.random() < 0.4:
            each.broken = "it hangs"
        elif rng.random() < 0.5:
            each.present = False
            self.stage.tell_devices()
        else:
            agent = self._agent()
            if agent is not None:
                agent.opaque = not agent.opaque
