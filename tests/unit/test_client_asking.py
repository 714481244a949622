"""What a lease may be asked for, and what raises before anything is sent."""

from __future__ import annotations

import math
from typing import Any

import pytest

from libclient.asking import lease_fields


def test_only_what_was_said_is_asked_for() -> None:
    assert lease_fields("analyst") == {"agent": "analyst"}
    assert lease_fields("analyst", "2GiB") == {"agent": "analyst", "min_memory_mb": 2_048}


def test_everything_that_can_be_said_is_asked_for() -> None:
    assert lease_fields(
        "analyst",
        512,
        wait_s=5,
        gpus=2,
        exclusive=True,
        priority="critical",
        devices=["GPU-1", 0],
        preemptible=True,
        expected_s=30.0,
        purpose="nightly run",
        labels={"run": "7"},
    ) == {
        "agent": "analyst",
        "min_memory_mb": 512,
        "gpus": 2,
        "exclusive": True,
        "priority": "critical",
        "wait_s": 5,
        "devices": ["GPU-1", 0],
        "preemptible": True,
        "expected_s": 30.0,
        "purpose": "nightly run",
        "labels": {"run": "7"},
    }


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"agent": ""}, "agent"),
        ({"agent": "a" * 129}, "agent"),
        ({"agent": "a\nb"}, "agent"),
        ({"memory": -1}, "memory"),
        ({"memory": "lots"}, "memory"),
        ({"gpus": 0}, "gpus"),
        ({"gpus": 65}, "gpus"),
        ({"gpus": True + 1.5}, "gpus"),
        ({"priority": "urgent"}, "critical, normal, background"),
        ({"wait_s": -1}, "wait_s"),
        ({"wait_s": math.nan}, "wait_s"),
        ({"wait_s": 700_000}, "604800"),
        ({"expected_s": 0}, "expected_s"),
        ({"expected_s": math.inf}, "expected_s"),
        ({"devices": []}, "devices"),
        ({"devices": [0] * 65}, "devices"),
        ({"devices": [-1]}, "index"),
        ({"devices": [2**63]}, "index"),
        ({"devices": [""]}, "uuid"),
        ({"devices": ["GPU-\udcff"]}, "uuid"),
        ({"devices": ["G" * 257]}, "uuid"),
        ({"gpus": True}, "gpus"),
        ({"gpus": 1.0}, "gpus"),
        ({"memory": 10**5_000}, "memory"),
        ({"wait_s": 10**5_000}, "wait_s"),
        ({"expected_s": 10**5_000}, "expected_s"),
        ({"purpose": "x" * 257}, "purpose"),
        ({"purpose": "\udcff"}, "purpose"),
        ({"purpose": "a\nb"}, "purpose"),
        ({"labels": {str(n): "" for n in range(17)}}, "labels"),
        ({"labels": {"n" * 65: ""}}, "label"),
        ({"labels": {"n": "v" * 257}}, "label"),
        ({"labels": {"n": "a\x07"}}, "label"),
    ],
)
def test_a_value_that_cannot_be_asked_for_raises_before_anything_is_sent(
    fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        lease_fields(**{"agent": "analyst", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"agent": 5},
        {"memory": [1]},
        {"wait_s": "5m"},
        {"wait_s": True},
        {"expected_s": "1h"},
        {"wait_s": None},
        {"wait_s": False},
        {"devices": "GPU-1"},
        {"devices": [1.5]},
        {"devices": [True]},
        {"exclusive": "no"},
        {"exclusive": 1},
        {"exclusive": None},
        {"preemptible": 0},
        {"purpose": 5},
        {"purpose": b"text"},
        {"labels": ["a"]},
        {"labels": {"a": 1}},
        {"labels": {1: "a"}},
    ],
)
def test_a_value_of_the_wrong_kind_is_a_type_error(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        lease_fields(**{"agent": "analyst", **fields})
