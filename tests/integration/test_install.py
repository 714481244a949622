"""`make install` into a staging folder: what is put there, with which port, and what runs of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import program
from deploy.places import InstallError, Places
from deploy.rendering import render
from deploy.units import FOLDER, install_units
from libclient import ports
from tests.support.sources import ROOT

PORT = 18014
LAUNCHERS = ("gpuorchd", "gpuorch", "justnews-health", "justnews-enable-all")


class Installed:
    """An installation in a folder: where it is staged, and how to run what is in it."""

    def __init__(self, destdir: Path) -> None:
        self.destdir = destdir
        self.places = Places(destdir, Path("/usr/local"), Path("/etc"))

    def make(self, target: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", "--no-print-directory", target, f"DESTDIR={self.destdir}", *words],
            cwd=ROOT,
            # The flags of the make that runs these tests are not for this one.
            env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the installed interpreter; the launchers name the final place, which is not here."""
        python = self.places.staged(self.places.libdir) / "bin" / "python"
        return subprocess.run(
            [python, "-I", *words],
            cwd="/",
            env={"PATH": os.defpath, "HOME": "/nonexistent"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def own_files(self) -> Iterator[Path]:
        """Everything that is this project's: packages of others may have any number in them."""
        for path in sorted(self.destdir.rglob("*")):
            parts = path.relative_to(self.destdir).parts
            if path.is_file() and not path.is_symlink() and path.suffix != ".pyc":
                inner = parts[parts.index("site-packages") + 1] if "site-packages" in parts else ""
                if not inner or inner.startswith(("gpuorchd", "libclient")):
                    yield path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    if shutil.which("make") is None:
        pytest.skip("make is missing")
    made = Installed(tmp_path_factory.mktemp("staged"))
    done = made.make("install", f"PORT={PORT}")
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_no_default_port_is_left_anywhere_when_another_is_asked_for(installed: Installed) -> None:
    default = re.compile(rf"\b{ports.daemon_port()}\b")
    files = list(installed.own_files())
    having = [str(path) for path in files if default.search(path.read_text(errors="replace"))]
    assert having == []
    asked = [path.name for path in files if str(PORT) in path.read_text(errors="replace")]
    assert {"gpu_orchestrator.env", "gpu_orchestrator.env.example", "ports.txt"} <= set(asked)
    assert "gpuorchd.8" in asked


def test_the_installed_daemon_and_client_have_that_port_by_default(installed: Installed) -> None:
    shown = installed.python("-m", "gpuorchd", "--check-config")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["http_port"] == PORT
    asked = installed.python("-m", "libclient.cli.roster_health", "--port", "gpu_orchestrator")
    assert asked.stdout.strip() == str(PORT), asked.stderr


def test_nothing_that_is_installed_has_a_name_left_to_be_replaced(installed: Installed) -> None:
    left = [
        str(path)
        for path in installed.own_files()
        if "site-packages" not in path.parts and re.search(r"@[A-Z_]+@", path.read_text())
    ]
    assert left == []


def test_every_unit_and_drop_in_of_the_project_is_installed(installed: Installed) -> None:
    expected = {path.name for path in FOLDER.rglob("*") if path.is_file()}
    found = {path.name for path in installed.own_files()}
    assert expected <= found


def test_the_env_file_is_for_its_group_and_written_once(installed: Installed) -> None:
    path = installed.destdir / "etc" / "justnews" / "gpu_orchestrator.env"
    assert path.stat().st_mode & 0o777 == 0o640
    path.write_text("SAFE_MODE=true\n")
    again = installed.make("install", f"PORT={PORT}")
    assert again.returncode == 0, again.stderr
    assert path.read_text() == "SAFE_MODE=true\n"
    assert "kept" in again.stdout


def test_launchers_run_what_is_installed_in_isolation(installed: Installed) -> None:
    for name in LAUNCHERS:
        path = installed.places.staged(installed.places.bindir / name)
        assert path.stat().st_mode & 0o777 == 0o755
        first, *_ = path.read_text().splitlines()
        assert first == f"#!{installed.places.libdir}/bin/python -I"
        # As the launcher would, from where it is staged.
        code = path.read_text().replace("main())", "main(['--version']))")
        done = installed.python("-c", code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(name)


def test_the_program_is_compiled_and_everyone_can_read_it(installed: Installed) -> None:
    libdir = installed.places.staged(installed.places.libdir)
    (compiled,) = libdir.rglob("gpuorchd/__pycache__/daemon.*.pyc")
    assert compiled.stat().st_mode & 0o004
    for path in libdir.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o022 == 0, path
            assert path.stat().st_mode & 0o004, path
    interpreter = (libdir / "bin" / "python").resolve()
    assert not interpreter.is_relative_to("/root")


def test_uninstall_removes_all_but_the_configuration(installed: Installed, tmp_path: Path) -> None:
    other = Installed(tmp_path / "other")
    shutil.copytree(installed.destdir, other.destdir, symlinks=True)
    foreign = other.places.staged(other.places.bindir / "others")
    foreign.write_text("")
    done = other.make("uninstall")
    assert done.returncode == 0, done.stderr
    left = [path for path in other.destdir.rglob("*") if not path.is_dir()]
    assert sorted(left) == [other.destdir / "etc/justnews/gpu_orchestrator.env", foreign]
    again = other.make("uninstall")
    assert again.returncode != 0
    assert "nothing is installed here" in again.stderr


def test_a_port_of_another_program_is_refused(tmp_path: Path) -> None:
    taken = next(entry for entry in ports.port_map() if entry.kind == ports.AGENT)
    done = Installed(tmp_path).make("install", f"PORT={taken.port}")
    assert done.returncode != 0
    assert str(taken.port) in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "path"), [("PREFIX", "usr"), ("PREFIX", "/a b"), ("PREFIX", "/%h")]
)
def test_a_path_that_units_cannot_hold_is_refused(name: str, path: str) -> None:
    with pytest.raises(InstallError, match=name):
        Places(Path("/"), Path(path), Path("/etc"))


def test_a_template_with_an_unknown_name_is_refused() -> None:
    assert render("listen @PORT@ user@host", {"PORT": "1"}, "x") == "listen 1 user@host"
    with pytest.raises(InstallError, match="@PROT@"):
        render("listen @PROT@", {"PORT": "1"}, "x.service")


def test_each_ending_has_its_place_and_none_is_left_out(tmp_path: Path) -> None:
    source, destdir = tmp_path / "systemd", tmp_path / "staged"
    places = Places(destdir, Path("/usr/local"), Path("/etc"))
    expected = {
        "a@.service": "usr/local/lib/systemd/system/a@.service",
        "a.socket": "usr/local/lib/systemd/system/a.socket",
        "a@.service.d/gate.conf": "usr/local/lib/systemd/system/a@.service.d/gate.conf",
        "sysusers.d/a.conf": "usr/local/lib/sysusers.d/a.conf",
        "tmpfiles.d/a.conf": "usr/local/lib/tmpfiles.d/a.conf",
        "gpu_orchestrator.env.example": "usr/local/share/doc/gpuorchd/gpu_orchestrator.env.example",
    }
    for name in expected:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("port @PORT@\n")
    install_units(places, {"PORT": "7"}, source)
    for target in expected.values():
        assert (destdir / target).read_text() == "port 7\n"
    (source / "strange.conf").write_text("")
    with pytest.raises(InstallError, match=r"strange\.conf"):
        install_units(places, {"PORT": "7"}, source)


def test_outside_the_prefixes_that_systemd_searches_units_go_to_the_configuration() -> None:
    places = Places(Path("/"), Path("/opt/gpuorchd"), Path("/etc"))
    assert places.unitdir == Path("/etc/systemd/system")


def test_an_interpreter_without_the_daemon_is_refused() -> None:
    bare = program.shared_interpreter()
    if bare is None:
        pytest.skip("no interpreter that others can reach is here")
    with pytest.raises(InstallError, match=r"cannot run gpuorchd\[daemon\]"):
        program.check_interpreter(bare, ports.daemon_port())


@pytest.mark.slow
def test_a_python_that_others_cannot_reach_is_copied_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("dist-packages" in folder for folder in site.getsitepackages([sys.base_prefix])):
        # The system's own Python: it is not to be moved, and everyone can reach it.
        assert program.shared_interpreter() is not None
        return
    monkeypatch.setattr(program, "shared_interpreter", lambda: None)
    installed = Installed(tmp_path)
    program.install_program(installed.places, ports.FILE.read_text())
    code = "import sys, gpuorchd.daemon; print(sys.prefix, sys.base_prefix)"
    done = installed.python("-c", code)
    assert done.returncode == 0, done.stderr
    libdir = str(installed.places.staged(installed.places.libdir))
    assert done.stdout.split() == [libdir, libdir]
