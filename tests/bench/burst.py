"""Two hundred clients that ask at once for an eighth of a GPU each: how long each waits.

Connections are open beforehand; then every request is sent before any answer is read. A granted
client gives its share back at once, so the figures are those of the daemon and not of the work.
"""

from __future__ import annotations

import argparse
import selectors
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.figures import Report, Spread, percentile, run
from tests.bench.wire_client import WireClient
from tests.support.daemon_process import running_daemon

CARD_MB = 81_920
SHARE_MB = CARD_MB // 8
WAIT_S = 30


def measure(options: argparse.Namespace) -> Report:
    """Take a number of bursts against one daemon."""
    clients: int = options.clients
    report = Report(f"a burst of {clients} clients, an eighth of a GPU each")
    waits_ms: list[float] = []
    totals_ms: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        flags = ("--simulate", f"1x{CARD_MB}")
        with running_daemon(
            Path(name), *flags, environ={"GPUORCH_SIMULATE_DRAIN_S": "0"}
        ) as daemon:
            for _ in range(options.bursts):
                took_ms = _burst(daemon.socket, clients)
                waits_ms += took_ms
                totals_ms.append(max(took_ms))
    report.add("bursts", "bursts", str(options.bursts), options.bursts)
    for percent in (50, 99):
        wait_ms = percentile(waits_ms, percent)
        report.add(f"p{percent}_ms", f"ask to grant, p{percent}", f"{wait_ms:.1f} ms", wait_ms)
    report.add_spread("all_ms", "until all were served", Spread.of(totals_ms), "ms")
    return report


def _burst(socket: Path, count: int) -> list[float]:
    """Return the milliseconds from a client's request to its grant, for every client."""
    clients = [WireClient(socket) for _ in range(count)]
    waits_ms = []
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        started_ns = {}
        for client in clients:
            started_ns[client] = time.perf_counter_ns()
            client.send("lease", agent="burst", min_memory_mb=SHARE_MB, wait_s=WAIT_S)
        while started_ns:
            for key, _ in selector.select(WAIT_S):
                client = key.data
                reply = client.reply_if_there()
                if reply is None:
                    continue
                assert reply["granted"], reply
                waits_ms.append((time.perf_counter_ns() - started_ns.pop(client)) / 1e6)
                client.send("release", token=reply["token"])
                selector.unregister(client.socket)
    for client in clients:
        client.reply()
        client.close()
    return waits_ms


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--clients", type=int, default=200)
    arguments.add_argument("--bursts", type=int, default=10)
    sys.exit(run(measure, arguments))
