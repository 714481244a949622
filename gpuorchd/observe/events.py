"""The catalogue of log events: every name, its level, and its fields with their units.

An event is named `area.thing_verb` and declared here once. Only declared fields are ever written,
so that a secret or a payload that strays into a call does not reach a log. Events that the core
announces (`Announce`) stand here under the name they have on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

# What a field holds. The unit of a number is also the end of the field's name.
ID = "id"
NAME = "name"
TEXT = "text for people"
COUNT = "count"
FLAG = "true or false"
SECONDS = "seconds"
MIB = "MiB"
BYTES = "bytes"
LIST = "list"


class Level(IntEnum):
    """How much an event matters; the figures are those of Python's own logging."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


class EventKind(NamedTuple):
    """One declared event. A `chatty` one comes with every lease and is bounded in rate."""

    level: Level
    meaning: str
    fields: Mapping[str, str]
    chatty: bool = False


def _kind(level: Level, meaning: str, /, **fields: str) -> EventKind:
    return EventKind(level, meaning, fields)


def _chatty(meaning: str, /, **fields: str) -> EventKind:
    return EventKind(Level.INFO, meaning, fields, chatty=True)


LEASES: Mapping[str, EventKind] = {
    "lease.queued": _chatty(
        "a request waits, or its place has changed",
        queue_id=ID,
        agent=NAME,
        position=COUNT,
        ahead=COUNT,
        eta_s=SECONDS,
    ),
    "lease.granted": _chatty(
        "a lease was granted",
        lease_id=ID,
        agent=NAME,
        priority=NAME,
        gpus=LIST,
        waited_s=SECONDS,
        pid=ID,
        uid=ID,
    ),
    "lease.denied": _chatty(
        "a request was not granted", agent=NAME, note=NAME, waited_s=SECONDS, pid=ID
    ),
    "lease.released": _chatty(
        "a lease ended by itself or with its connection", lease_id=ID, agent=NAME, reason=TEXT
    ),
    "lease.revoking": _kind(
        Level.INFO,
        "a holder was asked to yield",
        lease_id=ID,
        agent=NAME,
        reason=TEXT,
        deadline_s=SECONDS,
    ),
    "lease.revoked": _kind(
        Level.INFO, "a lease was taken back", lease_id=ID, agent=NAME, reason=TEXT
    ),
    "lease.expired": _kind(
        Level.INFO, "a lease was not renewed in time", lease_id=ID, agent=NAME, reason=TEXT
    ),
    "lease.draining": _chatty(
        "an ended lease's bytes are waited for", lease_id=ID, agent=NAME, gpus=LIST
    ),
    "lease.drained": _chatty(
        "an ended lease's bytes are free", lease_id=ID, agent=NAME, drain_s=SECONDS
    ),
    "lease.withheld": _kind(
        Level.WARNING,
        "an ended lease's bytes have not come back in time",
        lease_id=ID,
        agent=NAME,
        memory_mb=MIB,
        gpus=LIST,
        pids=LIST,
    ),
    "lease.over_limit": _kind(
        Level.WARNING,
        "a holder uses more than its lease",
        lease_id=ID,
        agent=NAME,
        used_mb=MIB,
        leased_mb=MIB,
    ),
}

GPUS: Mapping[str, EventKind] = {
    "gpu.appeared": _kind(Level.INFO, "a GPU is there", gpu=ID, index=ID, memory_total_mb=MIB),
    "gpu.vanished": _kind(Level.WARNING, "a GPU is there no more", gpu=ID, index=ID, reason=TEXT),
    "gpu.cordoned": _kind(Level.INFO, "a GPU takes no new leases", gpu=ID, index=ID, reason=TEXT),
    "gpu.uncordoned": _kind(Level.INFO, "a GPU takes leases again", gpu=ID, index=ID),
    "gpu.unhealthy": _kind(
        Level.WARNING,
        "a GPU cannot be read or has failed",
        gpu=ID,
        index=ID,
        reason=TEXT,
        xid=ID,
        lease_ids=LIST,
    ),
    "gpu.recovered": _kind(Level.INFO, "a GPU can be read again", gpu=ID, index=ID),
    "gpu.unleased": _kind(
        Level.INFO,
        "the memory in use outside any lease has changed",
        gpu=ID,
        index=ID,
        memory_mb=MIB,
        pids=LIST,
    ),
}

DAEMON: Mapping[str, EventKind] = {
    "policy.changed": _kind(Level.INFO, "the policy was changed", revision=ID, changed=LIST),
    "daemon.started": _kind(
        Level.INFO,
        "the daemon answers",
        version=NAME,
        epoch=ID,
        pid=ID,
        socket=TEXT,
        safe_mode=FLAG,
        start_s=SECONDS,
    ),
    "daemon.safe_mode": _kind(Level.WARNING, "SAFE_MODE was switched", on=FLAG),
    "daemon.stopping": _kind(Level.INFO, "the daemon is about to end", reason=TEXT),
    "daemon.stopped": _kind(Level.INFO, "the daemon has ended in order"),
    "daemon.stop_asked": _kind(Level.INFO, "a signal asks for the end", signal=NAME),
    "daemon.stop_repeated": _kind(
        Level.INFO, "a further signal: the daemon is ending already", signal=NAME
    ),
    "daemon.stop_overdue": _kind(
        Level.ERROR, "the end took too long and was forced", deadline_s=SECONDS
    ),
    "daemon.hangup_ignored": _kind(
        Level.INFO, "SIGHUP does nothing while the daemon starts or ends"
    ),
    "daemon.bug_met": _kind(
        Level.ERROR, "something happened that cannot: the daemon ends", what=TEXT, error=TEXT
    ),
    "daemon.loop_failed": _kind(
        Level.ERROR, "the event loop reports a failure from outside", what=TEXT, error=TEXT
    ),
    "config.value_warned": _kind(Level.WARNING, "a setting is doubtful", warning=TEXT),
    "config.reloaded": _kind(
        Level.INFO,
        "the configuration was read again; what waits takes effect at a restart",
        taken=LIST,
        waiting=LIST,
    ),
    "config.reload_refused": _kind(
        Level.ERROR, "the configuration cannot be: the one before stays in force", error=TEXT
    ),
    "daemon.resumed": _kind(
        Level.INFO,
        "goes on where the daemon before was",
        epoch=ID,
        connections=COUNT,
        leases=COUNT,
        waiting=COUNT,
    ),
    "daemon.handed_over": _kind(
        Level.INFO, "ends without ending a lease: the next daemon goes on from here", code=ID
    ),
    "host.table_failed": _kind(
        Level.ERROR,
        "the lease table cannot be written: leases do not outlive the daemon, new ones are refused",
        path=TEXT,
        error=TEXT,
    ),
    "host.table_mended": _kind(
        Level.INFO, "the lease table is written again: leases outlive the daemon", path=TEXT
    ),
    "host.table_set_aside": _kind(
        Level.ERROR,
        "the lease table could not be gone on from: set aside, begun anew",
        path=TEXT,
        kept_as=TEXT,
        damage=TEXT,
    ),
    "host.store_unused": _kind(
        Level.ERROR,
        "the lease table lies on a disk, so the descriptor store is not used",
        path=TEXT,
    ),
    "config.kept_used": _kind(
        Level.ERROR,
        "the configuration cannot be: goes on with the last good one, for the leases' sake",
        error=TEXT,
    ),
    "host.bounds_lowered": _kind(
        Level.ERROR,
        "the limit of open files is too low for the bounds: lowered",
        open_files=COUNT,
        needed_files=COUNT,
        max_connections=COUNT,
        wanted_connections=COUNT,
        max_processes=COUNT,
        wanted_processes=COUNT,
    ),
    "host.passed_unusable": _kind(
        Level.WARNING, "the service manager passed what cannot be used", problem=TEXT
    ),
    "host.settings_set_aside": _kind(
        Level.ERROR,
        "the kept settings are damaged: set aside, defaults hold",
        path=TEXT,
        kept_as=TEXT,
        damage=TEXT,
    ),
    "host.settings_unwritable": _kind(
        Level.ERROR, "settings cannot be kept", path=TEXT, error=TEXT
    ),
    "host.settings_unsynced": _kind(
        Level.WARNING,
        "settings are kept, and could be lost with the power: their folder is not synced",
        path=TEXT,
        error=TEXT,
    ),
    "host.users_unknown": _kind(
        Level.WARNING, "the policy names users that this host does not have", users=LIST
    ),
}

DEVICES: Mapping[str, EventKind] = {
    "devices.probe_started": _kind(Level.INFO, "the process that asks the driver runs", pid=ID),
    "devices.probe_failed": _kind(
        Level.WARNING,
        "the driver gave no answer that can be believed: asked anew after a pause",
        pid=ID,
        reason=TEXT,
        retry_s=SECONDS,
    ),
    "devices.probe_held_back": _kind(
        Level.ERROR,
        "too many abandoned probes hang in the driver: no further one is started",
        abandoned=COUNT,
    ),
    "devices.probe_left_behind": _kind(
        Level.WARNING, "probes that hang in the driver outlive the daemon", count=COUNT
    ),
}

OBSERVE: Mapping[str, EventKind] = {
    "log.suppressed": _kind(
        Level.INFO, "lines of one event were left out within a second", kind=NAME, count=COUNT
    ),
    "log.lost": _kind(
        Level.ERROR, "lines were lost: nobody took the output for too long", count=COUNT
    ),
    "log.library_failed": _kind(
        Level.ERROR, "structlog cannot be loaded: lines are plain JSON", error=TEXT
    ),
    "log.undeclared": _kind(
        Level.WARNING,
        "an event or field that the catalogue does not name",
        kind=NAME,
        fields=LIST,
    ),
    "http.bound": _kind(Level.INFO, "the side HTTP port answers", address=TEXT),
    "http.bind_failed": _kind(
        Level.ERROR, "the side HTTP port cannot be had", address=TEXT, error=TEXT
    ),
    "http.request_failed": _kind(
        Level.ERROR, "a page could not be made: a bug", path=TEXT, error=TEXT
    ),
    "http.connection_refused": _kind(
        Level.WARNING,
        "too many connections to the side HTTP port (told once a minute)",
        limit=COUNT,
    ),
}

CATALOGUE: Mapping[str, EventKind] = {**LEASES, **GPUS, **DAEMON, **DEVICES, **OBSERVE}
