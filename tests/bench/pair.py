"""A lease + release pair against the floor of C and against a lock in Redis.

One run, one core for both ends of every contender, rounds taken in turn, so that whatever else
the machine does falls on all of them alike; then medians of the ratios within each round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench.figures import Report, Spread, run
from tests.bench.pair_client import AGENT, MEMORY_MB
from tests.bench.surroundings import free_port, pinned_to_one_core
from tests.bench.wire_client import WireClient
from tests.support.daemon_process import ROOT, running_daemon
from tests.support.system_packages import install_command, path_of

AIM_TIMES_C = 2.5
# Pairs in a round: each contender's takes some tens of milliseconds, which is longer than a time
# slice of the scheduler and short enough for many rounds.
PAIRS = {"c": 1_500, "gpuorchd": 600, "redis": 300}
WARM_UP_PAIRS = 300
START_DEADLINE_S = 10.0


class Contender:
    """A client process that does pairs when it is told to."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def pair_us(self, pairs: int) -> float:
        """Do that many pairs and return the microseconds of one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{pairs}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client of {self.name} ended")
        return int(line) / pairs / 1_000

    def close(self) -> None:
        """End the process by the end of its input."""
        self._process.communicate(timeout=START_DEADLINE_S)


@contextmanager
def c_echo(folder: Path, sizes: tuple[int, int, int, int]) -> Iterator[Contender]:
    """Compile the C pair and start both its ends."""
    program = str(folder / "echo")
    source = str(Path(__file__).with_name("echo.c"))
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    arguments = [str(folder / "c"), *map(str, sizes)]
    server = subprocess.Popen([program, "server", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        contender = Contender("C", [program, "client", *arguments])
        try:
            yield contender
        finally:
            contender.close()
    finally:
        server.communicate(timeout=START_DEADLINE_S)


@contextmanager
def gpuorchd(folder: Path) -> Iterator[tuple[Contender, tuple[int, int, int, int]]]:
    """Start the daemon with everything on and a client; give the sizes of a pair's messages too."""
    flags = ("--simulate", "1x81920", "--http-port", str(free_port()))
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
    with (
        # The lease table on a memory file system, as under /run.
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        running_daemon(folder, *flags, "--runtime-dir", memory, environ=environ) as daemon,
    ):
        with WireClient(daemon.socket) as probe:
            granted = probe.ask("lease", agent=AGENT, min_memory_mb=MEMORY_MB)
            asked, answered = probe.sent_bytes, probe.received_bytes
            probe.ask("release", token=granted["token"])
            sizes = (asked, answered, probe.sent_bytes, probe.received_bytes)
        contender = Contender("gpuorchd", _client("gpuorchd", daemon.socket))
        try:
            yield contender, sizes
        finally:
            contender.close()


@contextmanager
def redis(folder: Path, program: str) -> Iterator[Contender]:
    """Start a Redis of our own, in memory only, and a client."""
    path = folder / "r"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir"]
    with (folder / "redis.log").open("wb") as log:
        server = subprocess.Popen([*command, str(folder)], stdout=log, stderr=log)
    try:
        _wait_for_redis(path)
        contender = Contender("redis", _client("redis", path))
        try:
            yield contender
        finally:
            contender.close()
    finally:
        server.terminate()
        server.wait(START_DEADLINE_S)


def measure(options: argparse.Namespace) -> Report:
    """Start all contenders on one core, and take rounds in turn."""
    report = Report("lease + release, both ends on one core, medians of rounds (10 % to 90 %)")
    with tempfile.TemporaryDirectory() as name, pinned_to_one_core(), ExitStack() as stack:
        folder = Path(name)
        daemon, sizes = stack.enter_context(gpuorchd(folder))
        contenders = {"c": stack.enter_context(c_echo(folder, sizes)), "gpuorchd": daemon}
        program = path_of("redis-server")
        if program is not None:
            contenders["redis"] = stack.enter_context(redis(folder, program))
        rounds = _take_rounds(contenders, options.rounds)
    shown = "{} -> {}, {} -> {} bytes".format(*sizes)
    report.add("bytes", "messages of a pair", shown, list(sizes))
    report.add("rounds", "rounds", str(options.rounds), options.rounds)
    labels = {"c": "C echo", "gpuorchd": "gpuorchd", "redis": "Redis (redis-py)"}
    for key, values in rounds.items():
        report.add_spread(f"{key}_us", f"{labels[key]}, a pair", Spread.of(values), "us")
    _compare(report, rounds)
    return report


def _compare(report: Report, rounds: dict[str, list[float]]) -> None:
    over_c = Spread.of(_ratios(rounds["gpuorchd"], rounds["c"]))
    report.add_spread("times_c", "gpuorchd / C", over_c, "times", 2)
    report.aim(f"at most {AIM_TIMES_C} times C", over_c.median <= AIM_TIMES_C)
    if "redis" in rounds:
        over_redis = Spread.of(_ratios(rounds["gpuorchd"], rounds["redis"]))
        report.add_spread("times_redis", "gpuorchd / Redis", over_redis, "times", 2)
        report.aim("faster than redis-py", over_redis.median < 1)
    else:
        report.rows.append(("Redis", f"not measured; run: {install_command(['redis-server'])}"))


def _take_rounds(contenders: dict[str, Contender], count: int) -> dict[str, list[float]]:
    order = list(contenders)
    for contender in contenders.values():
        contender.pair_us(WARM_UP_PAIRS)
    rounds: dict[str, list[float]] = {key: [] for key in order}
    for _ in range(count):
        for key in order:
            rounds[key].append(contenders[key].pair_us(PAIRS[key]))
        # Nobody always comes after the same neighbour.
        order.append(order.pop(0))
    return rounds


def _ratios(these: list[float], those: list[float]) -> list[float]:
    return [this / that for this, that in zip(these, those, strict=True)]


def _client(name: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "tests.bench.pair_client", name, str(path)]


def _wait_for_redis(path: Path) -> None:
    import redis as redis_py
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    retry = Retry(ConstantBackoff(0.05), int(START_DEADLINE_S / 0.05))
    with redis_py.Redis(
        unix_socket_path=str(path), retry=retry, retry_on_error=[redis_py.ConnectionError]
    ) as server:
        server.ping()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=60)
    sys.exit(run(measure, arguments))
