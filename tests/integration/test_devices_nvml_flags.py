"""ENABLE_NVML: unset detects, `true` makes the absence a failed check, `false` reads the least.

Each on a host with a driver, on one without, and under SAFE_MODE, where it changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import DaemonProcess, LineClient, running_daemon, wait_until
from tests.support.fake_cards import FakeCards, card

FOR_PEOPLE = (
    "utilization_gpu_pct",
    "memory_utilization_pct",
    "temperature_c",
    "power_draw_w",
)

FLAGS: list[dict[str, str]] = [{}, {"ENABLE_NVML": "true"}, {"ENABLE_NVML": "false"}]
NAMES = ["unset", "true", "false"]


def read_gpu(client: LineClient) -> dict[str, Any]:
    """Wait until the one GPU has been read, and return all of `gpu_info`."""
    info: dict[str, Any] = {}

    def is_read() -> bool:
        nonlocal info
        info = client.ask("gpu_info")
        return bool(info["available"]) and info["gpus"][0]["state"] == "ok"

    wait_until(is_read, "the GPU is read")
    return info


def checks_after_first_probe(daemon: DaemonProcess) -> dict[str, Any]:
    """Wait until the first probe has ended, and return the answer to `ready`."""
    answer: dict[str, Any] = {}

    def is_over() -> bool:
        nonlocal answer
        with daemon.client() as client:
            answer = client.ask("ready")
        return bool(answer["checks"]["devices"]["ok"])

    wait_until(is_over, "the first probe has ended")
    return answer


@pytest.mark.parametrize("flag", FLAGS[:2], ids=NAMES[:2])
def test_nvml_is_detected_and_enriches_where_it_is_not_switched_off(
    tmp_path: Path, flag: dict[str, str]
) -> None:
    cards = FakeCards(tmp_path, card(0))
    with running_daemon(tmp_path, environ={**cards.environment, **flag}) as daemon:
        with daemon.client() as client:
            info = read_gpu(client)
        assert (info["nvml_supported"], info["nvml_enriched"]) == (True, True)
        assert [info["gpus"][0][field] for field in FOR_PEOPLE] == [37, 12, 41, 71.5]
        assert checks_after_first_probe(daemon)["ready"]


def test_switched_off_it_reads_only_what_admission_needs(tmp_path: Path) -> None:
    # What is for people would fail the test by hanging.
    cards = FakeCards(tmp_path, card(0), hang="nvmlDeviceGetUtilizationRates")
    environ = {**cards.environment, "ENABLE_NVML": "false"}
    with running_daemon(tmp_path, environ=environ) as daemon:
        with daemon.client() as client:
            info = read_gpu(client)
            assert (info["nvml_supported"], info["nvml_enriched"]) == (True, False)
            gpu = info["gpus"][0]
            assert (gpu["memory_total_mb"], gpu["memory_free_mb"]) == (24_576, 24_576)
            assert [gpu[field] for field in FOR_PEOPLE] == [None] * 4
            assert client.ask("lease", agent="scout", min_memory_mb=24_576)["granted"]
        assert checks_after_first_probe(daemon)["ready"]
        assert cards.hanging() == []


@pytest.mark.parametrize("flag", [FLAGS[0], FLAGS[2]], ids=["unset", "false"])
def test_absent_it_is_no_failure_where_it_was_not_demanded(
    tmp_path: Path, flag: dict[str, str]
) -> None:
    cards = FakeCards(tmp_path, errors={"nvmlInit": 12})
    with running_daemon(tmp_path, environ={**cards.environment, **flag}) as daemon:
        assert checks_after_first_probe(daemon)["ready"]
        with daemon.client() as client:
            info = client.ask("gpu_info")
            assert (info["available"], info["nvml_supported"]) == (False, False)
            assert info["nvml_init_error"] == "NVML Shared Library Not Found"
            assert client.ask("lease", agent="scout")["note"] == "NO_GPU"


def test_absent_it_is_a_failed_check_where_it_was_demanded(tmp_path: Path) -> None:
    cards = FakeCards(tmp_path, errors={"nvmlInit": 12})
    environ = {**cards.environment, "ENABLE_NVML": "true"}
    with running_daemon(tmp_path, environ=environ) as daemon:
        answer = checks_after_first_probe(daemon)
        assert not answer["ready"]
        assert not answer["checks"]["nvml"]["ok"]
        assert "NVML Shared Library Not Found" in answer["checks"]["nvml"]["detail"]
        with daemon.client() as client:
            # The daemon runs on, and says the truth about the host.
            assert client.ask("health")["status"] == "ok"
            assert client.ask("lease", agent="scout")["note"] == "NO_GPU"


@pytest.mark.parametrize("flag", FLAGS, ids=NAMES)
def test_under_safe_mode_it_is_not_touched_whatever_the_flag(
    tmp_path: Path, flag: dict[str, str]
) -> None:
    cards = FakeCards(tmp_path, card(0))
    environ = {**cards.environment, **flag, "SAFE_MODE": "true"}
    with running_daemon(tmp_path, environ=environ) as daemon:
        with daemon.client() as client:
            info = client.ask("gpu_info")
            assert (info["available"], info["nvml_supported"]) == (False, False)
            assert info["nvml_enriched"] is False
            assert client.ask("ready")["ready"]
        assert cards.importers() == []


def test_another_word_for_it_stops_the_start(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, environ={"ENABLE_NVML": "maybe"})
    try:
        assert daemon.wait() == 2
        assert "ENABLE_NVML is 'maybe'; allowed:" in daemon.output()
    finally:
        daemon.end()
