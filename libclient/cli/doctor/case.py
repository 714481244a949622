"""The case: what was asked and read before the checks look at it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from libclient.cli.doctor.host import Host, command_of, environment_of, run
from libclient.cli.invocation import Invocation
from libclient.errors import RequestError, Unavailable
from libclient.where import socket_path

SERVICE: Final = "gpuorchd.service"
# Lets both sockets listen again, whatever state all of it is in: the service brings its sockets
# with it, and keeps the stored connections. systemd starts no socket whose service runs already.
LISTEN_AGAIN: Final = f"systemctl restart {SERVICE}"
SOCKET_UNIT: Final = "gpuorchd.socket"
METRICS_UNIT: Final = "gpuorchd-metrics.socket"
# Where the unit has the env file, unless it says otherwise.
ENV_FILE: Final = "/etc/justnews/gpu_orchestrator.env"
ENV_FLAG: Final = "--env-file"
# pid, uid and gid of a Unix socket's other end.
UCRED: Final = struct.Struct("3i")
PROGRAM_MISSING: Final = "there is no command gpuorchd here"


@dataclass(frozen=True, slots=True)
class Case:
    """One look at a host.

    `answers` are the daemon's replies by op, and `fault` why there are none. `config` is what
    `gpuorchd --check-config` says it is configured with, and `config_fault` why it cannot.
    """

    host: Host
    socket_path: str
    fault: str = ""
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    daemon_pid: int | None = None
    env_file: str = ENV_FILE
    config: Mapping[str, Any] | None = None
    config_fault: str = ""
    config_warnings: tuple[str, ...] = ()

    def answer(self, op: str) -> Mapping[str, Any]:
        """Return a reply, empty where none came."""
        return self.answers.get(op, {})

    @property
    def service(self) -> Mapping[str, str]:
        """The daemon's unit."""
        return self.host.unit(SERVICE)

    @property
    def managed(self) -> bool:
        """Whether this host has the daemon's units."""
        return self.service.get("LoadState") == "loaded"


def take_case(invocation: Invocation, host: Host) -> Case:
    """Ask and read everything that more than one check looks at."""
    path = socket_path(invocation.args.socket)
    answers, fault = _ask(invocation)
    service = host.unit(SERVICE)
    words = command_of(service)
    config, config_fault, warnings = _configuration(words, environment_of(service))
    return Case(
        host=host,
        socket_path=path,
        fault=fault,
        answers=answers,
        daemon_pid=_daemon_pid(service, path),
        env_file=_env_file(words),
        config=config,
        config_fault=config_fault,
        config_warnings=warnings,
    )


def _ask(invocation: Invocation) -> tuple[dict[str, Mapping[str, Any]], str]:
    answers: dict[str, Mapping[str, Any]] = {}
    for op in ("hello", "health", "ready", "gpu_info", "whoami"):
        try:
            answers[op] = invocation.call(op)
        except (Unavailable, RequestError) as fault:
            return answers, str(fault)
    return answers, ""


def _daemon_pid(service: Mapping[str, str], path: str) -> int | None:
    main = service.get("MainPID", "0")
    if main.isdigit() and main != "0":
        return int(main)
    # Without a unit, whoever made the socket listen is the daemon itself.
    pid = listener_pid(path)
    return pid if pid and pid > 1 else None


def listener_pid(path: str) -> int | None:
    """Return the process that made a Unix socket listen, None where nobody answers there."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
            options = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        except OSError:
            return None
    pid, _, _ = UCRED.unpack(options)
    return int(pid)


def _env_file(words: list[str]) -> str:
    for place, word in enumerate(words):
        if word == ENV_FLAG and place + 1 < len(words):
            return words[place + 1].removeprefix("-")
        if word.startswith(f"{ENV_FLAG}="):
            return word.removeprefix(f"{ENV_FLAG}=").removeprefix("-")
    return ENV_FILE


def _configuration(
    words: list[str], environ: Mapping[str, str]
) -> tuple[Mapping[str, Any] | None, str, tuple[str, ...]]:
    """Let the daemon's own program say what it would be configured with."""
    if not words:
        # Beside this interpreter, or wherever commands are.
        beside = os.path.join(os.path.dirname(sys.executable), "gpuorchd")
        program = beside if os.access(beside, os.X_OK) else shutil.which("gpuorchd")
        if program is None:
            return None, PROGRAM_MISSING, ()
        words = [program, ENV_FLAG, f"-{ENV_FILE}"]
    done = run([*words, "--check-config"], environ)
    said = tuple(
        line.removeprefix("gpuorchd: ") for line in done.errors.splitlines() if line.strip()
    )
    if done.code != 0:
        return None, said[-1] if said else f"gpuorchd ended with {done.code}", ()
    try:
        return json.loads(done.output), "", said
    except ValueError:
        return None, f"{words[0]} --check-config does not answer in JSON", said


def user_name() -> str:
    """Return the name of whoever asks, or the number where there is none."""
    import pwd

    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
