"""Readiness: whether requests get right answers now, and if not, why.

A check is a function without arguments that gives `(ok, detail)`; it is asked anew each time,
looks at what is in memory and waits for nothing. SAFE_MODE and a host without a GPU are ready:
their answers are right. A first probe that still runs, or a driver that has stopped answering, is
not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from gpuorchd.core.state import State
from gpuorchd.observe.loop_lag import LoopLag
from gpuorchd.observe.sources import DriverChecks, DriverStatus
from gpuorchd.observe.tally import NS_PER_S

Check = Callable[[], tuple[bool, str]]

# A loop that was this late has kept clients waiting for half of the time that they wait at all.
LAG_MAX_S = 1.0

NOT_LOOKED_AT = "not looked at: SAFE_MODE is on"
PROBING = "the first device probe is still running"


class CheckReport(TypedDict):
    """The outcome of one check, as the wire has it."""

    ok: bool
    detail: str


class Report(TypedDict):
    """The answer to `ready`, as the wire has it."""

    ready: bool
    checks: dict[str, CheckReport]


class Readiness:
    """The checks of one daemon, by name. Ready only if all are ok."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def add(self, name: str, check: Check) -> None:
        """Add a check. Two of one name would hide each other: that is an error."""
        if name in self._checks:
            raise ValueError(f"a check named {name} is there already")
        self._checks[name] = check

    def report(self) -> Report:
        """Ask every check."""
        checks: dict[str, CheckReport] = {}
        for name, check in self._checks.items():
            ok, detail = check()
            checks[name] = {"ok": ok, "detail": detail}
        return {"ready": all(entry["ok"] for entry in checks.values()), "checks": checks}


def devices_check(state: Callable[[], State], source: Callable[[], DriverChecks]) -> Check:
    """Check `devices`: the GPUs have been looked for, and who knows of them answers."""

    def check() -> tuple[bool, str]:
        now = state()
        if now.safe_mode:
            return True, NOT_LOOKED_AT
        driver = source()
        if not driver.answering:
            return False, driver.detail or "the driver has stopped answering"
        if driver.first_probe_running or now.probing:
            return False, PROBING
        if not now.order:
            return True, f"no GPU: {now.unavailable or 'none was found'}"
        return True, driver.detail or f"{len(now.order)} found"

    return check


def nvml_check(
    state: Callable[[], State], status: Callable[[], DriverStatus], *, demanded: bool
) -> Check:
    """Check `nvml`: it is there where configuration demands it (`ENABLE_NVML=true`)."""

    def check() -> tuple[bool, str]:
        if state().safe_mode:
            return True, NOT_LOOKED_AT
        now = status()
        if now.nvml_supported:
            return True, "NVML answers"
        if not demanded:
            return True, "NVML is not there, and not demanded"
        if state().probing:
            return False, PROBING
        word = f": {now.nvml_init_error}" if now.nvml_init_error else ""
        return False, f"ENABLE_NVML is true and NVML is not there{word}"

    return check


def mps_check(
    state: Callable[[], State], status: Callable[[], DriverStatus], *, demanded: bool
) -> Check:
    """Check `mps`: it runs where configuration demands it (`ENABLE_MPS=true`)."""

    def check() -> tuple[bool, str]:
        if state().safe_mode:
            return True, NOT_LOOKED_AT
        now = status()
        if now.mps_enabled:
            return True, f"the control process answers in {now.mps_pipe_dir}"
        if not demanded:
            return True, "MPS does not run, and is not demanded"
        return False, f"ENABLE_MPS is true and no control process runs in {now.mps_pipe_dir}"

    return check


def settings_check(failure: Callable[[], str | None]) -> Check:
    """Check `settings`: what was changed last is on disk. `failure` says why it is not."""

    def check() -> tuple[bool, str]:
        reason = failure()
        return (True, "kept") if reason is None else (False, reason)

    return check


def loop_check(lag: LoopLag) -> Check:
    """Check `loop`: the event loop keeps up."""

    def check() -> tuple[bool, str]:
        worst_s = lag.worst_recent_ns / NS_PER_S
        detail = f"at most {worst_s * 1_000:.1f} ms late of late"
        if worst_s <= LAG_MAX_S:
            return True, detail
        return False, f"{detail}, {LAG_MAX_S * 1_000:.0f} ms allowed"

    return check
