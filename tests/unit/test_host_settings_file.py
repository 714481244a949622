"""The settings document: what comes back, what is set aside, and the rule of SAFE_MODE."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from gpuorchd.core.model import Peer, ProcessKey
from gpuorchd.core.policy import Policy
from gpuorchd.host.settings_file import (
    KeptSettings,
    asked_document,
    encode_settings,
    load_settings,
    write_atomically,
)
from gpuorchd.host.start import StartError

BOOT = "this boot"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "settings.json"


def keep(
    path: Path,
    *,
    policy: Policy | None = None,
    revision: int = 1,
    run_time: bool | None = None,
    env: bool | None = None,
    boot: str = BOOT,
    cordons: dict[str, str] | None = None,
) -> None:
    document = {
        "policy": (policy or Policy()).document(),
        "revision": revision,
        "safe_mode": bool(run_time),
        "cordons": cordons or {},
    }
    write_atomically(
        path,
        encode_settings(document, safe_mode_run_time=run_time, safe_mode_env=env, boot=boot),
    )


ASKED = {"epoch": "e", "connection": 7, "request_id": "p", "answer": None}


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_without_a_file_everything_is_at_its_default(path: Path) -> None:
    assert load_settings(path, None, BOOT) == KeptSettings()


def test_what_was_kept_comes_back_the_same(path: Path) -> None:
    changes = {
        "max_memory_per_agent_mb": 2_048,
        "drain_timeout_s": 2.5,
        "agents": {"analyst": {"priority": "critical", "users": ["root", 7], "units": ["a@*"]}},
    }
    policy = Policy().changed(changes, {"root": 0})
    keep(path, policy=policy, revision=9, cordons={"GPU-1": "fan"})
    kept = load_settings(path, None, BOOT)
    assert kept.policy.document() == policy.document()
    assert kept.policy.rule("analyst") == policy.rule("analyst")
    assert kept.revision == 9
    assert kept.cordons == {"GPU-1": "fan"}
    assert kept.set_aside is None


def test_the_file_is_for_its_owner_alone(path: Path) -> None:
    keep(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# What the environment sets now, what it set at the last start, what was set at run time since,
# whether it is the same boot, and what SAFE_MODE then is.
SAFE_MODE_RULE = [
    # The environment says nothing: what was set at run time stands, over boots too.
    (None, None, None, True, False),
    (None, None, True, True, True),
    (None, None, True, False, True),
    (None, None, False, True, False),
    # The same value as the last start saw: what was set at run time stands.
    (True, True, False, True, False),
    (False, False, True, True, True),
    (True, True, None, True, True),
    (False, False, None, True, False),
    # A value that differs from what the last start saw wins.
    (True, False, False, True, True),
    (False, True, True, True, False),
    (True, None, False, True, True),
    (False, None, True, True, False),
    # A cold start: the environment wins.
    (True, True, False, False, True),
    (False, False, True, False, False),
    # The environment no longer sets what only it had set: nobody asked for SAFE_MODE.
    (None, True, None, True, False),
    (None, True, True, True, True),
]
# What the environment sets at one start after the other (the first is of another boot), what
# was set at run time before them all, and what SAFE_MODE is at the last.
SAFE_MODE_STARTS = [
    ((True, None), True, True),
    ((True, True, None), True, True),
    ((False, None), False, False),
    # What the environment overruled is gone, without the environment too.
    ((False, None), True, False),
    ((True, None), False, False),
]


@pytest.mark.parametrize(("starts", "run_time", "expected"), SAFE_MODE_STARTS)
def test_safe_mode_set_at_run_time_outlives_an_environment_that_says_the_same(
    path: Path, starts: tuple[bool | None, ...], run_time: bool, expected: bool
) -> None:
    keep(path, run_time=run_time, env=None, boot="another boot")
    for env in starts:
        kept = load_settings(path, env, BOOT)
        keep(path, run_time=kept.safe_mode_run_time, env=env, boot=BOOT)
    assert kept.safe_mode is expected


@pytest.mark.parametrize(("env", "last_env", "run_time", "same_boot", "expected"), SAFE_MODE_RULE)
def test_safe_mode_of_the_environment_wins_at_a_cold_start_and_when_it_has_changed(
    path: Path,
    env: bool | None,
    last_env: bool | None,
    run_time: bool | None,
    same_boot: bool,
    expected: bool,
) -> None:
    keep(path, run_time=run_time, env=last_env, boot=BOOT if same_boot else "another boot")
    kept = load_settings(path, env, BOOT)
    assert kept.safe_mode is expected
    if kept.safe_mode_run_time is not None:
        assert kept.safe_mode_run_time is run_time


@pytest.mark.parametrize("env", [None, True, False])
def test_safe_mode_without_a_file_is_that_of_the_environment(path: Path, env: bool | None) -> None:
    assert load_settings(path, env, BOOT).safe_mode is bool(env)


DAMAGES: list[tuple[bytes | dict[str, object], str]] = [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"version": NaN}', "is not JSON"),
    (b"[]", "is not a map"),
    (b"{}", "has version None"),
    ({"version": 2}, "has version 2; this daemon reads 1"),
    ({"policy": []}, "has no usable policy"),
    ({"policy": {"max_memory_per_agent_mb": 5}}, "max_memory_per_agent_mb"),
    ({"policy": {"no_such_field": 1}}, "no_such_field"),
    ({"policy": {"agents": {"a": {"users": [{}]}}}}, "agents.a.users"),
    ({"revision": 0}, "has revision 0"),
    ({"revision": True}, "has no usable revision"),
    ({"revision": "1"}, "has no usable revision"),
    ({"cordons": {"GPU-1": 3}}, "has a cordon"),
    ({"cordons": None}, "has no usable cordons"),
    ({"safe_mode_run_time": 1}, "has no usable safe_mode_run_time"),
    ({"safe_mode_env": "true"}, "has no usable safe_mode_env"),
    ({"boot_id": None}, "has no usable boot_id"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_file_is_set_aside_whole_and_the_reason_given(
    path: Path, damage: bytes | dict[str, object], words: str
) -> None:
    keep(path, revision=5)
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        change(path, **damage)
    content = path.read_bytes()
    kept = load_settings(path, True, BOOT)
    assert kept.damage is not None
    assert words in kept.damage
    assert "\n" not in kept.damage
    assert kept.set_aside is not None
    assert kept.set_aside.parent == path.parent
    assert kept.set_aside.read_bytes() == content
    assert not path.exists()
    assert (kept.policy, kept.revision, kept.safe_mode) == (Policy(), 1, True)


def test_files_set_aside_in_the_same_second_do_not_replace_each_other(path: Path) -> None:
    asides = set()
    for number in range(3):
        path.write_text(f"damage {number}")
        asides.add(load_settings(path, None, BOOT).set_aside)
    assert len(asides) == 3
    assert sorted(aside.read_text() for aside in asides if aside) == [
        "damage 0",
        "damage 1",
        "damage 2",
    ]


def test_something_that_cannot_be_read_is_set_aside(path: Path) -> None:
    path.mkdir()
    kept = load_settings(path, None, BOOT)
    assert kept.set_aside is not None
    assert kept.set_aside.is_dir()
    assert "cannot be read" in str(kept.damage)


def test_a_damaged_file_that_cannot_be_set_aside_stops_the_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("damage")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StartError, match="cannot be set aside: Permission denied"):
        load_settings(path, None, BOOT)
    assert path.read_text() == "damage"


def test_a_user_that_is_gone_is_named_and_matches_nobody(path: Path) -> None:
    policy = Policy().changed({"agents": {"a": {"users": ["ghost-1", 5]}}}, {"ghost-1": 4_321})
    keep(path, policy=policy)
    kept = load_settings(path, None, BOOT)
    assert kept.unknown_users == ("ghost-1",)
    rule = kept.policy.rule("a")
    assert rule.admits(Peer(ProcessKey(1, 1), uid=5))
    assert not rule.admits(Peer(ProcessKey(1, 1), uid=4_321))
    # The name stays in the policy: the user may come back.
    assert kept.policy.document() == policy.document()


def test_a_failed_write_leaves_the_old_file_and_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(path, b"old")

    def fail(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_cannot_be_synced_undoes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(path, b"old")
    fsync = os.fsync

    def fail_on_folders(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    # Said to have failed, it would be there at the next start all the same.
    fault = write_atomically(path, b"new")
    assert fault is not None
    assert fault.strerror == "Input/output error"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("cut", "last_env", "env", "boot", "expected"),
    [
        pytest.param(10, None, None, BOOT, True, id="no longer JSON"),
        pytest.param(0, None, None, BOOT, True, id="JSON of another version"),
        pytest.param(0, True, True, BOOT, True, id="as the environment has it"),
        pytest.param(0, False, False, BOOT, True, id="set at run time, the environment as before"),
        pytest.param(0, False, False, "another boot", False, id="a cold start: environment wins"),
        pytest.param(0, None, False, BOOT, False, id="a changed environment wins"),
        pytest.param(55, None, False, BOOT, True, id="what is not told counts for what is safe"),
    ],
)
def test_safe_mode_stays_on_where_a_damaged_file_still_says_so(
    path: Path, cut: int, last_env: bool | None, env: bool | None, boot: str, expected: bool
) -> None:
    keep(path, run_time=True, env=last_env)
    change(path, version=99)
    text = path.read_bytes()
    path.write_bytes(text[: len(text) - cut])
    kept = load_settings(path, env, boot)
    assert kept.set_aside is not None
    assert kept.safe_mode is expected
    assert kept.policy == Policy()


@pytest.mark.parametrize("text", [b"", b"garbage", b'{"safe_mode": false}', b'{"a": "safe_mode"}'])
def test_a_damaged_file_that_does_not_say_so_turns_nothing_on(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    assert load_settings(path, None, BOOT).safe_mode is False


def test_the_file_is_replaced_only_once_its_bytes_are_on_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def watch_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    write_atomically(path, b"new")
    assert steps == ["file", "rename", "folder"]


def test_a_user_name_that_is_none_matches_nobody_and_half_a_pair_sets_the_file_aside(
    path: Path,
) -> None:
    keep(path, run_time=None)
    policy = json.loads(path.read_text())["policy"] | {"agents": {"a": {"users": ["a\0b"]}}}
    change(path, policy=policy)
    kept = load_settings(path, None, BOOT)
    assert kept.unknown_users == ("a\0b",)
    assert not kept.policy.rule("a").admits(Peer(ProcessKey(1, 1), 0))
    change(path, cordons={"GPU-1": "\ud800"})
    assert load_settings(path, None, BOOT).set_aside is not None


def test_who_is_answered_by_the_newest_change_comes_back(path: Path) -> None:
    keep(path)
    assert load_settings(path, None, BOOT).settled is None
    for asked in (ASKED, {**ASKED, "request_id": 3, "answer": {"gpu": "GPU-1", "cordoned": True}}):
        change(path, asked=asked)
        settled = load_settings(path, None, BOOT).settled
        assert settled is not None
        assert asked_document(settled) == {"asked": asked}
    assert asked_document(None) == {}


def test_who_asked_without_an_id_is_answered_by_nobody_later(path: Path) -> None:
    keep(path)
    change(path, asked={**ASKED, "request_id": None})
    assert load_settings(path, None, BOOT).settled is None


@pytest.mark.parametrize("field", ["epoch", "connection", "request_id", "answer"])
def test_one_who_asked_that_cannot_be_is_damage(path: Path, field: str) -> None:
    keep(path)
    change(path, asked={**ASKED, field: 0.5})
    assert f"no usable {field}" in str(load_settings(path, None, BOOT).damage)
