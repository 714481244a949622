"""Leases under a real systemd: nothing that ends the daemon ends them."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.daemon_process import wait_until
from tests.systemd.crowd import ENVIRONMENT, Crowd, Killer
from tests.systemd.rig import DAEMON, SOCKETS, Rig

pytestmark = [pytest.mark.serial, pytest.mark.slow]

KILLS = int(os.environ.get("GPUORCH_SOAK_KILLS", "200"))
SEED = int(os.environ.get("GPUORCH_TEST_SEED", "5"))
# Without it the daemon is not started any more after 3,000 kills. Nothing else may differ.
KILL_DROP_IN = "[Service]\nStartLimitIntervalSec=0\n"


def test_leases_survive_the_daemon_s_death_at_any_moment(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.drop_in(DAEMON, "[Unit]\nStartLimitIntervalSec=0\n")
    rig.configure(**ENVIRONMENT)
    killer = Killer(rig, SEED)
    began_s = time.monotonic()
    with Crowd(rig) as crowd:
        print("crowd", time.monotonic() - began_s)
        leases = crowd.leases
        for number in range(KILLS):
            killer.kill()
            if number % 20 == 0:
                crowd.check()
                print(number, time.monotonic() - began_s, killer.counts)
        found = crowd.disperse()
    print(leases, killer.counts, found, time.monotonic() - began_s)
