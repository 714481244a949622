"""When a lease that has a time limit is renewed, and when it has to count as over. No I/O.

It is renewed at a third of its TTL. An answer that does not come is no answer: it is asked again at
two thirds, and a lease whose limit passes without one is over, whatever the daemon makes of it. A
holder that went on would use memory that may be another's by now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libclient.decision import Decision
    from libclient.session import Session

# At a third of the TTL and at two thirds.
ASKED_MAX = 2


def renew(session: Session, now_s: float) -> None:
    """Ask to renew, or to reattach, every lease whose time has come."""
    if session.ended is not None or session.away is not None:
        return
    for lease in list(session.leases.values()):
        if lease.renew_at is None or lease.renew_at > now_s:
            continue
        if lease.detached:
            # Tried again because the daemon said so; its answer says when the next time is.
            lease.renew_at = None
            session.ask_quietly("reattach", {"token": lease.token}, lease)
        elif lease.renewals < ASKED_MAX:
            lease.renewals += 1
            lease.renew_at = now_s + lease.renew_after_s
            session.ask_quietly("renew", {"token": lease.token}, lease)
        else:
            _expire(session, lease)
    session.plan_renewals()


def _expire(session: Session, lease: Decision) -> None:
    session.lose(lease, "expired: its renewal was not answered in time")
    session.notify(lease, {"event": "lease.expired", "lease_id": lease.lease_id})
    if lease.token is not None:
        # Should the daemon be slow rather than gone, it is not to keep what nobody uses.
        session.release_quietly(lease.token)
