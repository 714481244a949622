"""What ten thousand idle holders cost the daemon in memory.

Each holds one lease on a connection of its own, a hundred of them in one process. The bounds are
raised by configuration: by default far fewer connections may hold.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.figures import Report, run
from tests.bench.surroundings import free_port, resident_kb
from tests.bench.wire_client import WireClient
from tests.support.daemon_process import running_daemon

AIM_MB = 60.0
PROCESSES = 100
# Beside the connections: the daemon's own files, and room for clients that ask questions.
SPARE_DESCRIPTORS = 256
READY_DEADLINE_S = 50.0
# Both memory figures are taken when nothing has happened for a while.
SETTLE_S = 0.5


def measure(options: argparse.Namespace) -> Report:
    """Start holders, and compare the daemon's resident memory with what it was before."""
    report = Report("idle holders: resident memory of the daemon")
    holders: int = options.holders
    with tempfile.TemporaryDirectory() as name:
        flags = ("--simulate", f"1x{holders + 1_024}", "--http-port", str(free_port()))
        with running_daemon(Path(name), *flags, environ=_raised_bounds(holders)) as daemon:
            with WireClient(daemon.socket) as client:
                client.ask("gpu_info")
                client.ask("allocations")
            time.sleep(SETTLE_S)
            empty_kb = resident_kb(daemon.pid)
            started = time.monotonic()
            group = HolderProcesses(daemon.socket, holders)
            try:
                group.wait_until_all_hold()
                took_s = time.monotonic() - started
                time.sleep(SETTLE_S)
                full_kb = resident_kb(daemon.pid)
                _check_all_hold(daemon.socket, holders)
            finally:
                group.end()
    added_mb = (full_kb - empty_kb) / 1_024
    report.add("holders", "holders", f"{holders} in {PROCESSES} processes", holders)
    report.add("empty_mb", "empty daemon", f"{empty_kb / 1024:.1f} MiB", empty_kb / 1_024)
    report.add("added_mb", "added by all holders", f"{added_mb:.1f} MiB", added_mb)
    each_kb = (full_kb - empty_kb) / holders
    report.add("each_kb", "a holder", f"{each_kb:.2f} KiB", each_kb)
    report.add("took_s", "until all held", f"{took_s:.1f} s", took_s)
    report.aim(f"at most {AIM_MB:.0f} MiB for 10,000", added_mb * 10_000 / holders <= AIM_MB)
    return report


class HolderProcesses:
    """Forked processes that share out the holders, and end with this one.

    Forked by hand: a hundred fresh interpreters would take most of the time that this may take.
    """

    def __init__(self, socket: Path, holders: int) -> None:
        self._ready_fd, ready_child_fd = os.pipe()
        hold_child_fd, self._hold_fd = os.pipe()
        self._holders = holders
        self._pids = []
        share, more = divmod(holders, PROCESSES)
        for number in range(PROCESSES):
            pid = os.fork()
            if pid == 0:
                os.close(self._ready_fd)
                os.close(self._hold_fd)
                _hold(socket, share + (number < more), ready_child_fd, hold_child_fd)
            self._pids.append(pid)
        os.close(ready_child_fd)
        os.close(hold_child_fd)

    def wait_until_all_hold(self) -> None:
        """Return when every holder has its lease."""
        held = 0
        deadline = time.monotonic() + READY_DEADLINE_S
        while held < self._holders:
            said = os.read(self._ready_fd, 4_096)
            if not said:
                raise RuntimeError(f"{held} of {self._holders} hold; a process of holders failed")
            held += len(said)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{held} of {self._holders} hold after {READY_DEADLINE_S} s")

    def end(self) -> None:
        """Let all end."""
        os.close(self._hold_fd)
        os.close(self._ready_fd)
        for pid in self._pids:
            os.waitpid(pid, 0)


def _hold(socket: Path, count: int, ready_fd: int, hold_fd: int) -> None:
    """The life of one process of holders; does not return."""
    code = 1
    try:
        clients = []
        for _ in range(count):
            client = WireClient(socket)
            if not client.ask("lease", agent="idle", min_memory_mb=1).get("granted"):
                raise RuntimeError("an idle holder was not granted its lease")
            clients.append(client)
            os.write(ready_fd, b".")
        os.close(ready_fd)
        # The end of the parent's pipe, by its end or by its wish.
        os.read(hold_fd, 1)
        code = 0
    finally:
        os._exit(code)


def _check_all_hold(socket: Path, holders: int) -> None:
    counted, after = 0, None
    with WireClient(socket) as client:
        while counted == 0 or after is not None:
            page = client.ask("allocations", **({"after": after} if after else {}))
            counted += len(page["allocations"])
            after = page["next"]
    assert counted == holders, f"{counted} of {holders} leases are listed"


def _raised_bounds(holders: int) -> dict[str, str]:
    needed = holders + SPARE_DESCRIPTORS
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard == resource.RLIM_INFINITY or needed <= hard, f"{needed} open files are needed"
    bounds = (
        "CONNECTIONS",
        "CONNECTIONS_PER_UID",
        "HOLDERS",
        "HOLDERS_PER_UID",
        "LEASES",
        "LEASES_PER_UID",
    )
    return {f"GPUORCH_MAX_{name}": str(needed) for name in bounds}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--holders", type=int, default=10_000)
    sys.exit(run(measure, arguments))
