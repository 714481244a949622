"""A lease + release pair under systemd, store and confinement included, against one without.

The same installed program, twice: as the unit starts it, and by hand beside it, with no service
manager to keep its connections. Both ends of both on one core, rounds taken in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack

from tests.bench.figures import Report, Spread, run
from tests.support.daemon_process import wait_until
from tests.systemd.rig import DAEMON, PYTHON, SOCKET, Rig, refusal

AIM_TIMES = 1.5
CLIENT = "/checkout/tests/bench/pair_client.py"
PAIRS = 400
WARM_UP_PAIRS = 300
PLAIN_SOCKET = "/run/plain/s"


class Pairs:
    """A client inside that does pairs when it is told to."""

    def __init__(self, rig: Rig, socket: str, core: int) -> None:
        self._rig = rig
        self._process = rig.start(
            PYTHON, "-I", CLIENT, "gpuorchd", socket,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        os.sched_setaffinity(rig.outer_pid(self._process), {core})

    def pair_us(self, pairs: int) -> float:
        """Do that many pairs; return the microseconds of one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{pairs}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()) / pairs / 1_000

    def close(self) -> None:
        """End it."""
        self._rig.end(self._process)


def measure(options: argparse.Namespace) -> Report:
    """Boot, install, start both, take rounds in turn."""
    report = Report("lease + release under systemd and without it, medians of rounds")
    reason = refusal()
    if reason is not None:
        report.rows.append(("not measured", reason))
        return report
    managed_us: list[float] = []
    plain_us: list[float] = []
    core = max(os.sched_getaffinity(0))
    with ExitStack() as stack:
        rig = stack.enter_context(Rig())
        rig.install()
        rig.configure(GPUORCH_SIMULATE="1x81920", GPUORCH_SIMULATE_DRAIN_S=0)
        rig.systemctl("start", DAEMON)
        rig.gpuorch("health")
        os.sched_setaffinity(rig.main_pid(), {core})
        plain = rig.start(
            PYTHON, "-I", "/usr/bin/gpuorchd", "--simulate", "1x81920", "--simulate-drain", "0",
            "--socket", PLAIN_SOCKET, "--state-dir", "/run/plain/state", "--http-port", "0",
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(rig.end, plain)
        wait_until(rig.path(PLAIN_SOCKET).is_socket, "the daemon without a manager")
        os.sched_setaffinity(rig.outer_pid(plain), {core})
        clients = [Pairs(rig, SOCKET, core), Pairs(rig, PLAIN_SOCKET, core)]
        for client in clients:
            stack.callback(client.close)
            client.pair_us(WARM_UP_PAIRS)
        for _ in range(options.rounds):
            managed_us.append(clients[0].pair_us(PAIRS))
            plain_us.append(clients[1].pair_us(PAIRS))
    ratio = Spread.of([one / other for one, other in zip(managed_us, plain_us, strict=True)])
    report.add("rounds", "rounds", str(options.rounds), options.rounds)
    report.add_spread("managed_us", "under systemd, a pair", Spread.of(managed_us), "us")
    report.add_spread("plain_us", "without it, a pair", Spread.of(plain_us), "us")
    report.add_spread("times", "under systemd / without it", ratio, "times", 2)
    report.aim(f"at most {AIM_TIMES} times", ratio.median <= AIM_TIMES)
    return report


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=40)
    sys.exit(run(measure, arguments))
