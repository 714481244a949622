"""Where things go: paths of an installation, and the list of what was put there.

Every path is that of the running system; `staged` puts DESTDIR before it. Files are written whole
and renamed into place, with modes that do not depend on the umask, and are remembered, so that
`make uninstall` removes what was installed and nothing else.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

# Prefixes below which systemd, man and shells look by themselves.
SYSTEM_PREFIXES: Final = (Path("/usr"), Path("/usr/local"))
MANIFEST: Final = "installed.txt"


class InstallError(Exception):
    """What cannot be installed so. `str()` is one line: what, and what to do."""


@dataclass(slots=True)
class Places:
    """The folders of one installation. `destdir` is where it is staged, `/` for the host itself."""

    destdir: Path
    prefix: Path
    sysconfdir: Path
    written: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, path in (
            ("DESTDIR", self.destdir),
            ("PREFIX", self.prefix),
            ("SYSCONFDIR", self.sysconfdir),
        ):
            if not path.is_absolute():
                raise InstallError(f"{name} is {str(path)!r}; allowed: an absolute path")
            # Paths go into units, scripts and `#!` lines, which have no common way of quoting.
            if any(char.isspace() or char in "%$\"'\\@" for char in str(path)):
                raise InstallError(f"{name} is {str(path)!r}; allowed: no space, quote, %, $, @")

    @property
    def bindir(self) -> Path:
        """Commands."""
        return self.prefix / "bin"

    @property
    def libdir(self) -> Path:
        """The program: a virtual environment of its own."""
        return self.prefix / "lib" / "gpuorchd"

    @property
    def unitdir(self) -> Path:
        """Units of the service manager."""
        return self._for_systemd("systemd/system")

    @property
    def sysusersdir(self) -> Path:
        """Users and groups to be made."""
        return self._for_systemd("sysusers.d")

    @property
    def tmpfilesdir(self) -> Path:
        """Folders to be made at boot."""
        return self._for_systemd("tmpfiles.d")

    @property
    def docdir(self) -> Path:
        """The runbook and the example env file."""
        return self.prefix / "share" / "doc" / "gpuorchd"

    def _for_systemd(self, name: str) -> Path:
        # systemd looks below /usr/lib and /usr/local/lib; elsewhere it would not find them.
        if self.prefix in SYSTEM_PREFIXES:
            return self.prefix / "lib" / name
        return self.sysconfdir / name

    def staged(self, path: Path) -> Path:
        """Return where a path of the running system lies while it is being installed."""
        return self.destdir / path.relative_to("/")

    def write(self, path: Path, text: str, mode: int = 0o644) -> None:
        """Write one file of the installation, whole or not at all."""
        target = self.staged(path)
        make_folder(target.parent)
        unfinished = target.with_name(f".{target.name}.new")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.chmod(mode)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
        self.written.append(path)

    def remember(self) -> None:
        """Write the list of what was installed, for `remove`."""
        manifest = self.libdir / MANIFEST
        lines = sorted({str(path) for path in (*self.written, manifest)})
        self.write(manifest, "\n".join(lines) + "\n")

    def remove(self) -> list[Path]:
        """Remove what the list names, and the folders that this leaves empty; return the files.

        Raises `InstallError` where there is no list.
        """
        manifest = self.staged(self.libdir / MANIFEST)
        try:
            listed = [Path(line) for line in manifest.read_text().splitlines()]
        except FileNotFoundError:
            raise InstallError(f"{manifest} is not there: nothing is installed here") from None
        for path in listed:
            self.staged(path).unlink(missing_ok=True)
        shutil.rmtree(self.staged(self.libdir), ignore_errors=True)
        for folder in sorted({path.parent for path in listed}, key=str, reverse=True):
            self._prune(self.staged(folder))
        return listed

    def _prune(self, folder: Path) -> None:
        stop = {self.destdir, self.staged(self.prefix), self.staged(self.sysconfdir)}
        while folder not in stop and folder != folder.parent:
            try:
                folder.rmdir()
            except OSError:
                # Not empty, or gone already: others have it.
                return
            folder = folder.parent


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, open to read whatever the umask is."""
    missing = [folder, *folder.parents]
    for part in reversed([path for path in missing if not path.exists()]):
        part.mkdir()
        part.chmod(0o755)


def open_to_all(path: Path) -> bool:
    """Whether any user of the host can execute the file at `path`, folders included.

    Folders that a confined service does not see (`ProtectHome=`, `PrivateTmp=`) count as closed.
    """
    real = path.resolve()
    hidden = ("/root", "/home", "/run/user", "/tmp", "/var/tmp")
    if any(real.is_relative_to(folder) for folder in hidden):
        return False
    return all(os.stat(part).st_mode & 0o001 for part in (real, *real.parents))
