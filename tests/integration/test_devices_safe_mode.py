"""SAFE_MODE touches neither NVML nor CUDA, and the daemon's own process never does.

The driver's library is a file in which the dynamic loader finds no library; the kernel says whether
anybody opened it. The binding that is tried is the real one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon_process import DaemonProcess, running_daemon, wait_until
from tests.support.fake_cards import FakeCards, card
from tests.support.opened_files import OpenWatch


@pytest.fixture
def library(tmp_path: Path) -> Iterator[tuple[OpenWatch, dict[str, str]]]:
    """A watched libnvidia-ml, and the environment in which a process would load it."""
    folder = tmp_path / "driver"
    folder.mkdir()
    file = folder / "libnvidia-ml.so.1"
    file.write_text("no library\n")
    with OpenWatch(file) as watch:
        yield watch, {"LD_LIBRARY_PATH": str(folder)}


def children_of(pid: int) -> list[int]:
    """The children of all of its threads, which come and go."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children += map(int, (task / "children").read_text().split())
        except FileNotFoundError:
            continue
    return children


def assert_own_process_is_clean(daemon: DaemonProcess) -> None:
    """Fail if the daemon's own process has the driver's library or a device of it."""
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "libnvidia" not in maps
    assert "libcuda" not in maps
    assert not [path for path in opened_by(daemon.pid) if path.startswith("/dev/nvidia")]


def opened_by(pid: int) -> list[str]:
    """What a process has open; it opens and closes files meanwhile."""
    paths = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            paths.append(os.readlink(entry))
        except FileNotFoundError:
            continue
    return paths


def probed(daemon: DaemonProcess) -> bool:
    """Whether the first probe has ended."""
    with daemon.client() as client:
        checks = client.ask("ready")["checks"]
        return bool(checks["devices"]["ok"])


def test_the_driver_is_loaded_without_safe_mode_but_by_the_probe_alone(
    tmp_path: Path, library: tuple[OpenWatch, dict[str, str]]
) -> None:
    opens, environ = library
    with running_daemon(tmp_path, environ=environ) as daemon:
        wait_until(lambda: probed(daemon), "the first probe has ended")
        assert opens.count > 0, "this is how an opened library would show"
        assert_own_process_is_clean(daemon)
        with daemon.client() as client:
            info = client.ask("gpu_info")
        assert (info["available"], info["nvml_supported"]) == (False, False)
        assert info["nvml_init_error"] == "NVML Shared Library Not Found"
        assert info["message"]


def test_under_safe_mode_nobody_opens_the_driver(
    tmp_path: Path, library: tuple[OpenWatch, dict[str, str]]
) -> None:
    opens, environ = library
    with running_daemon(tmp_path, environ={**environ, "SAFE_MODE": "true"}) as daemon:
        with daemon.client() as client:
            info = client.ask("gpu_info")
            assert info["ok"]
            assert (info["available"], info["gpus"]) == (False, [])
            assert info["message"]
            answer = client.ask("lease", agent="analyst", min_memory_mb=100)
            assert (answer["granted"], answer["note"]) == (False, "SAFE_MODE")
            assert client.ask("ready")["ready"]
            assert "gpu_orchestrator_" in client.ask("metrics")["text"]
            client.ask("explain", agent="analyst")
        assert opens.count == 0
        assert children_of(daemon.pid) == []
        assert_own_process_is_clean(daemon)
        assert daemon.stop() == 0
    assert opens.count == 0


def test_safe_mode_at_run_time_lets_go_of_the_driver_and_takes_it_up_again(tmp_path: Path) -> None:
    cards = FakeCards(tmp_path, card())
    with running_daemon(tmp_path, environ=cards.environment) as daemon, daemon.client() as admin:
        wait_until(lambda: bool(admin.ask("gpu_info")["available"]), "the card is found")
        assert children_of(daemon.pid) == cards.importers()
        assert admin.ask("policy_set", changes={"safe_mode": True})["ok"]
        wait_until(lambda: children_of(daemon.pid) == [], "the probe is gone")
        info = admin.ask("gpu_info")
        assert (info["available"], info["nvml_supported"]) == (False, False)
        assert len(cards.importers()) == 1
        assert admin.ask("policy_set", changes={"safe_mode": False})["ok"]
        wait_until(lambda: bool(admin.ask("gpu_info")["available"]), "the card is found again")
        assert children_of(daemon.pid) == cards.importers()[1:]
        assert daemon.pid not in cards.importers()
        assert daemon.stop() == 0


def test_a_card_that_is_read_is_leased_and_drained(tmp_path: Path) -> None:
    cards = FakeCards(tmp_path, card(0, 1_000))
    with running_daemon(tmp_path, environ=cards.environment) as daemon:
        with daemon.client() as holder, daemon.client() as other:
            wait_until(lambda: bool(holder.ask("gpu_info")["available"]), "the card is found")
            wait_until(
                lambda: holder.ask("gpu_info")["gpus"][0]["state"] == "ok", "the card is read"
            )
            granted = holder.ask("lease", agent="scout", min_memory_mb=900)
            assert granted["granted"]
            assert not other.ask("lease", agent="critic", min_memory_mb=900)["granted"]
            other.send("lease", agent="critic", min_memory_mb=900, wait_s=60)
            assert holder.ask("release", token=granted["token"])["released"]
            assert other.reply()["granted"]
        assert daemon.stop() == 0
