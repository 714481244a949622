"""Which bound a `limit` refusal is about: for counting, by the name of the setting that raises it.

The contract has the message say which bound and its value, wherever it is met: in the core, at the
listener, at a connection. So the words of the message are what is gone by. A bound that is not in
the table is counted under its own words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from gpuorchd.server.faults import Fault
from libclient.wire.vocabulary import LIMIT

# What the messages call each bound: its setting without `max_`, where it has one.
BOUNDS: Final[Mapping[str, str]] = {
    "connections": "connections",
    "connections of one user": "connections_per_uid",
    "connections that hold or await a lease": "holders",
    "connections of one user that hold or await a lease": "holders_per_uid",
    "processes are watched for their end": "processes",
    "processes of one user are watched for their end": "processes_per_uid",
    "leases and requests that wait for one": "leases",
    "leases and waits of one user": "leases_per_uid",
    "leases and waits of one connection": "leases_per_connection",
    "waiting requests": "waiting",
    "waiting requests of one user": "waiting_per_uid",
    "waiting requests of one connection": "waiting_per_connection",
    "subscriptions of one connection": "subscriptions_per_connection",
    "changes wait to be kept on disk": "changes",
    "bytes of replies are unsent over all connections": "unsent_bytes",
}
# Connections closed without a word, since too many are being told already; and what the system, and
# no setting of ours, bounds: most likely no descriptor is left.
UNTOLD: Final = "untold_connections"
SYSTEM: Final = "system"

_SHAPE = re.compile(r"(?:at most|more than) \d+ ([a-z ]+)")


class LimitCounts:
    """How often each bound was met. All known ones are there from the start, with 0."""

    def __init__(self) -> None:
        self.by_bound = dict.fromkeys((*BOUNDS.values(), UNTOLD, SYSTEM), 0)

    def add(self, fault: Fault) -> None:
        """Count a refusal, if it is for a bound."""
        if fault.code == LIMIT:
            self.add_bound(bound_of(fault.message))

    def add_bound(self, bound: str) -> None:
        """Count a bound by its name."""
        self.by_bound[bound] = self.by_bound.get(bound, 0) + 1


def bound_of(message: str) -> str:
    """Return the name of the bound that a message is about."""
    match = _SHAPE.match(message)
    if match is None:
        return SYSTEM
    words = match[1].strip()
    return BOUNDS.get(words) or words.replace(" ", "_")
