"""What an installation changes on a live host: the env file, users and folders, systemd's view.

The env file is the operator's from the moment it is there: it is written once and never touched
again. It may name secrets one day, and the daemon reads it itself, so it belongs to root and the
daemon's group, 0640.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from deploy.places import Places, make_folder
from deploy.rendering import render
from deploy.units import ENV_FILE, EXAMPLE, FOLDER

GROUP: Final = "gpuorchd"
ENV_FILE_MODE: Final = 0o640
# There while systemd is the service manager of this host.
SYSTEMD_RUNS: Final = Path("/run/systemd/system")
STEP_TIMEOUT_S: Final = 60.0


def give_env_file(places: Places, known: Mapping[str, str]) -> bool:
    """Write the env file where there is none; say whether it was written."""
    target = places.staged(places.sysconfdir / ENV_FILE)
    if target.exists():
        return False
    text = render((FOLDER / EXAMPLE).read_text(encoding="utf-8"), known, EXAMPLE)
    make_folder(target.parent)
    # Never open to others, not even while it is being written.
    number = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, ENV_FILE_MODE)
    with open(number, "w", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(file.fileno(), ENV_FILE_MODE)
    if os.geteuid() == 0 and places.destdir == Path("/"):
        _give_group(target)
    return True


def _give_group(path: Path) -> None:
    try:
        shutil.chown(path, group=GROUP)
    except LookupError:
        # No such group yet: the line in tmpfiles.d gives it once sysusers.d has made it.
        sys.stderr.write(f"make install: there is no group {GROUP}; {path} stays root's for now\n")


def activate(places: Places) -> None:
    """Make the users and folders that the units need, and tell the service manager of them."""
    if os.geteuid() != 0:
        return
    for folder, command in (
        (places.sysusersdir, ["systemd-sysusers"]),
        (places.tmpfilesdir, ["systemd-tmpfiles", "--create"]),
    ):
        files = [str(path) for path in places.written if path.parent == folder]
        if files:
            _run([*command, *files])
    reload_units()


def reload_units() -> None:
    """Tell the service manager that units have changed, where it runs."""
    if os.geteuid() == 0 and SYSTEMD_RUNS.is_dir():
        _run(["systemctl", "daemon-reload"])


def _run(command: Sequence[str]) -> None:
    """Run a step that a host can do later by itself: its failure is told, not fatal."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=STEP_TIMEOUT_S,
        )
    except FileNotFoundError:
        sys.stderr.write(f"make install: there is no {command[0]} here; left out\n")
        return
    if done.returncode:
        sys.stderr.write(f"make install: {' '.join(command)}: {done.stderr.strip()}\n")
