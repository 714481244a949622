"""Two hundred clients ask at once for an eighth of a card each: never more than the card holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import ROOT, DaemonProcess, LineClient, running_daemon

CLIENTS = 200
CARD_MB = 81_920
SHARE_MB = CARD_MB // 8
# How long the bytes of an ended lease stay away on the simulated card.
DRAIN_S = 0.1
# All wait their turn: 25 rounds of eight, each a hold and a drain, and a busy machine.
DEADLINE_S = 60.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    environ = {"GPUORCH_SIMULATE_DRAIN_S": str(DRAIN_S)}
    with running_daemon(tmp_path, "--simulate", f"1x{CARD_MB}", environ=environ) as daemon:
        yield daemon


def test_a_crowd_never_holds_more_than_the_card_and_all_are_answered(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    arguments = (str(daemon.socket), str(CLIENTS), str(SHARE_MB))
    told = tmp_path / "told"
    with told.open("ab") as file:
        crowd = subprocess.Popen(
            [sys.executable, "-m", "tests.support.crowd", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
        )
    try:
        with daemon.client() as observer:
            listed_mb = _watch(observer, crowd)
        assert crowd.wait(DEADLINE_S) == 0
    finally:
        crowd.kill()
        crowd.wait()
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert len(lines) == CLIENTS
    assert all(line["reply"]["granted"] for line in lines)
    # What a client sees lies within what the daemon gave: a grant is seen after it was made, and a
    # lease is let go of before its bytes begin to come back.
    assert _most_at_once(lines) * SHARE_MB <= CARD_MB
    assert max(listed_mb) <= CARD_MB
    # The observer saw a full card, so it looked at the right moments.
    assert max(listed_mb) == CARD_MB


def test_nothing_is_left_when_the_crowd_has_gone(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        for _ in range(3):
            granted = client.ask("lease", agent="crowd", min_memory_mb=CARD_MB, wait_s=5)
            assert granted["granted"], granted
            client.ask("release", token=granted["token"])
        assert client.ask("queue")["waiting"] == []


def _watch(observer: LineClient, crowd: subprocess.Popen[bytes]) -> list[int]:
    """Return what all leases together kept, draining ones too, as often as it can be asked."""
    listed_mb = [0]
    while crowd.poll() is None:
        page = observer.ask("allocations")
        assert page["next"] is None
        listed_mb.append(
            sum(gpu["memory_mb"] for lease in page["allocations"] for gpu in lease["gpus"])
        )
    return listed_mb


def _most_at_once(lines: list[dict[str, Any]]) -> int:
    """Return the most leases that kept bytes at one moment, the time to drain included."""
    changes = [(line["granted_s"], 1) for line in lines]
    changes += [(line["let_go_s"] + DRAIN_S, -1) for line in lines]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most
