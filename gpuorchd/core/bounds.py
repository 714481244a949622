"""The bounds on what is held and awaited: per connection, per user and in all.

Each function answers with a refusal that names the bound and its value, or with None.
"""

from __future__ import annotations

from gpuorchd.core.model import Client, Code, Refusal, Waiter
from gpuorchd.core.state import State


def over_leases(state: State, client: Client) -> Refusal | None:
    """Refuse a request for one more lease where a bound is reached."""
    refusal = over_holders(state, client)
    if refusal is not None:
        return refusal
    limits = state.settings.limits
    uid = client.peer.uid
    # A request that waits will be a lease one day: it has its place among them.
    if state.live_leases + len(state.waiters) >= limits.leases:
        return _limit("leases and requests that wait for one", limits.leases)
    own = state.leases_by_uid.get(uid, 0) + state.waiting_by_uid.get(uid, 0)
    if own >= limits.leases_per_uid:
        return _limit("leases and waits of one user", limits.leases_per_uid)
    if len(client.requests) >= limits.leases_per_connection:
        return _limit("leases and waits of one connection", limits.leases_per_connection)
    return None


def over_holders(state: State, client: Client) -> Refusal | None:
    """Refuse a connection that would be one too many to hold or await a lease."""
    if client.requests:
        return None
    limits = state.settings.limits
    if state.holding_clients >= limits.holders:
        return _limit("connections that hold or await a lease", limits.holders)
    if state.holders_by_uid.get(client.peer.uid, 0) >= limits.holders_per_uid:
        what = "connections of one user that hold or await a lease"
        return _limit(what, limits.holders_per_uid)
    return None


def over_waits(state: State, client: Client) -> Refusal | None:
    """Refuse one more waiting request where a bound is reached."""
    limits = state.settings.limits
    uid = client.peer.uid
    if len(state.queue) >= limits.waiting:
        return _limit("waiting requests", limits.waiting)
    if state.waiting_by_uid.get(uid, 0) >= limits.waiting_per_uid:
        return _limit("waiting requests of one user", limits.waiting_per_uid)
    waits = sum(1 for request in client.requests.values() if isinstance(request, Waiter))
    if waits >= limits.waiting_per_connection:
        return _limit("waiting requests of one connection", limits.waiting_per_connection)
    return None


def _limit(what: str, bound: int) -> Refusal:
    return Refusal(Code.LIMIT, f"at most {bound} {what}; this bound is reached")
