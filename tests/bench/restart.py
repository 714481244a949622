"""The pause that a client feels when the daemon is killed under systemd, with 900 leases held.

Real systemd, the installed units, the descriptor store: see tests/systemd/rig.py. Every lease is
held by a connection of its own. The pause is the longest that a client waits for an answer which
it asks for all the time, from the moment of the question; the daemon is killed at a random moment
of that.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from contextlib import ExitStack

from tests.bench.figures import Report, Spread, run
from tests.systemd.rig import DAEMON, PYTHON, Rig, refusal

AIM_MS = 150
PROGRAM = "/checkout/tests/bench/restart_clients.py"
PROCESSES = 3
# Longer than a daemon needs to become as quiet as it was.
SETTLE_S = 1.5


class Client:
    """One client process inside; `told` gives it a line and takes one."""

    def __init__(self, rig: Rig, user: str, *words: object) -> None:
        self._rig = rig
        self._process = rig.start(
            PYTHON, "-I", PROGRAM, *map(str, words), user=user,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def hear(self) -> list[str]:
        """Take one line, as words."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a client has ended")
        return line.split()

    def told(self) -> list[str]:
        """Ask for figures."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        """End it."""
        self._rig.end(self._process)


def measure(options: argparse.Namespace) -> Report:
    """Boot, install, hold, kill."""
    report = Report("SIGKILL under systemd, with leases held by as many connections")
    reason = refusal()
    if reason is not None:
        report.rows.append(("not measured", reason))
        return report
    pauses_ms: list[float] = []
    greeted_ms: list[float] = []
    with ExitStack() as stack:
        rig = stack.enter_context(Rig())
        rig.install()
        rig.configure(GPUORCH_SIMULATE="1x81920")
        rig.systemctl("start", DAEMON)
        rig.gpuorch("health")
        share = options.leases // PROCESSES
        holders = [Client(rig, "justnews", "hold", share) for _ in range(PROCESSES)]
        # Another user: one alone may hold no more connections than that.
        asker = Client(rig, "root", "ask")
        for client in (*holders, asker):
            stack.callback(client.close)
            assert client.hear() == ["ready"]
        chance = random.Random(options.seed)
        for _ in range(options.kills):
            time.sleep(SETTLE_S + chance.random() * 0.1)
            asker.told()
            killed_s = time.monotonic()
            assert rig.kill_daemon(), "there is no daemon to kill"
            time.sleep(SETTLE_S)
            longest_s, live = asker.told()
            assert live == "True"
            pauses_ms.append(float(longest_s) * 1_000)
            ends = []
            for holder in holders:
                last_s, held = holder.told()
                assert int(held) == share, f"{held} leases live"
                ends.append(float(last_s))
            greeted_ms.append((max(ends) - killed_s) * 1_000)
    report.add("leases", "leases, each on its connection", str(options.leases), options.leases)
    report.add("kills", "kills", f"{options.kills}, seed {options.seed}", options.kills)
    pause = Spread.of(pauses_ms)
    report.add_spread("pause_ms", "the pause that a client sees", pause, "ms")
    report.add("worst_ms", "the longest", f"{max(pauses_ms):.1f} ms", max(pauses_ms))
    greeted = Spread.of(greeted_ms)
    report.add_spread("greeted_ms", "until the last was greeted", greeted, "ms")
    report.aim(f"a median of at most {AIM_MS} ms", pause.median <= AIM_MS)
    return report


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--leases", type=int, default=900)
    arguments.add_argument("--kills", type=int, default=15)
    arguments.add_argument("--seed", type=int, default=5)
    sys.exit(run(measure, arguments))
