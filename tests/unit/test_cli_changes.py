"""`policy set`: what people write, and what goes on the wire."""

from __future__ import annotations

import pytest

from libclient.cli.changes import (
    Change,
    differences,
    explain_value,
    named,
    read_change,
    show_value,
    together,
)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("max_memory_per_agent_mb=4096", Change("max_memory_per_agent_mb", 4096)),
        ("max_memory_per_agent_mb=4GiB", Change("max_memory_per_agent_mb", 4096)),
        ("safe_mode_grace_s=1m30s", Change("safe_mode_grace_s", 90.0)),
        ("safe_mode=true", Change("safe_mode", True)),
        ("default_memory_mb=null", Change("default_memory_mb", None)),
        ("agents=null", Change("agents", None)),
        ("agents.a.gpu=false", Change("agents", False, "a", "gpu")),
        ("agents.a.b.priority=critical", Change("agents", "critical", "a.b", "priority")),
        ("agents.*.max_priority=normal", Change("agents", "normal", "*", "max_priority")),
        ("agents.a.users=alice,1000", Change("agents", ["alice", 1000], "a", "users")),
        ("agents.a.users=1000", Change("agents", [1000], "a", "users")),
        ('agents.a.units=["x.service"]', Change("agents", ["x.service"], "a", "units")),
        ("agents.a.users=null", Change("agents", None, "a", "users")),
        ("agents.a.b=null", Change("agents", None, "a.b")),
        ("agents.a={}", Change("agents", {}, "a")),
    ],
)
def test_a_change_is_read_as_people_write_it(text: str, change: Change) -> None:
    assert read_change(text) == change


@pytest.mark.parametrize(
    "text",
    ["safe_mode", "=1", "agents.a.colour=red", "agents.gpu=false", "x_mb=4Gibibytes", "x_s=soon"],
)
def test_a_change_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_change(text)


def changed(*texts: str, agents: dict[str, object] | None = None) -> dict[str, object]:
    return together([read_change(text) for text in texts], agents or {})


def test_one_rule_is_changed_and_all_others_stay() -> None:
    now: dict[str, object] = {"a": {"gpu": False, "priority": "normal"}, "b": {"gpu": True}}
    assert changed("agents.a.gpu=true", "safe_mode=false", agents=now) == {
        "agents": {"a": {"gpu": True, "priority": "normal"}, "b": {"gpu": True}},
        "safe_mode": False,
    }
    assert now["a"] == {"gpu": False, "priority": "normal"}


def test_the_last_rule_taken_away_takes_the_name_away() -> None:
    now: dict[str, object] = {"a": {"gpu": False}, "b": {}}
    assert changed("agents.a.gpu=null", agents=now) == {"agents": {"b": {}}}
    assert changed("agents.a=null", agents=now) == {"agents": {"b": {}}}
    assert changed("agents.c=null", agents=now) == {"agents": now}


@pytest.mark.parametrize(
    "texts",
    [
        ("safe_mode=true", "safe_mode=false"),
        ("agents.a.gpu=true", "agents.a.gpu=false"),
        ("agents.a.gpu=true", "agents.a=null"),
        ("agents.a=null", "agents.a.gpu=true"),
        ("agents=null", "agents.a.gpu=true"),
        ("agents.a.gpu=true", "agents=null"),
    ],
)
def test_changing_one_thing_twice_is_refused(texts: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="changed twice"):
        changed(*texts)


def test_what_differs_is_named_as_it_would_be_changed() -> None:
    before = {"default_memory_mb": 2048, "agents": {"a": {"gpu": False}}}
    after = {"default_memory_mb": 1024, "agents": {"a": {"gpu": True}, "b": {}}}
    assert differences(before, after) == {
        "default_memory_mb": (2048, 1024),
        "agents.a.gpu": (False, True),
        "agents.b": (None, {}),
    }
    assert show_value("default_memory_mb", 2048) == "2GiB"
    assert show_value("max_memory_per_agent_mb", 0) == "0"
    assert show_value("drain_timeout_s", 90.0) == "1m30s"
    assert show_value("safe_mode", None) == "null"


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"a": {"gpu": False}}, {"agents.a.gpu": (None, False)}),
        ({"a": {"gpu": False}}, {}, {"agents.a.gpu": (False, None)}),
        ({"a": {}}, {"a": {"gpu": False}}, {"agents.a.gpu": (None, False)}),
        ({"a": {"gpu": False}}, {"a": {}}, {"agents.a.gpu": (False, None)}),
        ({}, {"a": {}}, {"agents.a": (None, {})}),
        ({"a": {}}, {}, {"agents.a": ({}, None)}),
        (
            {"a": {}},
            {"a.b": {"gpu": False}},
            {"agents.a": ({}, None), "agents.a.b.gpu": (None, False)},
        ),
        ({}, {}, {}),
    ],
)
def test_only_what_changed_is_shown_as_changed(
    before: dict[str, object], after: dict[str, object], told: dict[str, object]
) -> None:
    assert differences({"agents": before}, {"agents": after}) == told


def test_what_can_be_changed_by_a_name_can_be_asked_for_by_it() -> None:
    policy = {"default_memory_mb": 2048, "agents": {"a": {"gpu": False}, "b.c": {}}}
    assert named(policy) == {
        "default_memory_mb": 2048,
        "agents": policy["agents"],
        "agents.a": {"gpu": False},
        "agents.a.gpu": False,
        "agents.b.c": {},
    }


def test_a_cap_of_nothing_is_shown_as_no_cap() -> None:
    assert explain_value("max_memory_per_agent_mb", 0) == "0 (no cap)"
    assert explain_value("agents.a.max_memory_mb", 0) == "0 (no cap)"
    assert explain_value("max_memory_per_agent_mb", 4096) == "4GiB"
    assert explain_value("default_memory_mb", 0) == "0"
