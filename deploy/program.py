"""The program on its host: an environment of its own with this project and what it depends on.

    checkout + port map ─▶ wheel ─┐
    this environment's packages ──┴▶ LIBDIR.new ─▶ compiled, tried ─▶ LIBDIR

Packages that the daemon depends on are copied from the environment that `make` made and tests ran
in: the same versions, and no network. The new folder takes the place of the old in two renames, so
that a daemon that is started meanwhile finds one of them whole. Compiled here, because the user
that the daemon runs as may not write there, and start-up time is what clients feel.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Final

from deploy.places import InstallError, Places, make_folder, open_to_all
from libclient import ports

ROOT: Final = Path(__file__).parent.parent
# What a wheel is built from.
SOURCES: Final = ("gpuorchd", "libclient", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
EXTRA: Final = "daemon"
# Parts of Python that the daemon does not need, where Python itself has to be copied.
UNNEEDED: Final = (
    "site-packages",
    "test",
    "tests",
    "lib2to3",
    "idlelib",
    "tkinter",
    "ensurepip",
    "config-*",
    "*.a",
)
STEP_TIMEOUT_S: Final = 300.0
VERSION: Final = f"{sys.version_info.major}.{sys.version_info.minor}"


def install_program(places: Places, port_map: str) -> Path:
    """Install the program and return the interpreter that runs it, as the running system has it."""
    final = places.staged(places.libdir)
    fresh = final.with_name(f"{final.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        packages = fresh / "lib" / f"python{VERSION}" / "site-packages"
        make_folder(packages)
        _link_interpreter(fresh)
        for found in dependencies():
            _copy(found, packages)
        _unpack(_wheel(port_map), packages)
        _compile(fresh, places.libdir)
        _try(fresh)
        _take_place(fresh, final)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return places.libdir / "bin" / "python"


def check_interpreter(interpreter: Path, port: int) -> None:
    """Raise `InstallError` unless this interpreter has the daemon, with this port in its map."""
    code = "import gpuorchd.daemon, libclient.ports as p; print(p.daemon_port())"
    done = _run([str(interpreter), "-I", "-c", code], check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InstallError(f"{interpreter} cannot run gpuorchd[{EXTRA}]: {why}")
    if done.stdout.strip() != str(port):
        raise InstallError(
            f"gpuorchd in {interpreter} has port {done.stdout.strip()} in its map, not {port}: "
            "install it with that port there, or leave PORT out"
        )


def dependencies() -> list[Distribution]:
    """Return what the daemon's extra needs, all levels of it, without this project itself."""
    found: dict[str, Distribution] = {}
    waiting = [("gpuorchd", EXTRA)]
    extras_seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in extras_seen:
            continue
        extras_seen.add((name, extra))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            raise InstallError(f"{name} is missing in {sys.prefix}: run make first") from None
        for line in found[name].requires or ():
            needed = _needed(line, extra)
            if needed is not None:
                waiting.append(needed)
    del found["gpuorchd"]
    return [found[name] for name in sorted(found)]


def _needed(line: str, extra: str) -> tuple[str, str] | None:
    """Read one requirement: the name and extra that it needs here, None where it does not apply."""
    match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([A-Za-z0-9._-]+)\])?[^;]*(?:;(.*))?$", line)
    if match is None:
        raise InstallError(f"a requirement that cannot be read: {line!r}")
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    marker = match[3] or ""
    asked = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
    if asked is not None and asked[1] != extra:
        return None
    if marker and asked is None:
        # For other systems or versions of Python: pip decided it when it made this environment.
        try:
            distribution(name)
        except PackageNotFoundError:
            return None
    return name, match[2] or ""


def _copy(found: Distribution, packages: Path) -> None:
    for file in found.files or ():
        parts = PurePosixPath(file).parts
        if ".." in parts or "__pycache__" in parts:
            # Scripts of the package, which nobody calls here, and what is compiled anew.
            continue
        target = packages.joinpath(*parts)
        make_folder(target.parent)
        shutil.copy2(str(file.locate()), target)


def _wheel(port_map: str) -> bytes:
    """Build this project's wheel from a copy of its sources with this port map."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "source")
        copy.mkdir()
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, copy / name, ignore=skip)
            else:
                shutil.copy2(source, copy / name)
        (copy / "libclient" / "ports.txt").write_text(port_map, encoding="utf-8")
        # The wheel's description is the README, which tells the port too.
        readme = copy / "README.md"
        port = str(ports.daemon(ports.parse(port_map)).port)
        readme.write_text(readme.read_text().replace(str(ports.daemon_port()), port))
        pip = [sys.executable, "-m", "pip", "-qq", "--no-input", "--disable-pip-version-check"]
        _run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, str(copy)])
        (built,) = Path(folder).glob("*.whl")
        return built.read_bytes()


def _unpack(wheel: bytes, packages: Path) -> None:
    """Unpack a wheel of Python files alone, which is all that installing one takes."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        archive.extractall(packages)


def _link_interpreter(fresh: Path) -> None:
    """Let the new folder have an interpreter: a link to the host's, or a copy of this one."""
    bin_folder = fresh / "bin"
    make_folder(bin_folder)
    (bin_folder / "python3").symlink_to("python")
    base = shared_interpreter()
    if base is None:
        _copy_interpreter(fresh)
        (bin_folder / "python").symlink_to(f"python{VERSION}")
        return
    (bin_folder / "python").symlink_to(base)
    (fresh / "pyvenv.cfg").write_text(
        f"home = {base.parent}\ninclude-system-site-packages = false\nversion = {VERSION}\n"
    )


def shared_interpreter() -> Path | None:
    """Return an interpreter of this version that an unprivileged service can execute, if any."""
    base = Path(sys.base_prefix, "bin", f"python{VERSION}")
    candidates = (base, Path(f"/usr/bin/python{VERSION}"), Path(f"/usr/local/bin/python{VERSION}"))
    for candidate in candidates:
        if candidate.exists() and open_to_all(candidate):
            done = _run([str(candidate), "-I", "-c", "import ssl, ctypes"], check=False)
            if done.returncode == 0:
                return candidate
    return None


def _copy_interpreter(fresh: Path) -> None:
    """Copy this environment's own Python: it lies where the daemon's user cannot reach it.

    It finds its library beside itself, wherever it lies, and the packages in it.
    """
    base = Path(sys.base_prefix)
    shutil.copy2(base / "bin" / f"python{VERSION}", fresh / "bin")
    library = f"python{VERSION}"
    skip = shutil.ignore_patterns("__pycache__", *UNNEEDED)
    shutil.copytree(
        base / "lib" / library, fresh / "lib" / library, ignore=skip, dirs_exist_ok=True
    )
    for shared in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(shared, fresh / "lib", follow_symlinks=False)


def _compile(fresh: Path, final: Path) -> None:
    python = str(fresh / "bin" / "python")
    # Names in tracebacks are those of the running system.
    names = ["-s", str(fresh), "-p", str(final)]
    command = [python, "-I", "-m", "compileall", "-q", "-j", "0", *names, str(fresh / "lib")]
    # A package may bring a file that is no Python of this version, and that nobody imports.
    _run(command, check=False)


def _try(fresh: Path) -> None:
    code = "import gpuorchd.daemon, gpuorchd.observe.http_server, libclient.cli.main, pynvml"
    _run([str(fresh / "bin" / "python"), "-I", "-c", code])


def _take_place(fresh: Path, final: Path) -> None:
    for path in fresh.rglob("*"):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
    fresh.chmod(0o755)
    old = final.with_name(f"{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _run(command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=STEP_TIMEOUT_S,
    )
    if check and done.returncode:
        shown = (done.stderr or done.stdout).strip()
        raise InstallError(f"{' '.join(command)} ended with {done.returncode}:\n{shown}")
    return done
