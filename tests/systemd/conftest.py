"""One booted host for all tests here, put back in order after each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.rig import DAEMON, SOCKETS, Rig, refusal

CARDS = "2x81920"
AGENT = "/opt/justnews/bin/agent"
# What an agent of the pipeline does, as short as it can be: asks, says what it got, and works on.
AGENT_PROGRAM = """\
#!/usr/lib/gpuorchd/bin/python -I
import os, signal, sys
import libclient

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
lease = libclient.lease(sys.argv[1], "2GiB")
print(f"{os.getpid()} works on {lease.device}: {lease.reason or 'granted'}", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture(scope="session")
def booted() -> Iterator[Rig]:
    """A host on which this checkout was installed by `make install`; nothing of it runs."""
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)
    with Rig() as rig:
        rig.install()
        rig.write(AGENT, AGENT_PROGRAM, 0o755)
        yield rig


@pytest.fixture
def rig(booted: Rig) -> Iterator[Rig]:
    """The host with both sockets listening and no daemon yet, on simulated cards."""
    booted.configure(GPUORCH_SIMULATE=CARDS)
    booted.systemctl("start", *SOCKETS)
    yield booted
    put_in_order(booted)


def put_in_order(rig: Rig) -> None:
    """Stop everything that a test may have started, and forget that it failed."""
    rig.systemctl("stop", "justnews@*", *SOCKETS, DAEMON)
    rig.remove_drop_ins()
    rig.systemctl("reset-failed")
    rig.run("rm", "-rf", "/var/lib/gpuorchd", "/run/gpuorchd")
