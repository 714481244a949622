"""Succession: one daemon goes on where another was, and leaves what the next will go on from.

Joins the table and the descriptor store with the core and the server. At the start it reads what
was left, tells the core of it in one event, and greets the connections that outlived the daemon
before; at the end it freezes the table, so that the closing of a connection is no client's end.

    table ─▶ rows ─┬▶ Restored ─▶ core
    store ─▶ sockets ─▶ which are there, which may come back, which have ended
                   └▶ daemon.resumed ─▶ their clients
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gpuorchd.config import TABLE, Config
from gpuorchd.core.events import ClientsGreeted, Kept, Restored, Settled
from gpuorchd.core.model import NS_PER_S, ConnectionId
from gpuorchd.engine import Engine
from gpuorchd.host.descriptors import number_of
from gpuorchd.host.inherited import Inherited
from gpuorchd.host.keeping import TABLE_NAME, Keeper
from gpuorchd.host.notify import Notifier
from gpuorchd.host.start import Report
from gpuorchd.server.listener import Server
from gpuorchd.server.outliving import shut

# Of a socket's path, in the name of the table of a daemon that no service manager started.
DIGEST_DIGITS = 12


class Fate(NamedTuple):
    """What became of the connections of an earlier daemon, by their numbers."""

    attached: dict[ConnectionId, socket.socket]
    # Their owners may come back on another connection.
    lost: frozenset[ConnectionId]


class Succession:
    """What one daemon has from the one before it, and leaves to the next."""

    def __init__(
        self, keeper: Keeper, inherited: Inherited, notifier: Notifier, config: Config
    ) -> None:
        self._keeper = keeper
        self._notifier = notifier
        self._config = config
        self._stored = {ConnectionId(number_of(k)): v for k, v in inherited.stored.items()}
        # Taken over: whoever closes a connection closes these.
        inherited.stored.clear()
        self._found = keeper.read()

    @property
    def keeps_connections(self) -> bool:
        """Whether the service manager keeps connections while no daemon runs."""
        bound = max(self._config.descriptor_store, len(self._stored))
        return self._notifier.present and bound > 0 and not self._keeper.on_disk

    @property
    def epoch(self) -> str | None:
        """The name of the lease table that is gone on from, None where there is none."""
        return None if self._found is None else self._found.epoch

    def go_on(
        self, engine: Engine, server: Server, settled: Settled | None, report: Report
    ) -> None:
        """Restore the core, greet the clients, and record every change from now on.

        `settled` is the change of settings that may not have been answered yet.

        A fault on the way is counted; the second sets the table aside and begins with an empty one.
        """
        found = self._found
        kept = Kept() if found is None else found.kept
        half_sent = frozenset[int]() if found is None else found.half_sent
        fate = fates_of(self._stored, kept, half_sent)
        bound = max(self._config.descriptor_store, len(fate.attached))
        if self._notifier.present and bound and self._keeper.on_disk:
            # Digests of tokens let nobody release what he holds.
            report("host.store_unused", path=str(self._keeper.path))
        elif self._notifier.present and bound:
            loop = asyncio.get_running_loop()
            self._keeper.serve_store(self._notifier, loop, bound, tuple(self._stored))
        for number, sock in self._stored.items():
            if number not in fate.attached:
                # The store has it open as well.
                sock.close()
                self._keeper.drop(number)
        grace_ns = int(self._config.reattach_grace_s * NS_PER_S)
        try:
            if found is not None or fate.attached:
                attached = frozenset(fate.attached)
                engine.submit(Restored(kept, attached, fate.lost, grace_ns, settled))
            self._keeper.begin(engine.state, texts_of(self._config))
            server.resume(fate.attached, engine.state, first_number(self._stored, kept))
            engine.submit(ClientsGreeted())
        except Exception as fault:  # counted, so that a second one sets the table aside
            self._keeper.failed(fault)
            raise
        self._keeper.went_on()
        if found is not None or fate.attached:
            state = engine.state
            report(
                "daemon.resumed",
                epoch=state.settings.epoch,
                connections=len(fate.attached),
                leases=len(state.leases),
                waiting=len(state.waiters),
            )

    @property
    def hands_over(self) -> bool:
        """Whether connections outlive this daemon, so that its end is nobody else's."""
        return self._keeper.has_store

    def freeze(self) -> None:
        """Record nothing from now on: what ends with this process has not ended for the next."""
        self._keeper.freeze()

    def check(self) -> tuple[bool, str]:
        """Check `table`: what is granted now would outlive this daemon."""
        keeper = self._keeper
        if keeper.failure is not None:
            return False, f"leases do not outlive the daemon: {keeper.failure}"
        if keeper.has_store:
            return True, f"{keeper.stored} connections in the descriptor store"
        return True, "recorded; after a restart clients reattach their leases"


def fates_of(
    stored: Mapping[ConnectionId, socket.socket], kept: Kept, half_sent: frozenset[int]
) -> Fate:
    """Match the connections that are here with those that were recorded.

    Where the store gave back anything at all, a connection that is not in it has ended. Where it
    was emptied nobody knows, and whoever comes back is believed by its process. So is the owner of
    one with half a frame that is gone: a daemon may have shut it here, and then have been killed
    before it could record that.
    """
    attached: dict[ConnectionId, socket.socket] = {}
    lost = {client.conn for client in kept.clients if client.conn in half_sent}
    for number, sock in stored.items():
        if number in half_sent:
            # Nobody can say where its next frame would begin.
            shut(sock)
            lost.add(number)
        else:
            attached[number] = sock
    if not stored:
        lost.update(client.conn for client in kept.clients)
    return Fate(attached, frozenset(lost))


def first_number(stored: Mapping[ConnectionId, socket.socket], kept: Kept) -> int:
    """Say from where new connections are numbered: no number that still names an older one.

    A lease that is detached or drains names the connection that it was granted on, which is gone.
    """
    named = (*(client.conn for client in kept.clients), *(lease.conn for lease in kept.leases))
    return max((*stored, *named), default=0) + 1


def table_path(config: Config, environ: Mapping[str, str]) -> Path:
    """Say where the table lies: on a memory file system wherever there is one for this daemon."""
    given = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if config.runtime_dir is not None:
        return config.runtime_dir / TABLE_NAME
    if given:
        return Path(given) / TABLE_NAME
    session = environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(session) and os.path.isdir(session):
        # Several daemons of one user share it: the socket tells them apart.
        digest = hashlib.sha256(os.fsencode(config.socket)).hexdigest()[:DIGEST_DIGITS]
        return Path(session) / "gpuorchd" / f"{TABLE_NAME}-{digest}"
    assert config.state_dir is not None, "reading the configuration fills it in"
    return config.state_dir / TABLE_NAME


def texts_of(config: Config) -> dict[str, str]:
    """Write a configuration as texts by setting name, as flags would give it."""
    texts = {}
    for row in TABLE:
        value = getattr(config, row.name)
        if value is not None:
            texts[row.name] = row.kind.show(value)
    return texts
