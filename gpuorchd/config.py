"""What the daemon is configured with: one table, from which all else about settings comes.

Every field of `Config` is one setting with its environment variable, flag, kind of value, default
and help. Reading the environment, the command line, `--help`, `--check-config` and the checks of
docs/configuration.md and of the example env file all walk this table, so they cannot disagree.
`config_reading` makes a configuration of it.

Nothing here opens, creates or asks anything but the group database; a value that cannot be is a
`ConfigError` with one line for a person.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from gpuorchd.core.model import NS_PER_S
from gpuorchd.core.state import Limits
from gpuorchd.host.kinds import (
    CARDS,
    FLAG,
    GROUP,
    LOG_FORMAT,
    LOG_LEVEL,
    MODE,
    PATH,
    Kind,
    LogFormat,
    LogLevel,
    SimulatedCards,
    seconds,
    whole,
)
from libclient.ports import daemon_port
from libclient.wire.vocabulary import DEFAULT_SOCKET, SOCKET_VARIABLE

T = TypeVar("T")
D = TypeVar("D")

DAY_S = 86_400
YEAR_S = 365 * DAY_S
COUNT_MAX = 1_000_000
# Less would not hold the small replies that are sent even when memory is short.
UNSENT_BYTES_MIN = 65_536
UNSENT_BYTES_MAX = 2**40
count = whole(1, COUNT_MAX)
unsent_bytes = whole(UNSENT_BYTES_MIN, UNSENT_BYTES_MAX)


class Setting(NamedTuple):
    """One row of the table. `default` None: see the help for what that means."""

    name: str
    section: str
    variable: str
    flag: str
    kind: Kind[Any]  # each row has a kind of its own
    default: object
    help: str

    @property
    def shown_default(self) -> str:
        """The default as it would be written, empty where there is none."""
        return "" if self.default is None else self.kind.show(self.default)


class ConfigError(Exception):
    """A value that cannot be. `str()` is one line: where it stands, the value, what is allowed."""

    def __init__(self, source: str, value: str, allowed: str) -> None:
        super().__init__(f"{source} is {value!r}; allowed: {allowed}")
        self.source = source
        self.value = value
        self.allowed = allowed


def setting(section: str, variable: str, flag: str, kind: Kind[T], default: D, help: str) -> T | D:
    """Declare one row of the table as a field of `Config`."""
    row = (section, variable, flag, kind, default, help)
    # The dataclass turns this into the default; to the type checker it is the value itself.
    return cast("T | D", dataclasses.field(default=default, metadata={"row": row}))


@dataclass(frozen=True, slots=True)
class Config:
    """The effective configuration. Durations in seconds, memory in the unit of the name."""

    # A table: the columns of a row stay on one line.
    # fmt: off
    socket: Path = setting(
        "Socket", SOCKET_VARIABLE, "--socket", PATH, Path(DEFAULT_SOCKET),
        "the Unix socket to listen on",
    )
    socket_group: int | None = setting(
        "Socket", "GPUORCH_SOCKET_GROUP", "--socket-group", GROUP, None,
        "the group that the socket file is given to; unset: the daemon's own",
    )
    socket_mode: int = setting(
        "Socket", "GPUORCH_SOCKET_MODE", "--socket-mode", MODE, 0o660,
        "who may open the socket, as the mode of its file",
    )
    require_passed_socket: bool | None = setting(
        "Socket", "GPUORCH_REQUIRE_PASSED_SOCKET", "--require-passed-socket", FLAG, None,
        "whether the service manager has to pass the Unix socket, which then has its own name, "
        "mode and group; unset: it has to where it started the daemon; false: bind one here",
    )
    admin_group: int | None = setting(
        "Socket", "GPUORCH_ADMIN_GROUP", "--admin-group", GROUP, None,
        "the group whose members may change policy, cordon and revoke; unset: only root and the "
        "daemon's own user",
    )
    state_dir: Path | None = setting(
        "State", "GPUORCH_STATE_DIR", "--state-dir", PATH, None,
        "where settings made at run time are kept; $STATE_DIRECTORY of the service manager goes "
        "before it; unset: $XDG_STATE_HOME/gpuorchd, else ~/.local/state/gpuorchd",
    )
    runtime_dir: Path | None = setting(
        "State", "GPUORCH_RUNTIME_DIR", "--runtime-dir", PATH, None,
        "where the lease table lies, from which a restarted daemon goes on; unset: "
        "$RUNTIME_DIRECTORY of the service manager, else gpuorchd in $XDG_RUNTIME_DIR, else the "
        "state folder",
    )
    descriptor_store: int = setting(
        "State", "GPUORCH_DESCRIPTOR_STORE", "--descriptor-store",
        whole(0, COUNT_MAX, meaning=" (0: none)"), 0,
        "how many connections the service manager keeps while the daemon restarts "
        "(FileDescriptorStoreMax= of its unit); 0: none",
    )
    reattach_grace_s: float = setting(
        "State", "GPUORCH_REATTACH_GRACE_S", "--reattach-grace", seconds(0, DAY_S), 30.0,
        "how long after a restart a lease whose connection was lost waits for its owner",
    )
    safe_mode: bool | None = setting(
        "State", "SAFE_MODE", "--safe-mode", FLAG, None,
        "start without touching a GPU and grant nothing; wins at a cold start and whenever it "
        "differs from what the last start saw, else what was set at run time stands; unset: what "
        "was set at run time, at first false",
    )
    simulate: SimulatedCards | None = setting(
        "Devices", "GPUORCH_SIMULATE", "--simulate", CARDS, None,
        "simulate cards in place of the real ones, count and MiB of each; unset: real ones",
    )
    simulate_drain_s: float = setting(
        "Devices", "GPUORCH_SIMULATE_DRAIN_S", "--simulate-drain", seconds(0, 3_600), 0.1,
        "how long after a lease's end its bytes on a simulated card come back",
    )
    enable_nvml: bool | None = setting(
        "Devices", "ENABLE_NVML", "--enable-nvml", FLAG, None,
        "unset: use NVML where it is found; true: its absence is a failed readiness check; false: "
        "read only memory and processes",
    )
    enable_mps: bool | None = setting(
        "Devices", "ENABLE_MPS", "--enable-mps", FLAG, None,
        "unset: report CUDA MPS where it runs; true: its absence is a failed readiness check; "
        "false: report it as off",
    )
    mps_pipe_directory: Path = setting(
        "Devices", "CUDA_MPS_PIPE_DIRECTORY", "--mps-pipe-directory", PATH, Path("/tmp/nvidia-mps"),
        "where the CUDA MPS control daemon has its pipes",
    )
    sample_period_s: float = setting(
        "Devices", "GPUORCH_SAMPLE_PERIOD_S", "--sample-period", seconds(0.05, 60), 1.0,
        "how often the GPUs are read while nothing happens",
    )
    reading_max_age_s: float = setting(
        "Devices", "GPUORCH_READING_MAX_AGE_S", "--reading-max-age", seconds(0.1, 600), 3.0,
        "a reading older than this is unknown and grants nothing; more than the sampling period",
    )
    nvml_deadline_s: float = setting(
        "Devices", "GPUORCH_NVML_DEADLINE_S", "--nvml-deadline", seconds(0.1, 60), 2.0,
        "how long the driver may take to answer before the process that asks it is abandoned",
    )
    lease_ttl_s: float = setting(
        "Leases", "GPU_ORCHESTRATOR_LEASE_TTL", "--lease-ttl",
        seconds(0, YEAR_S, meaning=" (0: no limit)"), 0.0,
        "how long a lease lives without being renewed; 0: as long as its connection",
    )
    policy_ttl_s: float = setting(
        "Leases", "GPU_ORCHESTRATOR_POLICY_TTL", "--policy-ttl", seconds(0, DAY_S), 30.0,
        "how long clients keep the policy that they read; the daemon itself does not use it",
    )
    http_port: int = setting(
        "HTTP", "GPU_ORCHESTRATOR_PORT", "--http-port",
        whole(0, 65_535, meaning=" (0: no HTTP)"), daemon_port(),
        "the port of 127.0.0.1 with metrics, health and read-only state; 0: none",
    )
    max_connections: int = setting(
        "Bounds", "GPUORCH_MAX_CONNECTIONS", "--max-connections", count, 4_096,
        "open connections",
    )
    max_connections_per_uid: int = setting(
        "Bounds", "GPUORCH_MAX_CONNECTIONS_PER_UID", "--max-connections-per-uid", count, 3_584,
        "open connections of one user",
    )
    max_holders: int = setting(
        "Bounds", "GPUORCH_MAX_HOLDERS", "--max-holders", count, Limits().holders,
        "connections that hold or await a lease",
    )
    max_holders_per_uid: int = setting(
        "Bounds", "GPUORCH_MAX_HOLDERS_PER_UID", "--max-holders-per-uid", count,
        Limits().holders_per_uid,
        "connections of one user that hold or await a lease",
    )
    max_processes: int = setting(
        "Bounds", "GPUORCH_MAX_PROCESSES", "--max-processes", count, 1_024,
        "different processes that hold or await a lease; each takes one descriptor",
    )
    max_processes_per_uid: int = setting(
        "Bounds", "GPUORCH_MAX_PROCESSES_PER_UID", "--max-processes-per-uid", count, 896,
        "different processes of one user that hold or await a lease",
    )
    max_leases: int = setting(
        "Bounds", "GPUORCH_MAX_LEASES", "--max-leases", count, Limits().leases,
        "live leases",
    )
    max_leases_per_uid: int = setting(
        "Bounds", "GPUORCH_MAX_LEASES_PER_UID", "--max-leases-per-uid", count,
        Limits().leases_per_uid,
        "live leases of one user",
    )
    max_leases_per_connection: int = setting(
        "Bounds", "GPUORCH_MAX_LEASES_PER_CONNECTION", "--max-leases-per-connection", count,
        Limits().leases_per_connection,
        "live leases of one connection",
    )
    max_waiting: int = setting(
        "Bounds", "GPUORCH_MAX_WAITING", "--max-waiting", count, Limits().waiting,
        "waiting requests",
    )
    max_waiting_per_uid: int = setting(
        "Bounds", "GPUORCH_MAX_WAITING_PER_UID", "--max-waiting-per-uid", count,
        Limits().waiting_per_uid,
        "waiting requests of one user",
    )
    max_waiting_per_connection: int = setting(
        "Bounds", "GPUORCH_MAX_WAITING_PER_CONNECTION", "--max-waiting-per-connection", count,
        Limits().waiting_per_connection,
        "waiting requests of one connection",
    )
    max_subscriptions_per_connection: int = setting(
        "Bounds", "GPUORCH_MAX_SUBSCRIPTIONS_PER_CONNECTION", "--max-subscriptions-per-connection",
        count, 16,
        "subscriptions to events of one connection",
    )
    max_unsent_bytes_per_connection: int = setting(
        "Bounds", "GPUORCH_MAX_UNSENT_BYTES_PER_CONNECTION", "--max-unsent-bytes-per-connection",
        unsent_bytes, 262_144,
        "replies that one connection has not read yet; beyond that its requests are left unread",
    )
    max_unsent_bytes: int = setting(
        "Bounds", "GPUORCH_MAX_UNSENT_BYTES", "--max-unsent-bytes", unsent_bytes, 67_108_864,
        "replies that all connections together have not read yet; beyond that large ones are "
        "refused",
    )
    log_level: LogLevel = setting(
        "Log", "GPUORCH_LOG_LEVEL", "--log-level", LOG_LEVEL, LogLevel.INFO,
        "the least severe level that is logged",
    )
    log_format: LogFormat = setting(
        "Log", "GPUORCH_LOG_FORMAT", "--log-format", LOG_FORMAT, LogFormat.AUTO,
        "how log lines are written; auto: journal under the journal, console on a terminal, else "
        "json",
    )
    # fmt: on

    @property
    def limits(self) -> Limits:
        """The bounds that the core keeps."""
        return Limits(
            holders=self.max_holders,
            holders_per_uid=self.max_holders_per_uid,
            leases=self.max_leases,
            leases_per_uid=self.max_leases_per_uid,
            leases_per_connection=self.max_leases_per_connection,
            waiting=self.max_waiting,
            waiting_per_uid=self.max_waiting_per_uid,
            waiting_per_connection=self.max_waiting_per_connection,
        )

    @property
    def ttl_ns(self) -> int:
        """A lease's time limit, 0 for none."""
        return int(self.lease_ttl_s * NS_PER_S)

    @property
    def reading_max_age_ns(self) -> int:
        """The age at which a reading becomes unknown."""
        return int(self.reading_max_age_s * NS_PER_S)


def _rows() -> Iterator[Setting]:
    for field in dataclasses.fields(Config):
        yield Setting(field.name, *field.metadata["row"])


TABLE: tuple[Setting, ...] = tuple(_rows())
