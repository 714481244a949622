"""For how long a policy counts, and what to assume without one."""

from __future__ import annotations

import pytest

from libclient.policy_cache import FAILURE_TTL_S, TTL_VARIABLE, PolicyCache

REPLY = {"revision": 3, "safe_mode": False, "safe_mode_read_only": False, "policy": {"a": 1}}


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TTL_VARIABLE, raising=False)


def test_a_policy_counts_for_thirty_seconds() -> None:
    cache = PolicyCache()
    assert cache.put(REPLY, 100.0) == {**REPLY, "reachable": True}
    assert cache.get(129.9) == {**REPLY, "reachable": True}
    assert cache.get(130.0) is None


def test_the_environment_says_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TTL_VARIABLE, "5")
    cache = PolicyCache()
    cache.put(REPLY, 100.0)
    assert cache.get(104.9) is not None
    assert cache.get(105.0) is None


def test_zero_asks_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TTL_VARIABLE, "0")
    cache = PolicyCache()
    cache.put(REPLY, 100.0)
    assert cache.get(100.0) is None


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_bad_value_is_named_and_the_default_used(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(TTL_VARIABLE, text)
    cache = PolicyCache()
    with pytest.warns(RuntimeWarning, match=f"{TTL_VARIABLE}='{text}'"):
        cache.put(REPLY, 100.0)
    assert cache.get(129.0) is not None


def test_without_a_daemon_it_is_as_under_safe_mode_and_soon_asked_again() -> None:
    cache = PolicyCache()
    document = cache.put("no such socket", 100.0)
    assert document["reachable"] is False
    assert document["safe_mode"] is True
    assert document["policy"] == {}
    assert document["message"] == "no such socket"
    assert cache.get(100.0 + FAILURE_TTL_S) is None


def test_a_safe_mode_that_is_not_known_to_be_off_is_on() -> None:
    cache = PolicyCache()
    assert cache.put({"revision": 1}, 100.0)["safe_mode"] is True
    assert cache.put({"safe_mode": None, "policy": {}}, 100.0)["safe_mode"] is True


def test_what_a_caller_does_to_its_copy_changes_no_others() -> None:
    cache = PolicyCache()
    cache.put(REPLY, 100.0)["policy"]["a"] = 2
    seen = cache.get(101.0)
    assert seen is not None
    assert seen["policy"] == {"a": 1}
