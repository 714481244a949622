"""The daemon of a stage dies and another goes on; connections go on, end, or are lost with it.

Where the store was emptied every connection is lost: processes that live come back after a while,
some of them too late, and ask for their leases by token.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpuorchd.core import events as ev
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import ConnectionId, Token
from tests.support.stage import Link, Stage
from tests.support.world import SECOND, Process

GRACE_NS = 3 * SECOND


def restart(stage: Stage, vanishing: Sequence[Link] = (), *, emptied: bool = False) -> None:
    """Let the daemon die, and another go on from what it recorded.

    `vanishing` end meanwhile: nobody is there to hear of it. `emptied`: nothing was stored.
    """
    for link in vanishing:
        link.open = False
        del stage.links[link.conn]
    books, running = stage.observer.books, stage.world.processes
    held = [x for x in books.leases.values() if x.live and x.holder in running]
    leases = [(x.conn, x.token, running[x.holder]) for x in held]
    go_on(stage, emptied=emptied)
    if stage.driver_open:
        stage._later_here(stage.pace.probe_ns(), stage._probed)
    backs: dict[ConnectionId, list[Token]] = {}
    for conn, token, process in leases if emptied else ():
        if conn not in backs:
            backs[conn] = []
            _come_back_later(stage, process, backs[conn])
        backs[conn].append(token)


def go_on(stage: Stage, *, emptied: bool) -> None:
    """Let another daemon go on with the connections that are open, or with none.

    What waits is asked again at once. Nothing else happens by itself.
    """
    attached = frozenset(conn for conn, link in stage.links.items() if link.arrived)
    lost: frozenset[ConnectionId] = frozenset()
    if emptied:
        # Whoever vanished is not told apart from who was lost: its process may come back too.
        attached, lost = frozenset(), frozenset(stage.observer.books.peers)
        for link in stage.links.values():
            link.open = False
        stage.links.clear()
    old = stage.machine.state
    stage._life += 1
    stage._timer = None
    stage.persisting = stage._reading = stage._reading_wanted = stage._periodic_on = False
    stage.watched = set()
    stage.driver_open = not old.safe_mode
    stage.machine = Machine(
        stage.settings,
        policy=old.policy,
        revision=old.revision,
        safe_mode=old.safe_mode,
        cordons=old.cordons,
    )
    stage.submit(ev.Restored(stage.table.kept(), attached, lost, GRACE_NS))
    stage.submit(ev.ClientsGreeted())
    for waiter in tuple(stage.observer.waiting):
        if waiter.request_id is not None:
            stage.submit(ev.RequestRepeated(waiter.conn, waiter.request_id))


def _come_back_later(stage: Stage, process: Process, tokens: list[Token]) -> None:
    """Have a process connect again and ask for what it held on one connection."""

    def come_back() -> None:
        if not process.running:
            return
        link = stage.connect(process)
        stage.arrive(link)
        for number, token in enumerate(tokens):
            event = ev.ReattachAsked(link.conn, f"back {number}", token, Token(f"no {token}"))
            stage.submit(event)

    stage._later(stage.pace.back_ns(), come_back)
