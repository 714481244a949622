"""What lies in `systemd/`: each file goes where its ending says, with its names replaced.

    X.service X.socket X.target …      units
    X.service.d/Y.conf                 drop-ins
    sysusers.d/Y.conf tmpfiles.d/Y.conf
    X.env.example                      the example env file, beside the docs
    an executable file                 a program that a unit runs, below @LIBDIR@

A file that is none of these is an error: nothing that was meant for a host is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from deploy.places import InstallError, Places
from deploy.rendering import render

FOLDER: Final = Path(__file__).parent.parent / "systemd"
EXAMPLE: Final = "gpu_orchestrator.env.example"
# Below SYSCONFDIR.
ENV_FILE: Final = Path("justnews/gpu_orchestrator.env")
UNIT_SUFFIXES: Final = frozenset(
    {".service", ".socket", ".target", ".path", ".timer", ".slice", ".mount"}
)


def install_units(places: Places, known: Mapping[str, str], folder: Path = FOLDER) -> None:
    """Render everything in `folder` to its place."""
    for source in _files(folder):
        relative = source.relative_to(folder)
        executable = bool(source.stat().st_mode & 0o100)
        target = _target(places, relative, executable=executable)
        text = render(source.read_text(encoding="utf-8"), known, str(relative))
        places.write(target, text, 0o755 if executable else 0o644)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts:
            yield path


def _target(places: Places, relative: Path, *, executable: bool) -> Path:
    name, parent = relative.name, relative.parent.name
    if name == EXAMPLE:
        return places.docdir / name
    if executable:
        return places.libdir / name
    if relative.suffix in UNIT_SUFFIXES:
        return places.unitdir / relative
    if relative.suffix == ".conf":
        if parent == "sysusers.d":
            return places.sysusersdir / name
        if parent == "tmpfiles.d":
            return places.tmpfilesdir / name
        if parent.endswith(".d"):
            return places.unitdir / relative
    raise InstallError(f"systemd/{relative} has an ending that has no place on a host")
