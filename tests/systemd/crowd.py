"""A crowd of clients on the rig that lives through whatever becomes of the daemon.

`Crowd` starts clients_inside.py in all its roles and sealed commands beside them, and checks from
outside of the library that nothing was lost or granted twice. `Killer` kills the daemon at seeded
moments of every kind.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from gpuorchd.host.table import HALF_BYTES, HALF_HEAD, HEAD_BYTES
from tests.support.daemon_process import wait_until
from tests.systemd.rig import PYTHON, Rig

PROGRAM = "/checkout/tests/systemd/clients_inside.py"
CARDS = "3x81920"
# One connection holds more leases than is usual, so that replies are about a megabyte.
ENVIRONMENT = {"GPUORCH_SIMULATE": CARDS, "GPUORCH_MAX_LEASES_PER_CONNECTION": "900"}
HOLDERS_A_PROCESS = 10
HOLDER_PROCESSES = 6
SEALED = 4
WAITERS = 16
ASKERS_A_PROCESS = 4
ASKER_PROCESSES = 2
SLOW_LEASES = 850
TABLE = "/run/gpuorchd/leases"
STATE = "/var/lib/gpuorchd"
# In what follows a start, how long a moment may be waited for.
MOMENT_S = 0.3
RESTART_DEADLINE_S = 30.0

Row = list[Any]


class Member:
    """One process of the crowd."""

    def __init__(self, rig: Rig, role: str, *words: object, user: str = "justnews") -> None:
        self.role = role
        self._process = rig.start(
            PYTHON, "-I", PROGRAM, role, *map(str, words), user=user,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.began_with: Any = None

    def wait_until_ready(self) -> None:
        """Take what it says first."""
        self.began_with = self.hear()

    def tell(self, word: str) -> Any:
        """Give it a line and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> Any:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"a client that {self.role} has ended"
        return json.loads(line)

    def end(self, rig: Rig) -> None:
        """End the process."""
        rig.end(self._process)


class Crowd:
    """All clients of a kill test; use it in `with`. `busy` False leaves out who asks and waits."""

    def __init__(self, rig: Rig, *, busy: bool = True) -> None:
        self._rig = rig
        self._busy = busy
        self._sealed: list[subprocess.Popen[str]] = []
        self._members: list[Member] = []
        self._holding: list[Member] = []
        self._askers: list[Member] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        # The daemon is up before they come: they are many, and each waits 2 s for an answer.
        self._rig.gpuorch("health")
        if self._busy:
            self._seal()
        holders = [
            self._join("holds", at * HOLDERS_A_PROCESS, HOLDERS_A_PROCESS, 1_000)
            for at in range(HOLDER_PROCESSES)
        ]
        self._holding = [*holders, self._join("reads_slowly", SLOW_LEASES)]
        if self._busy:
            self._waiters = self._join("waits", WAITERS)
            self._changer = self._join("changes", user="root")
            self._holding += [self._waiters, self._changer]
        for member in self._members:
            member.wait_until_ready()
        self._slow = self._holding[HOLDER_PROCESSES]
        self._looker = self._join("looks")
        self._looker.wait_until_ready()
        self.check()
        if self._busy:
            self._askers = [self._join("asks", ASKERS_A_PROCESS) for _ in range(ASKER_PROCESSES)]
            for asker in self._askers:
                asker.wait_until_ready()

    def _join(self, role: str, *words: object, user: str = "justnews") -> Member:
        member = Member(self._rig, role, *words, user=user)
        self._members.append(member)
        return member

    def _seal(self) -> None:
        """Start commands whose connections nobody reads."""
        for _ in range(SEALED):
            self._sealed.append(
                self._rig.start(
                    "gpuorch", "run", "--mem", "1000MiB", "--device", "0", "--agent", "sealed",
                    "--wait", "60s", "--", "sleep", "infinity", user="justnews",
                )
            )  # fmt: skip
        wait_until(lambda: len(self._sealed_ids()) == SEALED, "the sealed commands")
        self._sealed_before = self._sealed_ids()

    def _sealed_ids(self) -> set[str]:
        rows = json.loads(self._rig.gpuorch("leases", "--json").stdout)["allocations"]
        return {row["lease_id"] for row in rows if row["agent"] == "sealed"}

    @property
    def leases(self) -> int:
        """How many leases are held all the time."""
        return len(self._ids())

    def _ids(self) -> set[str]:
        ids = {row[0] for member in self._holding for row in member.began_with}
        return ids | (self._sealed_before if self._sealed else set())

    def check(self) -> dict[str, Any]:
        """Fail where a lease is not as it was; return what the looker has seen so far."""
        for member in self._holding:
            assert all(ended is None for _, _, ended in member.began_with), member.role
            found = member.tell("report")
            changed = [
                pair for pair in zip(member.began_with, found, strict=True) if pair[0] != pair[1]
            ]
            assert not changed, f"{member.role}: {len(changed)} leases changed: {changed[:3]}"
        assert all(command.poll() is None for command in self._sealed)
        seen: dict[str, Any] = self._looker.tell(json.dumps(sorted(self._ids())))
        assert seen.pop("bad") == []
        return seen

    def wait_until_attached(self) -> None:
        """Wait until no lease waits for its owner any more."""

        def attached() -> bool:
            rows = json.loads(self._rig.gpuorch("leases", "--json").stdout)["allocations"]
            return bool(rows) and all(row["state"] == "active" for row in rows)

        wait_until(attached, "their owners' return", RESTART_DEADLINE_S)

    def disperse(self) -> dict[str, int]:
        """Let everybody come to an end; fail where anything was not as it has to be."""
        self.check()
        seen = self._looker.tell("[]")
        assert seen["bad"] == []
        found: dict[str, int] = {"looks": seen["looks"]}
        if self._busy:
            said = [asker.tell("over") for asker in self._askers]
            assert [one["bad"] for one in said] == [[]] * len(said)
            counts = [count for one in said for count in one["counts"]]
            assert len(counts) == ASKERS_A_PROCESS * ASKER_PROCESSES
            assert all(counts)
            found["asked and released"] = sum(counts)
            changed = self._changer.tell("over")
            assert changed["bad"] == []
            found["policy changes"] = changed["changes"]
        slow = self._slow.tell("over")
        assert slow["bad"] == []
        found["slow replies"] = slow["replies"]
        if self._busy:
            waited = self._waiters.tell("release")
            assert waited == {"bad": [], "order": list(range(WAITERS))}
        return found

    def close(self) -> None:
        """End all of them."""
        for member in self._members:
            member.end(self._rig)
        for command in self._sealed:
            self._rig.end(command)


class Killer:
    """Kills the daemon at moments that a seed chooses; counts the kinds."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self._rig = rig
        self._chance = random.Random(seed)
        self.counts: dict[str, int] = {}
        self._pid = 0

    @property
    def total(self) -> int:
        """How many daemons were killed."""
        return sum(self.counts.values())

    def kill(self) -> None:
        """Wait for a daemon that was not killed yet, then for a moment, and kill it."""
        chance = self._chance
        wait_until(
            lambda: self._rig.main_pid() not in {0, self._pid},
            "the next daemon",
            RESTART_DEADLINE_S,
        )
        kind = chance.choice(
            ("just born", "starting", "serving", "writing leases", "writing policy")
        )
        moments: dict[str, Callable[[], None]] = {
            "just born": lambda: time.sleep(chance.random() * 0.01),
            "starting": lambda: time.sleep(chance.random() * 0.4),
            "serving": lambda: self._wait_for_leases(2.0, chance.random() * 0.4),
            "writing leases": lambda: self._wait_for_leases(MOMENT_S, 0.0),
            "writing policy": self._wait_for_policy,
        }
        moments[kind]()
        killed = self._rig.kill_daemon()
        # One that systemd had ended by itself was not killed here.
        assert killed, "there was no daemon to kill"
        self._pid = killed
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _wait_for_leases(self, deadline_s: float, more_s: float) -> None:
        """Wait until the table is begun anew, as each start does, or has its first change."""
        begun_only = deadline_s == MOMENT_S and self._chance.random() < 0.5
        fd = os.open(self._rig.path(TABLE), os.O_RDONLY)
        try:
            _spin(lambda: _beginning(fd), deadline_s)
            if not begun_only:
                _spin(lambda: _tail(fd), deadline_s)
        finally:
            os.close(fd)
        time.sleep(more_s)

    def _wait_for_policy(self) -> None:
        """Wait until a new file of the policy is there and not yet in the old one's place."""
        folder = self._rig.path(STATE)
        _spin(lambda: len(os.listdir(folder)), MOMENT_S)


def _spin(look: Callable[[], object], deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    before = look()
    while look() == before and time.monotonic() < deadline:
        continue


def _beginning(fd: int) -> bytes:
    """The first rows of both halves of the table."""
    at = HEAD_BYTES + HALF_HEAD.size
    return os.pread(fd, 64, at) + os.pread(fd, 64, at + HALF_BYTES)


def _tail(fd: int) -> bytes:
    """Where the first record comes after the rows that a half began with, for both halves."""
    found = b""
    for start in (HEAD_BYTES, HEAD_BYTES + HALF_BYTES):
        _, _, size = HALF_HEAD.unpack(os.pread(fd, HALF_HEAD.size, start))
        found += os.pread(fd, 8, start + HALF_HEAD.size + size)
    return found
