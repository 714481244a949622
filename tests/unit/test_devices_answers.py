"""What the probe says is checked before it is believed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpuorchd.core.model import ProcessKey, ProcessUse
from gpuorchd.devices.answers import BadAnswer, Sample, read_answer
from gpuorchd.devices.telemetry import Telemetry

MIB = 1024 * 1024
UUID = "GPU-0fa4e000-0000-4000-8000-000000000000"


def device(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "index": 0,
        "uuid": UUID,
        "name": "Fake",
        "total": 1_000 * MIB,
        "reserved": 50 * MIB,
        "free": 700 * MIB,
        "used": 250 * MIB,
        "processes": [{"pid": 10, "start_ticks": 5, "used": 200 * MIB}],
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not ...}


def read(*devices: dict[str, Any], **more: Any) -> Sample:
    said = {"n": 7, "calls": [["memory", 1_000, 0]], "devices": list(devices), **more}
    return read_answer(json.dumps(said).encode(), 7)


def test_what_is_used_is_rounded_up_and_what_is_free_down() -> None:
    sample = read(
        device(
            total=1_000 * MIB + 5,
            reserved=49 * MIB + 1,
            free=700 * MIB + MIB - 1,
            used=200 * MIB + 1,
            processes=[{"pid": 10, "start_ticks": 5, "used": 1}],
        )
    )
    (facts,) = sample.facts
    (reading,) = sample.readings
    assert (facts.total_mb, facts.reserved_mb) == (1_000, 50)
    assert (reading.free_mb, reading.used_mb) == (700, 201)
    assert reading.processes == (ProcessUse(ProcessKey(10, 5), 1),)


def test_a_process_comes_with_its_ancestors_and_its_service() -> None:
    process = {
        "pid": 10,
        "start_ticks": 5,
        "used": None,
        "ancestors": [[9, 4], [8, 3]],
        "unit": "scout.service",
    }
    (reading,) = read(device(processes=[process])).readings
    ancestors = (ProcessKey(9, 4), ProcessKey(8, 3))
    assert reading.processes == (ProcessUse(ProcessKey(10, 5), None, ancestors, "scout.service"),)


@pytest.mark.parametrize(
    "changes",
    [
        {"free": 1_001 * MIB},
        {"used": 1_001 * MIB},
        {"reserved": 1_001 * MIB},
        {"free": 900 * MIB, "used": 101 * MIB},
        {"total": 0, "free": 0, "used": 0, "reserved": 0, "processes": []},
        {"processes": [{"pid": 1, "start_ticks": 1, "used": 1_001 * MIB}]},
        {"processes": [{"pid": 1, "start_ticks": 1, "used": 1}] * 2},
        {"total": ..., "free": ..., "used": ...},
    ],
)  # fmt: skip
def test_values_that_cannot_be_make_the_reading_a_failed_one(changes: dict[str, Any]) -> None:
    sample = read(device(**changes))
    assert sample.readings == ()
    ((uuid, reason),) = sample.failures
    assert uuid == UUID
    assert reason.startswith("the driver ")


def test_one_gpu_that_fails_does_not_fail_the_other() -> None:
    other = "GPU-0fa4e000-0000-4000-8000-000000000001"
    sample = read({"index": 0, "uuid": UUID, "failure": "GPU is lost"}, device(index=1, uuid=other))
    assert sample.failures == ((UUID, "GPU is lost"),)
    assert [reading.uuid for reading in sample.readings] == [other]


def test_a_gpu_that_does_not_even_say_its_name_is_told_apart() -> None:
    sample = read({"index": 3, "failure": "Unknown Error"}, device())
    assert sample.nameless == ("GPU 3: Unknown Error",)
    assert len(sample.readings) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"total": "1000"},
        {"total": 1000.5},
        {"total": True},
        {"free": -1},
        {"free": 2**64 - 1},
        {"free": None},
        {"uuid": "GPU with spaces"},
        {"uuid": ""},
        {"uuid": "x" * 97},
        {"name": 5},
        {"name": "x" * 257},
        {"index": 64},
        {"index": -1},
        {"index": ...},
        {"colour": "green"},
        {"processes": [{"pid": 2**22 + 1, "start_ticks": 1, "used": 1}]},
        {"processes": [{"pid": -1, "start_ticks": 1, "used": 1}]},
        {"processes": [{"pid": 1, "used": 1}]},
        {"processes": [{"pid": 1, "start_ticks": 1, "used": 1, "ancestors": [[1]]}]},
        {"processes": [{"pid": 1, "start_ticks": 1, "used": 1, "unit": 7}]},
        {"processes": [{"pid": n, "start_ticks": 1, "used": 1} for n in range(1, 4_098)]},
        {"telemetry": [1, 2, 3]},
        {"telemetry": [1, 2, 3, "4"]},
    ],
)
def test_an_answer_of_another_form_is_not_believed_at_all(changes: dict[str, Any]) -> None:
    with pytest.raises(BadAnswer):
        read(device(**changes))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"n": 7, "calls": []',
        b'{"n": 7, "calls": [], "devices": [NaN]}',
        b'{"n": 8, "calls": [], "devices": []}',
        b'{"n": 7, "calls": [["memory", -1, 0]]}',
        b'{"n": 7, "calls": [["rm -rf", 1, 0]]}',
        b'{"n": 7, "calls": [], "devices": [{"index": 0, "telemetry": [Infinity, 1, 1, 1]}]}',
    ],
)
def test_bytes_that_are_no_answer_to_this_question_are_refused(payload: bytes) -> None:
    with pytest.raises(BadAnswer):
        read_answer(payload, 7)


def test_one_gpu_named_twice_is_not_believed() -> None:
    with pytest.raises(BadAnswer, match="twice"):
        read(device(), device(index=1))
    with pytest.raises(BadAnswer, match="twice"):
        read(device(), device(uuid=UUID[:-1] + "1"))


def test_telemetry_out_of_bounds_is_unknown_and_fails_nothing() -> None:
    sample = read(device(telemetry=[101, 12, None, 2.5e9]))
    assert sample.telemetry == {UUID: Telemetry(None, 12, None, None)}
    assert len(sample.readings) == 1
    assert read(device(telemetry=[0, 100, -3, 71.5])).telemetry == {
        UUID: Telemetry(0, 100, -3, 71.5)
    }


def test_a_name_shows_no_control_characters() -> None:
    (facts,) = read(device(name="Fake\x1b[2J\n")).facts
    assert facts.name == "Fake?[2J?"
