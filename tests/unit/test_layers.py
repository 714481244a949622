"""Who may import whom, as ARCHITECTURE.md has it. Each rule says what breaks without it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from tests.support.sources import Import, imports, module_name, python_files

# What a decision may use: it computes and nothing else. No clock, chance, environment, file,
# socket, log, loop or thread can be reached through these.
PURE = frozenset(
    {
        "__future__",
        "abc",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "fnmatch",
        "functools",
        "heapq",
        "itertools",
        "math",
        "operator",
        "re",
        "string",
        "struct",
        "types",
        "typing",
    }
)
WIRE = "libclient.wire"
CORE = "gpuorchd.core"
ENGINE = "gpuorchd.engine"
VIEWS = "gpuorchd.views"
VERSION = "libclient.version"
PORTS = "libclient.ports"


@dataclass(frozen=True, slots=True)
class Room:
    """What the modules below `name` may import, and why nothing else.

    `ours`: modules of this project, with all below them. `installed`: packages that are installed
    with it. `standard`: modules of the standard library, None for all.
    """

    name: str
    ours: tuple[str, ...]
    installed: tuple[str, ...]
    why: str
    standard: frozenset[str] | None = None


# The first that a module lies in counts.
ROOMS = (
    Room(
        WIRE,
        (WIRE,),
        (),
        "both sides stand on the wire vocabulary: what it imports, every agent imports",
        PURE,
    ),
    Room(
        "libclient.session",
        ("libclient",),
        (),
        "the session takes bytes and time as inputs, so that one core serves sync, async and tests",
        PURE,
    ),
    *(
        Room(
            name,
            ("libclient",),
            (),
            "what a restart means for the conversation is the session's: it does no I/O either",
            PURE,
        )
        for name in (
            "libclient.resume",
            "libclient.hearing",
            "libclient.absence",
            "libclient.renewals",
        )
    ),
    Room(
        "libclient.operations",
        ("libclient",),
        (),
        "an operation is a generator that does no I/O: two drivers run the same one",
        PURE | {"warnings"},
    ),
    Room(
        "libclient.cli",
        ("libclient",),
        ("rich",),
        "the command line is a client: it works where no daemon is installed",
    ),
    Room(
        "libclient.demo",
        ("libclient",),
        ("rich",),
        "the demo starts a daemon as a user would, as a process, and never reaches into it",
    ),
    Room(
        "libclient",
        ("libclient",),
        ("msgpack",),
        "an agent that installs the client gets msgpack and nothing of the daemon's",
    ),
    Room(
        CORE,
        (CORE,),
        (),
        "the core decides from its state and the event alone, so that a seed replays any run",
        PURE,
    ),
    Room(
        ENGINE,
        (CORE,),
        (),
        "the engine carries effects to whoever registered, and knows no room by name",
    ),
    Room(
        VIEWS,
        (CORE, WIRE),
        ("msgspec",),
        "what is shown of the state is computed from it alone, the same for socket and HTTP",
        PURE,
    ),
    Room(
        "gpuorchd.server",
        ("gpuorchd.server", CORE, ENGINE, VIEWS, WIRE, VERSION, "gpuorchd.devices.telemetry"),
        ("msgspec", "uvloop"),
        "the server turns bytes into events and answers: it knows devices only by their telemetry, "
        "and neither metrics nor configuration",
    ),
    Room(
        "gpuorchd.devices.probe",
        ("gpuorchd.devices",),
        ("pynvml",),
        "the probe is a process of its own: what it imports is what a restart of it costs",
    ),
    Room(
        "gpuorchd.devices",
        ("gpuorchd.devices", CORE, ENGINE),
        ("msgspec",),
        "devices turn readings into events: they know nothing of clients, sockets or metrics",
    ),
    Room(
        "gpuorchd.host",
        ("gpuorchd.host", CORE),
        # The lease table packs rows for every lease.
        ("msgspec",),
        "the host's files and limits are the same whatever is served",
    ),
    Room(
        "gpuorchd.observe",
        ("gpuorchd.observe", CORE, ENGINE, VIEWS, WIRE, VERSION),
        ("aiohttp", "prometheus_client", "structlog", "msgspec"),
        "what watches is registered from outside: nobody waits for it, and it sees no request",
    ),
    Room(
        "gpuorchd.config",
        ("gpuorchd.host.kinds", CORE, WIRE, PORTS),
        (),
        "the table of settings is read by docs and tests too: it opens nothing",
    ),
    Room(
        "gpuorchd.command_line",
        ("gpuorchd.config", "gpuorchd.host.kinds", VERSION),
        (),
        "flags are the table of settings in another dress",
    ),
    Room(
        "gpuorchd",
        ("gpuorchd", WIRE, VERSION, PORTS),
        ("uvloop",),
        "the daemon joins its rooms and takes only wire words, version and ports from the client",
    ),
)

# Modules that may be imported in one place only.
ONE_PLACE = (
    (
        "pynvml",
        "gpuorchd.devices.probe",
        "a driver that hangs may hang the probe and never the daemon",
    ),
)


def room_of(module: str) -> Room:
    """Return the room that a module of the project lies in."""
    return next(room for room in ROOMS if _within(module, room.name))


def _within(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def _allowed(entry: Import, room: Room) -> bool:
    top = entry.imported.partition(".")[0]
    if top in {"gpuorchd", "libclient"}:
        return any(_within(entry.imported, name) for name in room.ours)
    if top in sys.stdlib_module_names:
        return room.standard is None or top in room.standard
    return top in room.installed


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_imports_only_what_it_may(room: Room) -> None:
    wrong = [
        f"{entry.path}:{entry.line} imports {entry.imported}"
        for entry in imports("gpuorchd", "libclient")
        if room_of(entry.module) is room and not _allowed(entry, room)
    ]
    assert not wrong, f"{room.why}.\n" + "\n".join(wrong)


@pytest.mark.parametrize(("module", "place", "why"), ONE_PLACE)
def test_a_module_is_imported_in_its_one_place(module: str, place: str, why: str) -> None:
    wrong = [
        f"{entry.path}:{entry.line}"
        for entry in imports("gpuorchd", "libclient")
        if _within(entry.imported, module) and entry.module != place
    ]
    assert not wrong, f"{module} belongs in {place}: {why}.\n" + "\n".join(wrong)


def test_the_rules_refuse_what_they_are_there_for() -> None:
    refused = (
        ("gpuorchd.core.machine", "time"),
        ("gpuorchd.core.machine", "asyncio"),
        ("gpuorchd.core.machine", "gpuorchd.engine"),
        ("libclient.blocking", "gpuorchd.core.model"),
        ("libclient.blocking", "rich"),
        ("libclient.wire.framing", "msgpack"),
        ("gpuorchd.server.listener", "gpuorchd.observe.metrics"),
        ("gpuorchd.server.listener", "gpuorchd.devices.sampler"),
        ("gpuorchd.devices.sampler", "pynvml"),
        ("gpuorchd.engine", "gpuorchd.server.listener"),
    )
    for module, imported in refused:
        entry = Import(module, imported, "", 0)
        assert not _allowed(entry, room_of(module)), f"{module} may import {imported}"


def test_every_room_has_files_and_every_file_has_a_room() -> None:
    modules = [module_name(path) for path in python_files("gpuorchd", "libclient")]
    inhabited = {room_of(module).name for module in modules}
    assert inhabited == {room.name for room in ROOMS}
