"""Leases under a real systemd: nothing that ends the daemon ends them.

`GPUORCH_SOAK_KILLS` kills more often (`make soak`) and waits a minute where a test waits a moment;
`GPUORCH_TEST_SEED` chooses other moments. Both are printed at the end.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.daemon_process import wait_until
from tests.systemd.crowd import ENVIRONMENT, Crowd, Killer, Member
from tests.systemd.rig import DAEMON, SOCKETS, Rig

SOAK_KILLS = int(os.environ.get("GPUORCH_SOAK_KILLS", "0"))
KILLS = SOAK_KILLS or 200
SEED = int(os.environ.get("GPUORCH_TEST_SEED", "5"))
# A kill and what it costs, many times over: the machine may be busy.
KILL_TIMEOUT_S = 120 + 2 * KILLS
CHECKED_EVERY = 50
RESTARTS = 10
STANDSTILLS = 2
STOPPED_S = 60.0 if SOAK_KILLS else 3.0
# The daemon is started again however often it was killed. Nothing else may differ for the kills.
KILL_DROP_IN = "[Unit]\nStartLimitIntervalSec=0\n"
SHORT_WATCHDOG = "[Service]\nWatchdogSec=2\n"

pytestmark = [pytest.mark.serial, pytest.mark.slow]


@pytest.fixture(autouse=True)
def crowded(rig: Rig) -> None:
    """Let one connection hold so many leases that a reply is a megabyte."""
    rig.configure(**ENVIRONMENT)


@pytest.mark.timeout(KILL_TIMEOUT_S)
def test_leases_survive_the_daemon_s_death_at_any_moment(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.drop_in(DAEMON, KILL_DROP_IN)
    killer = Killer(rig, SEED)
    with Crowd(rig) as crowd:
        began_s = time.monotonic()
        for number in range(1, KILLS + 1):
            killer.kill()
            if number % CHECKED_EVERY == 0:
                crowd.check()
                if SOAK_KILLS:
                    tell(capsys, f"{number} of {KILLS} kills, {time.monotonic() - began_s:.0f} s")
        took_s = time.monotonic() - began_s
        found = crowd.disperse()
    assert killer.total == KILLS
    tell(
        capsys,
        f"{KILLS} kills with seed {SEED} in {took_s:.0f} s, {crowd.leases} leases held: "
        f"0 lost, 0 granted twice; killed {told(killer.counts)}; {told(found)}",
    )


def test_leases_survive_restarts(rig: Rig) -> None:
    with Crowd(rig) as crowd:
        for _ in range(RESTARTS):
            before = rig.main_pid()
            rig.systemctl("restart", DAEMON)
            assert rig.main_pid() not in {0, before}
        crowd.disperse()


def test_leases_survive_a_daemon_that_stands_still(rig: Rig) -> None:
    rig.drop_in(DAEMON, SHORT_WATCHDOG)
    place = rig.cursor()
    with Crowd(rig) as crowd:
        for _ in range(STANDSTILLS):
            pid = rig.kill_daemon(signal.SIGSTOP)
            assert pid
            rig.wait_for_restart(pid)
        crowd.disperse()
    assert any("Watchdog timeout" in line for line in rig.messages(DAEMON, place))


def test_leases_survive_a_typo_in_the_env_file_and_it_is_reported(rig: Rig) -> None:
    with Crowd(rig) as crowd:
        place = rig.cursor()
        rig.configure(**ENVIRONMENT, GPU_ORCHESTRATOR_LEASE_TTL="0s0")
        rig.systemctl("restart", DAEMON)
        crowd.check()
        said = "GPU_ORCHESTRATOR_LEASE_TTL"
        wait_until(lambda: said in rig.show(DAEMON, "StatusText"), "the typo in the status")
        wait_until(lambda: any(said in x for x in rig.messages(DAEMON, place)), "it in the log")
        ready = rig.gpuorch("ready", check=False)
        assert ready.returncode == 1
        assert said in ready.stderr
        # Killed on top of it, it goes on with what was good all the same.
        rig.wait_for_restart(rig.kill_daemon())
        crowd.check()
        rig.configure(**ENVIRONMENT)
        rig.systemctl("restart", DAEMON)
        rig.gpuorch("ready", "--wait", "20s")
        crowd.disperse()


@pytest.mark.timeout(120 + 2 * STOPPED_S)
def test_every_living_client_is_reattached_after_a_stop_and_a_start(rig: Rig) -> None:
    with Crowd(rig, busy=False) as crowd:
        rig.systemctl("stop", *SOCKETS, DAEMON)
        assert rig.main_pid() == 0
        assert rig.show(DAEMON, "NFileDescriptorStore") == "0"
        time.sleep(STOPPED_S)
        rig.systemctl("start", *SOCKETS, DAEMON)
        crowd.wait_until_attached()
        crowd.disperse()


def test_a_full_store_refuses_the_next_and_keeps_the_others(rig: Rig) -> None:
    """The bound of the installed unit; those of holders come before it and are raised."""
    bound = int(rig.show(DAEMON, "FileDescriptorStoreMax"))
    rig.configure(
        GPUORCH_SIMULATE="1x81920",
        GPUORCH_MAX_HOLDERS=bound + 1,
        GPUORCH_MAX_HOLDERS_PER_UID=bound + 1,
    )
    rig.gpuorch("health")
    # One process may have no more than 1,024 files open.
    share = bound // 4
    counts = (share, share, share, bound - 3 * share)
    members = [Member(rig, "holds", at * share, count, 10) for at, count in enumerate(counts)]
    try:
        for member in members:
            member.wait_until_ready()
            assert [row[2] for row in member.began_with] == [None] * len(member.began_with)
        assert rig.show(DAEMON, "NFileDescriptorStore") == str(bound)
        one_more = "import libclient; print(libclient.lease('late', 10).detail)"
        said = f"at most {bound} connections in the descriptor store; this bound is reached"
        assert said in rig.python(one_more)
        rig.wait_for_restart(rig.kill_daemon())
        for member in members:
            assert member.tell("report") == member.began_with
        assert rig.show(DAEMON, "NFileDescriptorStore") == str(bound)
        assert said in rig.python(one_more)
    finally:
        for member in members:
            member.end(rig)


def tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Print a line although the test passes."""
    with capsys.disabled():
        print(f"\n{text}", end="", flush=True)


def told(counts: dict[str, int]) -> str:
    """Write counts in one line."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())
