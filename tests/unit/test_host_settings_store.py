"""The settings store: in order, answered once, and never in the way."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path

import pytest

from gpuorchd.core.effects import PersistSettings
from gpuorchd.core.events import SettingsPersisted
from gpuorchd.core.policy import Policy
from gpuorchd.host import settings_store
from gpuorchd.host.settings_file import FILE_NAME, write_atomically
from gpuorchd.host.settings_store import SettingsStore
from gpuorchd.host.start import StartError


class Told:
    """What a store reported and submitted."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, dict[str, object]]] = []
        self.events: list[SettingsPersisted] = []

    def report(self, event: str, /, **fields: object) -> None:
        self.reports.append((event, fields))


def effect(revision: int, *, safe_mode: bool = False) -> PersistSettings:
    return PersistSettings(
        {
            "policy": Policy().document(),
            "revision": revision,
            "safe_mode": safe_mode,
            "cordons": {},
        }
    )


def open_store(folder: Path, told: Told, env: bool | None = None) -> SettingsStore:
    store = SettingsStore(folder, env, told.report)
    store.open()
    return store


async def test_what_was_persisted_is_on_disk_when_it_is_answered(tmp_path: Path) -> None:
    told = Told()
    store = open_store(tmp_path, told)
    seen = []

    def submit(event: SettingsPersisted) -> None:
        told.events.append(event)
        seen.append(json.loads((tmp_path / FILE_NAME).read_text())["revision"])

    store.persist(effect(2), submit)
    assert not told.events, "the disk was waited for on the loop"
    await store.close()
    assert told.events == [SettingsPersisted()]
    assert seen == [2]
    assert not told.reports


async def test_of_many_the_newest_is_written_and_answered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    store = open_store(tmp_path, told)
    go_on = threading.Event()
    written = []

    def write_slowly(path: Path, data: bytes) -> None:
        assert go_on.wait(10)
        write_atomically(path, data)
        written.append(json.loads(data)["revision"])

    monkeypatch.setattr(settings_store, "write_atomically", write_slowly)
    for revision in range(2, 50):
        store.persist(effect(revision), told.events.append)
    go_on.set()
    await store.close()
    assert written == [2, 49]
    assert told.events == [SettingsPersisted()]


async def test_a_document_is_taken_as_it_was_when_it_was_asked_for(tmp_path: Path) -> None:
    told = Told()
    store = open_store(tmp_path, told)
    cordons = {"GPU-1": "fan"}
    document = {**effect(2).document, "cordons": cordons}
    store.persist(PersistSettings(document), told.events.append)
    cordons.clear()
    await store.close()
    assert json.loads((tmp_path / FILE_NAME).read_text())["cordons"] == {"GPU-1": "fan"}


async def test_a_disk_that_is_full_is_an_answer_and_the_next_write_heals_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    store = open_store(tmp_path, told)

    def fail(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    answered = asyncio.Event()

    def submit(event: SettingsPersisted) -> None:
        told.events.append(event)
        answered.set()

    with monkeypatch.context() as patch:
        patch.setattr(settings_store, "write_atomically", fail)
        store.persist(effect(2), submit)
        await asyncio.wait_for(answered.wait(), 10)
    assert "No space left on device" in str(told.events[0].failure)
    assert store.failure == told.events[0].failure
    assert [name for name, _ in told.reports] == ["host.settings_unwritable"]
    store.persist(effect(2), submit)
    await store.close()
    assert told.events[1] == SettingsPersisted()
    assert store.failure is None


async def test_safe_mode_set_at_run_time_outlives_a_restart_with_the_same_environment(
    tmp_path: Path,
) -> None:
    told = Told()
    store = open_store(tmp_path, told, env=True)
    store.persist(effect(2, safe_mode=False), told.events.append)
    await store.close()
    again = SettingsStore(tmp_path, True, told.report)
    assert again.open().safe_mode is False
    await again.close()


async def test_a_change_of_something_else_does_not_count_as_setting_safe_mode(
    tmp_path: Path,
) -> None:
    told = Told()
    store = open_store(tmp_path, told, env=True)
    store.persist(effect(2, safe_mode=True), told.events.append)
    await store.close()
    without = SettingsStore(tmp_path, None, told.report)
    assert without.open().safe_mode is False
    await without.close()


async def test_safe_mode_that_could_not_be_written_was_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    store = open_store(tmp_path, told, env=True)
    answered = asyncio.Event()

    def fail(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(settings_store, "write_atomically", fail)
        store.persist(effect(2, safe_mode=False), lambda _: answered.set())
        await asyncio.wait_for(answered.wait(), 10)
    store.persist(effect(2, safe_mode=True), told.events.append)
    await store.close()
    without = SettingsStore(tmp_path, None, told.report)
    assert without.open().safe_mode is False
    await without.close()


async def test_every_start_records_what_its_environment_said(tmp_path: Path) -> None:
    told = Told()
    for env, expected in ((False, False), (True, True)):
        store = SettingsStore(tmp_path, env, told.report)
        assert store.open().safe_mode is expected
        await store.close()
    store = open_store(tmp_path, told, env=True)
    store.persist(effect(2, safe_mode=False), told.events.append)
    await store.close()
    # True, as at the last start; then a start that saw another value; then True again.
    for env, expected in ((True, False), (False, False), (True, True)):
        store = SettingsStore(tmp_path, env, told.report)
        assert store.open().safe_mode is expected
        await store.close()


def test_a_damaged_file_is_reported_with_both_names(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("garbage")
    told = Told()
    store = open_store(tmp_path, told)
    asyncio.run(store.close())
    ((event, fields),) = told.reports
    assert event == "host.settings_set_aside"
    assert fields["path"] == str(tmp_path / FILE_NAME)
    assert [path.read_text() for path in tmp_path.glob("*.damaged-*")] == ["garbage"]
    assert str(fields["kept_as"]).startswith(f"{tmp_path / FILE_NAME}.damaged-")


async def test_damage_is_told_until_the_policy_is_changed(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("garbage")
    told = Told()

    async def damage_around(revision: int) -> list[str | None]:
        """What is told at a start, and after a change to `revision`."""
        store = open_store(tmp_path, told)
        found = [store.damage]
        store.persist(effect(revision), told.events.append)
        await store.close()
        return [*found, store.damage]

    # A cordon is kept too, without a new revision, and says nothing about the policy.
    first, after_cordon = await damage_around(1)
    assert first is not None
    assert "set aside as" in first
    assert after_cordon == first
    assert await damage_around(2) == [first, None], "a restart alone has mended nothing"
    assert await damage_around(3) == [None, None]


async def test_a_folder_that_cannot_be_synced_is_a_warning_and_the_change_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    store = open_store(tmp_path, told)
    monkeypatch.setattr(
        settings_store, "write_atomically", lambda path, data: OSError(5, "Input/output error")
    )
    store.persist(effect(2), told.events.append)
    await store.close()
    assert told.events == [SettingsPersisted()]
    assert [name for name, _ in told.reports] == ["host.settings_unsynced"]
    assert store.failure is None


async def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    told = Told()
    store = open_store(tmp_path, told)
    with pytest.raises(StartError, match=rf"another daemon \(pid {os.getpid()}\) has {tmp_path}"):
        open_store(tmp_path, told)
    await store.close()
    await open_store(tmp_path, told).close()


def test_a_folder_that_cannot_be_made_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot make the state folder"):
        open_store(tmp_path / "file" / "state", Told())


async def test_closing_ends_the_worker(tmp_path: Path) -> None:
    told = Told()
    store = open_store(tmp_path, told)
    store.persist(effect(2), told.events.append)
    await store.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("settings")]


async def test_a_start_forgets_nobody_who_may_still_have_to_be_answered(tmp_path: Path) -> None:
    told = Told()
    asked = {"epoch": "e", "connection": 7, "request_id": 3, "answer": None}
    store = open_store(tmp_path, told)
    store.persist(PersistSettings({**effect(2).document, "asked": asked}), told.events.append)
    await store.close()
    for _ in range(2):
        store = SettingsStore(tmp_path, None, told.report)
        settled = store.open().settled
        assert settled is not None
        assert (settled.conn, settled.request_id) == (7, 3)
        await store.close()
    assert not told.reports
