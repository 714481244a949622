"""A core that dies and is gone on from, again and again: machine, clock, and what was recorded.

No world and no observer: the test says what happens. Every step is checked against the core's own
invariants, and what is recorded against the state; rows pass through msgpack as in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core import invariants
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import (
    Ask,
    Client,
    ConnectionId,
    DeviceFacts,
    Lease,
    Peer,
    ProcessKey,
    RequestId,
    Token,
)
from gpuorchd.core.policy import Policy
from gpuorchd.core.state import Settings, State
from tests.support.recorded import Table
from tests.support.world import SECOND

GRACE_NS = 30 * SECOND


class Core:
    """The core of one daemon after another. `now_ns` is the test's to move."""

    def __init__(self, *cards: DeviceFacts, safe_mode: bool = False, **settings: object) -> None:
        found = {"epoch": "0123456789abcdef", "keeps": True, **settings}
        self.settings = Settings(**found)  # type: ignore[arg-type]  # the test's own names
        self.machine = Machine(self.settings, safe_mode=safe_mode)
        self.cards = cards
        self.now_ns = SECOND
        self.table = Table()
        self.find()

    @property
    def state(self) -> State:
        """The state of the daemon that lives now."""
        return self.machine.state

    def submit(self, event: ev.Event) -> list[fx.Effect]:
        """Hand the core an event; return what it does but recording."""
        effects = self.machine.handle(event, self.now_ns)
        invariants.check(self.state, self.now_ns)
        self.table.saw(self.state, effects)
        return [effect for effect in effects if not isinstance(effect, fx.Commit)]

    def find(self) -> None:
        """Let the core find its cards."""
        if self.cards and not self.state.safe_mode:
            self.submit(ev.DevicesFound(self.cards))

    def wait(self, by_ns: int) -> list[fx.Effect]:
        """Let time pass, and the core do what is due."""
        until_ns = self.now_ns + by_ns
        effects: list[fx.Effect] = []
        while (due_ns := self.machine.next_deadline_ns()) is not None and due_ns <= until_ns:
            self.now_ns = max(self.now_ns, due_ns)
            effects += self.submit(ev.TimePassed())
        self.now_ns = until_ns
        return effects

    def arrive(self, conn: int, pid: int | None = None, uid: int = 1_000) -> ConnectionId:
        """Let a process connect; its pid is the connection's number unless another is given."""
        found = ConnectionId(conn)
        self.submit(ev.ClientArrived(found, Peer(process(pid or conn), uid)))
        return found

    def lease(
        self, conn: int, request_id: RequestId, memory_mb: int, wait_s: float = 0, **ask: object
    ) -> list[fx.Effect]:
        """Ask for a lease; its token is made of connection and id."""
        asked = Ask("agent", memory_mb, wait_ns=int(wait_s * SECOND), **ask)  # type: ignore[arg-type]  # as above
        token = token_of(conn, request_id)
        return self.submit(ev.LeaseAsked(ConnectionId(conn), request_id, asked, token))

    def held(self, conn: int, request_id: RequestId) -> Lease:
        """The lease that a request was granted, while it keeps anything."""
        token = token_of(conn, request_id)
        return next(lease for lease in self.state.leases.values() if lease.token == token)

    def client(self, conn: int) -> Client:
        """A connection."""
        return self.state.clients[ConnectionId(conn)]

    def repeat(self, conn: int, request_id: RequestId) -> list[fx.Effect]:
        """Ask again, as the server does for an id that is among the repeats."""
        assert request_id in (self.client(conn).repeats or {}), "it would be taken for a new one"
        return self.submit(ev.RequestRepeated(ConnectionId(conn), request_id))

    def restart(
        self,
        attached: Iterable[int] | None = None,
        lost: Iterable[int] = (),
        *,
        policy: Policy | None = None,
        safe_mode: bool | None = None,
        cordons: Mapping[str, str] | None = None,
        settled: ev.Settled | None = None,
        find: bool = True,
    ) -> list[fx.Effect]:
        """Let the daemon die and another go on. All connections are still there unless told."""
        old = self.state
        everyone = [conn for conn in old.clients if conn not in set(lost)]
        here = frozenset(ConnectionId(x) for x in (everyone if attached is None else attached))
        gone = frozenset(ConnectionId(x) for x in lost)
        self.machine = Machine(
            self.settings,
            policy=policy or old.policy,
            revision=old.revision + (policy is not None),
            safe_mode=old.safe_mode if safe_mode is None else safe_mode,
            cordons=old.cordons if cordons is None else cordons,
        )
        restored = ev.Restored(self.table.kept(), here, gone, GRACE_NS, settled)
        effects = self.submit(restored)
        effects += self.submit(ev.ClientsGreeted())
        if find:
            self.find()
        return effects

    def reattach(
        self, conn: int, lease_token: Token, request_id: RequestId = "back", digest: str = "none"
    ) -> list[fx.Effect]:
        """Ask for a detached lease."""
        found = ConnectionId(conn)
        return self.submit(ev.ReattachAsked(found, request_id, lease_token, Token(digest)))


def process(pid: int) -> ProcessKey:
    """A process by its number."""
    return ProcessKey(pid, 10 * pid)


def token_of(conn: int, request_id: RequestId) -> Token:
    """The token of the lease that a request is granted."""
    return Token(f"token {conn} {request_id}")


def answers(effects: Sequence[fx.Effect]) -> list[fx.Effect]:
    """Those effects that answer somebody."""
    kinds = fx.AnswerGrant | fx.AnswerDenial | fx.Answer | fx.AnswerPolicy | fx.AnswerError
    return [effect for effect in effects if isinstance(effect, kinds)]


def told(effects: Sequence[fx.Effect], name: str) -> list[fx.Announce]:
    """Those that announce an event."""
    return [x for x in effects if isinstance(x, fx.Announce) and x.name == name]


def code(effects: Sequence[fx.Effect]) -> str:
    """The code of the one error that is answered."""
    (effect,) = answers(effects)
    assert isinstance(effect, fx.AnswerError), effect
    return str(effect.refusal.code)
