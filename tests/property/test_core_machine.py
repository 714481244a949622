"""The core under a rule machine: Hypothesis looks for a story that breaks a promise.

The moves, the observer and the world are those of the seeded simulation; here every choice is
drawn, so that a failure shrinks to the few moves that it needs. When a story ends everybody is
served and leaves, and nothing may be left.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gpuorchd.core import events as ev
from gpuorchd.core.model import Ask, DeviceUuid, Priority, Token
from gpuorchd.core.state import Limits, Settings
from tests.support.cast import Cast
from tests.support.pace import Pace
from tests.support.stage import Stage
from tests.support.world import MS, SECOND, card

T = TypeVar("T")
PICK = st.integers(0, 9)
MEMORY_MB = st.sampled_from((500, 0, 1_000, 4_000, 8_000, 10_000, 10_001))
WAIT_NS = st.sampled_from((60 * SECOND, 0, SECOND // 2))
PRIORITY = st.sampled_from((None, *Priority))
ASK = st.builds(
    Ask,
    agent=st.sampled_from(("analyst", "scout")),
    memory_mb=MEMORY_MB,
    gpus=st.sampled_from((1, 1, 2)),
    exclusive=st.booleans(),
    priority=PRIORITY,
    wait_ns=WAIT_NS,
    devices=st.sampled_from(((), (0,), ("GPU-1",))),
)
TROUBLES = ("stray", "small stray", "break", "vanish", "wake", "blur")
ADMIN_MOVES = ("revoke", "cordon", "uncordon", "policy", "SAFE_MODE", "no SAFE_MODE")
CHANGES: tuple[dict[str, object], ...] = (
    {"max_memory_per_agent_mb": 4_000},
    {"max_memory_per_agent_mb": None, "agents": None},
    {"allow_fractional_shares": False},
    {"allow_fractional_shares": None},
    {"agents": {"scout": {"gpu": False}}},
    {"agents": {"*": {"max_priority": "normal", "default_memory_mb": 700}}},
    {"drain_timeout_s": 1, "safe_mode_grace_s": 1},
    {"nonsense": 1},
)
TIGHT = Limits(
    holders=3, holders_per_uid=2, leases=4, leases_per_connection=2, waiting=3, waiting_per_uid=2
)


def pick(entries: Sequence[T], number: int) -> T | None:
    return entries[number % len(entries)] if entries else None


class SlowReadings(Pace):
    def reading_takes_ns(self) -> int:
        return 600 * MS


class CoreMachine(RuleBasedStateMachine):
    @initialize(
        sizes=st.lists(st.sampled_from((10_000, 8_000)), min_size=1, max_size=3),
        drain_ms=st.sampled_from((None, None, 100, 0)),
        ttl_s=st.sampled_from((0, 0, 5)),
        tight=st.booleans(),
        slow=st.booleans(),
        found=st.booleans(),
    )
    def open(
        self,
        sizes: list[int],
        drain_ms: int | None,
        ttl_s: int,
        tight: bool,
        slow: bool,
        found: bool,
    ) -> None:
        facts = tuple(card(index, mb, drain_ms=drain_ms) for index, mb in enumerate(sizes))
        settings = Settings(
            epoch="rules", limits=TIGHT if tight else Limits(), ttl_ns=ttl_s * SECOND
        )
        self.stage = Stage(facts, settings=settings, pace=SlowReadings() if slow else Pace())
        self.cast = Cast(self.stage)
        self.cast.appear(1000, None)
        self.cast.appear(1001, None)
        if found:
            self.stage.advance(2 * SECOND)

    def uuid(self, number: int) -> DeviceUuid:
        cards = list(self.stage.world.cards)
        return cards[number % len(cards)]

    # Agents.

    @rule(uid=st.sampled_from((1000, 1001)), unit=st.sampled_from((None, "own.service")))
    def appear(self, uid: int, unit: str | None) -> None:
        if len(self.cast.agents()) < 6:
            self.cast.appear(uid, unit)

    @rule(who=PICK, ask=ASK)
    def ask(self, who: int, ask: Ask) -> None:
        link = pick(self.cast.links(), who)
        if link is not None:
            self.cast.ask(link, ask, named=ask.wait_ns > 0)

    @rule(who=PICK, memory_mb=MEMORY_MB)
    def ask_at_once(self, who: int, memory_mb: int) -> None:
        self.ask(who, Ask("analyst", memory_mb))

    @rule(who=PICK, memory_mb=MEMORY_MB, priority=PRIORITY)
    def ask_and_wait(self, who: int, memory_mb: int, priority: Priority | None) -> None:
        self.ask(who, Ask("scout", memory_mb, priority=priority, wait_ns=60 * SECOND))

    @rule(which=PICK, keep_mb=st.sampled_from((0, 0, 500)))
    def release(self, which: int, keep_mb: int) -> None:
        lease = pick(self.cast.held(), which)
        if lease is not None:
            self.cast.release(lease, keep_mb)

    @rule(
        who=PICK, which=PICK, what=st.sampled_from(("connect", "renew", "cancel", "steal", "seal"))
    )
    def fuss(self, who: int, which: int, what: str) -> None:
        link = pick(self.cast.links(), who)
        lease = pick(list(self.stage.observer.books.leases.values()), which)
        waiter = pick(self.stage.observer.waiting, which)
        if link is None:
            return
        if what == "connect" and len(self.stage.links) < 8:
            self.stage.connect(link.process)
        elif what == "renew" and lease in self.cast.held():
            self.cast.renew(lease)
        elif what == "cancel" and waiter is not None and waiter.request_id is not None:
            self.cast.cancel(waiter.conn, waiter.request_id)
        elif what == "steal" and (lease is None or lease.conn != link.conn):
            self.cast.release_by(link, lease.token if lease else Token("nobody's"))
        elif what == "seal":
            self.cast.seal(link, "TERM" if which % 2 else None)

    @rule(who=PICK, how=st.sampled_from(("kill", "close")))
    def leave(self, who: int, how: str) -> None:
        link = pick(self.cast.links(), who)
        if link is not None and how == "close":
            self.stage.close(link)
        elif link is not None:
            self.stage.kill(link.process)

    @rule(who=PICK, how=st.sampled_from(("plain", "inherits", "detached")))
    def fork(self, who: int, how: str) -> None:
        agent = pick(self.cast.agents(), who)
        if agent is None or len(self.cast.agents()) >= 9:
            return
        if how == "detached":
            self.stage.world.spawn_detached(agent)
        else:
            self.cast.fork(agent, inherits=how == "inherits")

    @rule(who=PICK, where=PICK, memory_mb=st.sampled_from((10_000, 500, 3_000)))
    def grow(self, who: int, where: int, memory_mb: int) -> None:
        world = self.stage.world
        agent = pick(self.cast.agents(), who)
        if agent is not None:
            self.cast.grow(agent, self.uuid(where), memory_mb)
        # Without strays, and with no service that several share, nobody may be left short.
        shared = any(process.unit for process in world.processes.values())
        assert world.wild_mb or shared or not world.ooms, world.ooms

    @rule(who=PICK, where=PICK, memory_mb=st.sampled_from((10_000, 500)))
    def shrink(self, who: int, where: int, memory_mb: int) -> None:
        agent = pick(self.cast.agents(), who)
        if agent is not None:
            self.stage.world.shrink(agent, self.uuid(where), memory_mb)

    # Everything else.

    @rule(by_ns=st.sampled_from((10 * MS, 0, 100 * MS, 250 * MS, 500 * MS)))
    def pass_time(self, by_ns: int) -> None:
        self.stage.advance(by_ns)

    @rule(by_ns=st.sampled_from((SECOND, 3 * SECOND, 10 * SECOND)))
    def pass_much_time(self, by_ns: int) -> None:
        self.stage.advance(by_ns)

    @rule(
        where=PICK,
        what=st.sampled_from(("stray", "small stray", "break", "vanish", "wake", "blur")),
    )
    def trouble(self, where: int, what: str) -> None:
        each = self.stage.world.cards[self.uuid(where)]
        agent = pick(self.cast.agents(), where)
        if what == "break":
            each.broken = None if each.broken else "it hangs"
        elif what == "vanish":
            each.present = not each.present
            self.stage.tell_devices()
        elif what == "wake":
            self.stage.submit(ev.TimePassed())
        elif what == "blur" and agent is not None:
            agent.opaque = not agent.opaque
        elif len(self.cast.strays) < 3:
            self.cast.stray(each.uuid, 5_000 if what == "stray" else 500)

    @rule(
        where=PICK,
        what=st.sampled_from(
            ("revoke", "cordon", "uncordon", "policy", "SAFE_MODE", "no SAFE_MODE", "reload")
        ),
        changes=st.sampled_from(CHANGES),
    )
    def admin(self, where: int, what: str, changes: dict[str, object]) -> None:
        lease = pick(list(self.stage.observer.books.leases.values()), where)
        match what:
            case "revoke":
                grace_ns = SECOND if where % 2 else 0
                self.cast.revoke(lease.lease_id if lease else "nothing", grace_ns)
            case "cordon" | "uncordon":
                self.cast.cordon(self.uuid(where), "hot" if what == "cordon" else None)
            case "policy":
                self.cast.change_policy(changes)
            case "reload":
                limits = self.stage.machine.state.settings.limits
                # No less than the slowest readings need.
                ttl_ns, age_ns = (0, 5 * SECOND)[where % 2], (4 + where % 3) * SECOND
                self.stage.submit(ev.ConfigurationRead(limits, ttl_ns, age_ns))
            case _:
                self.cast.change_policy({"safe_mode": what == "SAFE_MODE"})

    @precondition(lambda self: len(self.stage.observer.waiting) > 1)
    @rule()
    def hold_still(self) -> None:
        self.stage.advance(70 * SECOND)
        assert not self.stage.observer.waiting, "a wait of a minute ends after a minute"

    def teardown(self) -> None:
        # After a broken promise what follows means nothing, and would hide it.
        stage: Stage | None = getattr(self, "stage", None)
        if stage is not None and stage.sound:
            self.cast.converge()


CoreMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("RULE_EXAMPLES", "400")),
    stateful_step_count=50,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    print_blob=True,
)
TestNoStoryBreaksAPromise = CoreMachine.TestCase
