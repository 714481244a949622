"""A reload: the configuration is read again, and what can change while the daemon runs does.

    SIGHUP ─▶ flags, env file, environment ─▶ checked whole ─┬▶ what `TAKEN` names is put in force
                                                             └▶ the rest waits for a restart
              … or it cannot be: all of the one before stays in force, and that is said

Half of a configuration is never taken. A refusal stays to be seen, in the log, the status line and
the check `config` of `ready`, until a reload succeeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpuorchd.config import TABLE, Config, ConfigError
from gpuorchd.config_reading import ReadConfig
from gpuorchd.host.env_file import EnvFileError
from gpuorchd.host.start import Report

# The settings that a reload puts in force. The others are built into what is open: sockets,
# folders, cards, the HTTP port.
TAKEN = frozenset(
    {
        "admin_group",
        "safe_mode",
        "sample_period_s",
        "reading_max_age_s",
        "nvml_deadline_s",
        "lease_ttl_s",
        "policy_ttl_s",
        "log_level",
        *(row.name for row in TABLE if row.section == "Bounds"),
    }
)

# Puts a configuration in force of which the named settings have changed.
Take = Callable[[Config, frozenset[str]], None]


class Reloading:
    """Reads the configuration of a running daemon again. `read` is what it was started with."""

    def __init__(self, read: ReadConfig, take: Take, report: Report) -> None:
        """`read.refused` says why it is the last good one that is in force from the start."""
        self._inputs = read.inputs
        self._started = read.config
        self._last = read.config
        self._take = take
        self._report = report
        # Why the newest configuration cannot be, None where it can.
        self.failure: str | None = read.refused
        # Variables whose newest value waits for a restart.
        self.waiting: tuple[str, ...] = ()

    def reload(self) -> None:
        """Read everything again, and take what can be taken, or nothing."""
        if self._inputs is None:
            # Made from values alone: there is nothing to read again.
            return
        try:
            read = self._inputs.read()
        except (ConfigError, EnvFileError) as error:
            self.failure = str(error)
            self._report("config.reload_refused", error=self.failure)
            return
        self.failure = None
        for warning in read.warnings:
            self._report("config.value_warned", warning=warning)
        new = read.config
        changed = _differences(self._last, new) & TAKEN
        waiting = _differences(self._started, new) - TAKEN
        if changed:
            # What waits for a restart stays as it is, also for those who look at the whole.
            kept = {name: getattr(self._started, name) for name in waiting}
            self._take(dataclasses.replace(new, **kept), frozenset(changed))
        self._last = new
        self.waiting = _variables(waiting)
        self._report("config.reloaded", taken=_variables(changed), waiting=self.waiting)

    def check(self) -> tuple[bool, str]:
        """Check `config`: what is in force is what the newest configuration says."""
        if self.failure is not None:
            return False, f"the configuration before stays in force: {self.failure}"
        if self.waiting:
            return True, f"in force but for what waits for a restart: {', '.join(self.waiting)}"
        return True, "in force as configured"

    def remark(self) -> str | None:
        """Say in the status line that the newest configuration was refused, while it is so."""
        return None if self.failure is None else f"configuration refused: {self.failure}"


def _differences(one: Config, other: Config) -> set[str]:
    return {row.name for row in TABLE if getattr(one, row.name) != getattr(other, row.name)}


def _variables(names: set[str]) -> tuple[str, ...]:
    return tuple(row.variable for row in TABLE if row.name in names)
