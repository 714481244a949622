"""Ready means that requests get right answers; if not, a check says why."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gpuorchd.core.events import DevicesLost
from gpuorchd.observe.readiness import (
    Readiness,
    devices_check,
    mps_check,
    nvml_check,
    settings_check,
)
from tests.support.observed import ObservedEngine


@dataclass
class Status:
    """What a source of devices says of itself."""

    nvml_supported: bool = True
    nvml_init_error: str | None = None
    mps_enabled: bool = False
    mps_control_process: bool = False
    mps_pipe_dir: str = "/tmp/nvidia-mps"
    first_probe_running: bool = False
    answering: bool = True
    detail: str = ""


def test_ready_only_if_every_check_is_ok() -> None:
    readiness = Readiness()
    readiness.add("one", lambda: (True, "fine"))
    assert readiness.report()["ready"]
    readiness.add("two", lambda: (False, "broken"))
    assert readiness.report() == {
        "ready": False,
        "checks": {"one": {"ok": True, "detail": "fine"}, "two": {"ok": False, "detail": "broken"}},
    }


def test_two_checks_of_one_name_are_an_error() -> None:
    readiness = Readiness()
    readiness.add("one", lambda: (True, ""))
    with pytest.raises(ValueError, match="one"):
        readiness.add("one", lambda: (True, ""))


def test_a_first_probe_that_still_runs_is_not_ready() -> None:
    engine = ObservedEngine(cards=0)
    check = devices_check(lambda: engine.state, lambda: Status(first_probe_running=True))
    assert check() == (False, "the first device probe is still running")
    engine.submit(DevicesLost("no driver"))
    assert devices_check(lambda: engine.state, Status)() == (True, "no GPU: no driver")


def test_a_driver_that_has_stopped_answering_is_not_ready() -> None:
    engine = ObservedEngine()
    status = Status(answering=False, detail="the driver has not answered for 5 s")
    check = devices_check(lambda: engine.state, lambda: status)
    assert check() == (False, "the driver has not answered for 5 s")
    status.answering = True
    status.detail = ""
    assert check() == (True, "2 found")


def test_safe_mode_is_ready_whatever_is_demanded() -> None:
    engine = ObservedEngine(cards=0)
    engine.state.safe_mode = True
    status = Status(nvml_supported=False, first_probe_running=True, answering=False)
    readiness = Readiness()
    readiness.add("devices", devices_check(lambda: engine.state, lambda: status))
    readiness.add("nvml", nvml_check(lambda: engine.state, lambda: status, demanded=True))
    readiness.add("mps", mps_check(lambda: engine.state, lambda: status, demanded=True))
    report = readiness.report()
    assert report["ready"]
    assert {entry["detail"] for entry in report["checks"].values()} == {
        "not looked at: SAFE_MODE is on"
    }


@pytest.mark.parametrize("demanded", [True, False])
def test_nvml_has_to_be_there_only_where_it_is_demanded(demanded: bool) -> None:
    engine = ObservedEngine()
    status = Status(nvml_supported=False, nvml_init_error="ERROR_LIBRARY_NOT_FOUND")
    ok, detail = nvml_check(lambda: engine.state, lambda: status, demanded=demanded)()
    assert ok is not demanded
    assert ("ERROR_LIBRARY_NOT_FOUND" in detail) == demanded
    status.nvml_supported = True
    assert nvml_check(lambda: engine.state, lambda: status, demanded=demanded)()[0]


@pytest.mark.parametrize("demanded", [True, False])
def test_mps_has_to_run_only_where_it_is_demanded(demanded: bool) -> None:
    engine = ObservedEngine()
    status = Status()
    check = mps_check(lambda: engine.state, lambda: status, demanded=demanded)
    assert check()[0] is not demanded
    status.mps_enabled = True
    assert check()[0]


def test_settings_that_cannot_be_kept_are_not_ready() -> None:
    failure: list[str | None] = [None]
    check = settings_check(lambda: failure[0])
    assert check()[0]
    failure[0] = "/var/lib/x cannot be written: no space"
    assert check() == (False, "/var/lib/x cannot be written: no space")
