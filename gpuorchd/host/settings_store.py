"""The settings store: carries out `PersistSettings` without making anybody wait for the disk.

Owns one worker thread and at most two documents: the one that is being written and the newest that
came meanwhile, which takes the place of any before it. `SettingsPersisted` goes to the core when
the newest is on disk, or is not, so what the core then answers is true of everything it asked for.

    PersistSettings -> bytes (this turn) -> worker: write, fsync, rename, fsync -> SettingsPersisted
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gpuorchd.core.effects import PersistSettings
from gpuorchd.core.events import SettingsPersisted
from gpuorchd.host.lock import HeldLock, hold_lock
from gpuorchd.host.settings_file import (
    FILE_NAME,
    KeptSettings,
    asked_document,
    boot_id,
    encode_settings,
    load_settings,
    write_atomically,
)
from gpuorchd.host.start import Report, StartError


class _SafeMode(NamedTuple):
    """SAFE_MODE as a document has it, and as somebody set it at run time (None: nobody did)."""

    on: bool
    run_time: bool | None


class _Write(NamedTuple):
    """One document on its way to the disk. `changes_policy`: it is not the one of the start."""

    safe_mode: _SafeMode
    data: bytes
    changes_policy: bool


class SettingsStore:
    """The state folder while the daemon runs.

    `failure`: why the newest write failed, if it did. `damage`: what became of settings that could
    not be read at the start, until the policy has been changed: it is not what anybody wanted.
    """

    def __init__(self, folder: Path, safe_mode_env: bool | None, report: Report) -> None:
        self._path = folder / FILE_NAME
        self._safe_mode_env = safe_mode_env
        self._report = report
        self._boot = boot_id()
        self._lock: HeldLock | None = None
        # As on disk, and as in the newest document, which counts only once it is there.
        self._safe_mode = self._asked = _SafeMode(False, None)
        self._worker: ThreadPoolExecutor | None = None
        self._writing: asyncio.Future[OSError | None] | None = None
        self._next: _Write | None = None
        self.failure: str | None = None
        self.damage: str | None = None
        self._first_revision = 0

    def open(self) -> KeptSettings:
        """Take the folder, read what was kept, record what this start sees.

        Blocks on the disk: call it before anybody is served. Raises `StartError` where the folder
        cannot be had or a damaged file cannot be set aside.
        """
        folder = self._path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"cannot make the state folder {folder}: {error.strerror}") from None
        self._lock = hold_lock(folder / "lock", folder)
        kept = load_settings(self._path, self._safe_mode_env, self._boot)
        self._first_revision = kept.revision
        self.damage = kept.unrepaired
        if kept.set_aside is not None:
            self.damage = (
                f"{self._path} {kept.damage}; it was set aside as {kept.set_aside}, and defaults "
                "are in force until the policy is set"
            )
            self._report(
                "host.settings_set_aside",
                path=str(self._path),
                kept_as=str(kept.set_aside),
                damage=kept.damage,
            )
        if kept.unknown_users:
            self._report("host.users_unknown", users=list(kept.unknown_users))
        self._safe_mode = self._asked = _SafeMode(kept.safe_mode, kept.safe_mode_run_time)
        first = {
            "policy": kept.policy.document(),
            "revision": kept.revision,
            "safe_mode": kept.safe_mode,
            "cordons": dict(kept.cordons),
            # Its answer may still be to be given, by this daemon.
            **asked_document(kept.settled),
        }
        try:
            unsynced = write_atomically(
                self._path, self._encode(first, self._safe_mode, self.damage)
            )
        except OSError as error:
            self._failed(error)
        else:
            self._warn_unsynced(unsynced)
        return kept

    def persist(self, effect: PersistSettings, submit: Callable[[SettingsPersisted], None]) -> None:
        """Write the effect's document and then submit `SettingsPersisted`. Call it on the loop."""
        on = bool(effect.document["safe_mode"])
        if on != self._asked.on:
            self._asked = _SafeMode(on, on)
        # Made now: the document may show the core's own maps, which change with the next event.
        changes_policy = effect.document["revision"] != self._first_revision
        damage = None if changes_policy else self.damage
        data = self._encode(effect.document, self._asked, damage)
        self._next = _Write(self._asked, data, changes_policy)
        if self._writing is None:
            self._write_next(submit)

    def see_safe_mode(self, environment: bool | None) -> None:
        """Record that the environment says something else now, with the next that is kept."""
        self._safe_mode_env = environment

    async def close(self) -> None:
        """Wait until what was asked for is written, end the worker, give the folder up."""
        while self._writing is not None:
            await asyncio.wait([self._writing])
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write_next(self, submit: Callable[[SettingsPersisted], None]) -> None:
        assert self._next is not None, "a write was started with nothing to write"
        write, self._next = self._next, None
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="settings")
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(self._worker, write_atomically, self._path, write.data)
        self._writing.add_done_callback(lambda written: self._written(written, write, submit))

    def _written(
        self,
        written: asyncio.Future[OSError | None],
        write: _Write,
        submit: Callable[[SettingsPersisted], None],
    ) -> None:
        self._writing = None
        error = written.exception()
        if error is None:
            self._safe_mode = write.safe_mode
            self._warn_unsynced(written.result())
            if write.changes_policy:
                self.damage = None
        if self._next is not None:
            self._write_next(submit)
            return
        if error is None:
            self.failure = None
            submit(SettingsPersisted())
        elif isinstance(error, OSError):
            self._asked = self._safe_mode
            submit(SettingsPersisted(self._failed(error)))
        else:
            raise error

    def _failed(self, error: OSError) -> str:
        self.failure = f"{self._path} cannot be written: {error.strerror}"
        self._report("host.settings_unwritable", path=str(self._path), error=error.strerror)
        return self.failure

    def _warn_unsynced(self, fault: OSError | None) -> None:
        if fault is not None:
            self._report("host.settings_unsynced", path=str(self._path), error=fault.strerror)

    def _encode(
        self, document: Mapping[str, object], safe_mode: _SafeMode, damage: str | None
    ) -> bytes:
        return encode_settings(
            document,
            safe_mode_run_time=safe_mode.run_time,
            safe_mode_env=self._safe_mode_env,
            boot=self._boot,
            damage=damage,
        )
