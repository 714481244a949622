"""What a normal client notices of peers that mean no good, and what they cost in memory.

Stretches with and without them alternate within one run; a normal client takes and gives back a
lease all the while.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import libclient
from tests.bench.figures import Report, percentile, run
from tests.bench.surroundings import free_port, resident_kb
from tests.support.daemon_process import ROOT, running_daemon

STRETCHES = 4
PAIRS_IN_STRETCH = 3_000
WARM_UP_PAIRS = 500
# A client that works between its requests: back to back it would measure its own queue.
PAUSE_S = 0.0002
END_DEADLINE_S = 10.0


def measure(options: argparse.Namespace) -> Report:
    """Alternate quiet and hostile stretches."""
    report = Report("a normal client's lease + release, without and with hostile peers")
    quiet_us: list[float] = []
    beset_us: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        flags = ("--simulate", "1x81920", "--http-port", str(free_port()))
        environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
        with (
            running_daemon(Path(name), *flags, environ=environ) as daemon,
            libclient.connect(str(daemon.socket)) as client,
        ):
            _pairs_us(client, WARM_UP_PAIRS)
            before_kb = resident_kb(daemon.pid)
            for _ in range(options.stretches):
                quiet_us += _pairs_us(client, options.pairs)
                with _hostile_peers(daemon.socket) as peers:
                    beset_us += _pairs_us(client, options.pairs)
                    beset_kb = resident_kb(daemon.pid)
                    assert peers.poll() is None, "the hostile peers gave up"
    for name, values in (("quiet", quiet_us), ("hostile", beset_us)):
        for percent in (50, 99):
            value_us = percentile(values, percent)
            label = f"{name}, p{percent}"
            report.add(f"{name}_p{percent}_us", label, f"{value_us:.0f} us", value_us)
    added_mb = (beset_kb - before_kb) / 1_024
    report.add("added_mb", "memory that they cost", f"{added_mb:.1f} MiB", added_mb)
    return report


def _pairs_us(client: libclient.Client, count: int) -> list[float]:
    took_us = []
    for _ in range(count):
        started_ns = time.perf_counter_ns()
        lease = client.lease("bench", 1_024)
        lease.release()
        took_us.append((time.perf_counter_ns() - started_ns) / 1_000)
        assert lease.granted, lease.reason
        time.sleep(PAUSE_S)
    return took_us


@contextmanager
def _hostile_peers(socket: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.hostile_peers", str(socket)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the hostile peers did not start"
        yield process
    finally:
        process.communicate(timeout=END_DEADLINE_S)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--stretches", type=int, default=STRETCHES)
    arguments.add_argument("--pairs", type=int, default=PAIRS_IN_STRETCH, help="in a stretch")
    sys.exit(run(measure, arguments))
