"""Everything about the service manager that started this process: what it passed, how it is told.

Read from the environment once, before anything is opened. Says also which Unix socket is served: a
passed one, or one that the daemon binds itself, and never the second where the first was to come.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple, Protocol

from gpuorchd.host.inherited import LISTENER_NAME, Inherited, take_inherited
from gpuorchd.host.notify import Notifier
from gpuorchd.host.socket_file import PassedSocket, SocketFile, claim_socket
from gpuorchd.host.start import StartError

# Set by the service manager to the pid of what it started; children inherit it and differ.
EXEC_PID = "SYSTEMD_EXEC_PID"


class Supervisor(NamedTuple):
    """What it passed, the way to it, and whether it started this very process."""

    inherited: Inherited
    notifier: Notifier
    started_us: bool

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be used, one line each, for the log."""
        return (*self.inherited.problems, *self.notifier.problems)


class SocketChoice(Protocol):
    """How the Unix socket is configured; what a passed one leaves without effect."""

    @property
    def socket(self) -> Path: ...
    @property
    def socket_mode(self) -> int: ...
    @property
    def socket_group(self) -> int | None: ...
    @property
    def require_passed_socket(self) -> bool | None: ...


def meet_supervisor(environ: MutableMapping[str, str]) -> Supervisor:
    """Read and remove the service manager's variables. Call it before anything is opened."""
    inherited = take_inherited(environ)
    notifier = Notifier(environ)
    direct = environ.get(EXEC_PID) == str(os.getpid())
    return Supervisor(inherited, notifier, direct or notifier.present or inherited.passed > 0)


def served_socket(supervisor: Supervisor, choice: SocketChoice) -> SocketFile | PassedSocket:
    """Take the passed Unix socket, or bind one where none was to be passed.

    The caller releases it. Raises `StartError` with the reason where there is none: a daemon that
    bound a name of its own beside the service manager's would run and hear nobody.
    """
    listener, supervisor.inherited.listener = supervisor.inherited.listener, None
    if listener is not None:
        return PassedSocket(listener)
    required = choice.require_passed_socket
    if supervisor.started_us if required is None else required:
        who = (
            "the service manager started this daemon without its Unix socket"
            if supervisor.started_us
            else "GPUORCH_REQUIRE_PASSED_SOCKET is true and no Unix socket was passed"
        )
        raise StartError(
            f"{who}: no descriptor named {LISTENER_NAME} came; start {LISTENER_NAME} (its unit "
            "names the service), or set GPUORCH_REQUIRE_PASSED_SOCKET=false to bind "
            f"{choice.socket} here"
        )
    return claim_socket(choice.socket, choice.socket_mode, choice.socket_group)
