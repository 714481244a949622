"""The settings document on disk: what an admin changed at run time, and what the last start saw.

Owns the format, the atomic write and the way back. One JSON file in the state folder:

    version              of this format
    policy, revision, safe_mode, cordons
                         as the core gives them in `PersistSettings`
    asked                the request that the newest change answers, and its answer where that is
                         not the policy: it may not have been given yet; absent where there is none
    safe_mode_run_time   SAFE_MODE as somebody set it at run time, null where nobody did
    safe_mode_env        SAFE_MODE as the last start's environment had it, null where it had none
    boot_id              the boot in which that start was
    damage               what became of the settings before these, where they could not be read;
                         absent once the policy has been changed

A file that cannot be read back whole is renamed and kept, never deleted and never overwritten:
somebody's policy is in it. Defaults stand in its place, with one exception: SAFE_MODE stays on
where what is left of the file still says so, for turning it off would let agents at the GPUs.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gpuorchd.core.events import Settled
from gpuorchd.core.model import ConnectionId
from gpuorchd.core.policy import Policy, PolicyError, user_names
from gpuorchd.host.start import StartError
from gpuorchd.host.users import resolve_users

VERSION = 1
FILE_NAME = "settings.json"
# The uid that the kernel gives to nobody: an entry for a user that is gone matches no peer.
NO_UID = 2**32 - 1
# What tells of SAFE_MODE in a file that is no longer whole.
_TELLING = re.compile(rb'"(safe_mode\w*|boot_id)"\s*:\s*(true|false|null|"[^"\\]*")')
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class KeptSettings(NamedTuple):
    """Settings as they are to be in force from this start on.

    `set_aside` is where an unreadable file went, with `damage` saying what was wrong with it.
    `unrepaired` is what an earlier start said about such a file, while nobody changed the policy.
    `unknown_users` are names in the policy that this host does not know; they match nobody.
    """

    policy: Policy = Policy()
    revision: int = 1
    safe_mode: bool = False
    cordons: Mapping[str, str] = MappingProxyType({})
    safe_mode_run_time: bool | None = None
    settled: Settled | None = None
    set_aside: Path | None = None
    damage: str | None = None
    unrepaired: str | None = None
    unknown_users: tuple[str, ...] = ()


class _Damaged(Exception):
    """The file is not a settings document of this version."""


def load_settings(path: Path, safe_mode_env: bool | None, boot: str) -> KeptSettings:
    """Read the settings back and apply the rule of SAFE_MODE; a damaged file is set aside.

    Raises `StartError` where a damaged file cannot be moved out of the way: writing over it would
    lose it.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return KeptSettings(safe_mode=bool(safe_mode_env))
    except OSError as error:
        return _set_aside(path, f"cannot be read: {error.strerror}", safe_mode_env)
    try:
        return _read(_document(text), safe_mode_env, boot)
    except _Damaged as damage:
        stays_on = _still_says_safe_mode(text, safe_mode_env, boot)
        return _set_aside(path, str(damage), safe_mode_env, stays_on)


def encode_settings(
    document: Mapping[str, object],
    *,
    safe_mode_run_time: bool | None,
    safe_mode_env: bool | None,
    boot: str,
    damage: str | None = None,
) -> bytes:
    """Make the file's bytes of the core's document and what this start saw."""
    whole = {
        "version": VERSION,
        **document,
        "safe_mode_run_time": safe_mode_run_time,
        "safe_mode_env": safe_mode_env,
        "boot_id": boot,
        **({} if damage is None else {"damage": damage}),
    }
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_atomically(path: Path, data: bytes) -> OSError | None:
    """Replace `path` with `data` so that after a crash it holds the old or the new, whole.

    Blocks until the disk has it. Raises `OSError`; the old file then stands. Once the new file
    stands in its place nothing is raised any more, so that nobody is told of a failure whose change
    is there at the next start: what kept the folder from being synced is returned. The change may
    then be lost with the power, and with nothing less.
    """
    new = path.with_name(path.name + ".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Without this the rename itself may be lost with the power.
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as fault:
        return fault
    return None


def boot_id() -> str:
    """The kernel's name for this boot, empty where it has none to tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _document(text: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
        # Half of a surrogate pair, which the decoder lets through, could not be written again.
        json.dumps(document, ensure_ascii=False).encode()
    # RecursionError: a file of nothing but brackets.
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise _Damaged("is not a map")
    if document.get("version") != VERSION:
        raise _Damaged(f"has version {document.get('version')!r}; this daemon reads {VERSION}")
    return document


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _read(document: Mapping[str, Any], safe_mode_env: bool | None, boot: str) -> KeptSettings:
    policy = _field(document, "policy", dict)
    cordons = _field(document, "cordons", dict)
    if not all(isinstance(reason, str) for reason in cordons.values()):
        raise _Damaged("has a cordon whose reason is not text")
    revision = _field(document, "revision", int)
    if revision < 1:
        raise _Damaged(f"has revision {revision}; the first is 1")
    run_time = _field(document, "safe_mode_run_time", bool, type(None))
    last_env = _field(document, "safe_mode_env", bool, type(None))
    cold = _field(document, "boot_id", str) != boot
    wins = safe_mode_env is not None and (cold or safe_mode_env != last_env)
    if wins and safe_mode_env != run_time:
        # One that says the same leaves what was set at run time as it is: it stands without it too.
        run_time = None
    names = set(user_names(policy))
    uids = resolve_users(names)
    unknown = tuple(sorted(names - set(uids)))
    try:
        loaded = Policy.load(policy, uids | dict.fromkeys(unknown, NO_UID))
    except PolicyError as error:
        raise _Damaged(f"has a policy that cannot be: {error}") from None
    return KeptSettings(
        policy=loaded,
        revision=revision,
        safe_mode=bool(safe_mode_env) if run_time is None else run_time,
        cordons=cordons,
        safe_mode_run_time=run_time,
        unrepaired=document["damage"] if isinstance(document.get("damage"), str) else None,
        settled=_settled(document),
        unknown_users=unknown,
    )


def asked_document(settled: Settled | None) -> dict[str, object]:
    """Write who is answered by the newest change as it stands in the document."""
    if settled is None:
        return {}
    epoch, conn, request_id, answer = settled
    asked = {"epoch": epoch, "connection": conn, "request_id": request_id, "answer": answer}
    return {"asked": asked}


def _settled(document: Mapping[str, Any]) -> Settled | None:
    if "asked" not in document:
        return None
    asked = _field(document, "asked", dict)
    request_id = _field(asked, "request_id", int, str, type(None))
    epoch, conn = _field(asked, "epoch", str), _field(asked, "connection", int)
    answer = _field(asked, "answer", dict, type(None))
    if request_id is None:
        # A line of text, or a reload: no connection that asked so outlives a daemon.
        return None
    return Settled(epoch, ConnectionId(conn), request_id, answer)


def _field(document: Mapping[str, Any], name: str, *kinds: type) -> Any:  # checked against `kinds`
    value = document.get(name)
    if name not in document or type(value) not in kinds:
        raise _Damaged(f"has no usable {name}")
    return value


def _still_says_safe_mode(text: bytes, safe_mode_env: bool | None, boot: str) -> bool:
    """Whether SAFE_MODE was on, as far as a damaged file tells, and the environment lets it be."""
    found = dict(_TELLING.findall(text))
    was_on = b"true" in (found.get(b"safe_mode"), found.get(b"safe_mode_run_time"))
    if safe_mode_env is not False:
        return was_on
    # The environment says off, and wins as in `_read`; what is not told counts for what is safe.
    own_boot = b'"%b"' % boot.encode()
    cold = found.get(b"boot_id", own_boot) != own_boot
    return was_on and not cold and found.get(b"safe_mode_env", b"false") == b"false"


def _set_aside(
    path: Path, damage: str, safe_mode_env: bool | None, stays_on: bool = False
) -> KeptSettings:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    try:
        path.rename(aside)
    except OSError as error:
        raise StartError(
            f"the settings file {path} {damage}, and it cannot be set aside: {error.strerror}"
        ) from None
    return KeptSettings(
        safe_mode=stays_on or bool(safe_mode_env),
        safe_mode_run_time=True if stays_on else None,
        set_aside=aside,
        damage=damage,
    )
