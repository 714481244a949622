"""What stands before a lease: whether a request is refused, and what it would be answered.

`refusal` is what `lease` and `explain` share; where a request that passes it goes is `placement`'s
to say. Nothing here changes anything.
"""

from __future__ import annotations

from gpuorchd.core import bounds, placement
from gpuorchd.core.model import (
    Ask,
    Client,
    Code,
    ConnectionId,
    Denial,
    Holder,
    Peer,
    Refusal,
)
from gpuorchd.core.placement import Plan
from gpuorchd.core.state import State

STOPPING = Refusal(Code.SHUTTING_DOWN, "the daemon stops; ask again when it is back")
# Of a connection that the core does not know: it holds nothing.
UNKNOWN = ConnectionId(0)


def refusal(state: State, client: Client, ask: Ask) -> Refusal | None:
    """Find what makes a request an error, a bound that is reached among them."""
    if state.stopping:
        return STOPPING
    refused = placement.refuse(state, client.peer, ask)
    return refused or bounds.over_leases(state, client)


def explain(
    state: State, peer: Peer, ask: Ask, now_ns: int, conn: ConnectionId | None
) -> Plan | Denial | Refusal:
    """Decide what `lease` would answer now on a connection, which the core may not know yet."""
    client = state.clients.get(conn) if conn is not None else None
    if client is None:
        holder = Holder(peer.process, peer.unit, peer.alive)
        client = Client(UNKNOWN, peer, holder)
    refused = refusal(state, client, ask)
    if refused is not None:
        return refused
    priority = state.policy.priority(state.policy.rule(ask.agent), ask.priority)
    found = placement.place(state, ask, peer.process, now_ns, state.wanted[priority])
    if isinstance(found, Denial) and ask.wait_ns and not found.final:
        return bounds.over_waits(state, client) or found
    return found
