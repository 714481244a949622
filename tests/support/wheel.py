"""The distribution as users get it: a wheel, built from a copy and installed by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.support.sources import ROOT

# What a build reads. A copy, because a build leaves folders beside its sources.
BUILT_FROM = ("gpuorchd", "libclient", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# The registry may be slow; pip itself retries.
INSTALL_TIMEOUT_S = 100.0


@dataclass(frozen=True, slots=True)
class InstalledWheel:
    """A wheel and a virtual environment that holds it with its plain dependencies alone."""

    wheel: Path
    environment: Path

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.environment / "bin" / "python"

    def run(
        self, program: str, *arguments: str, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs, away from the checkout."""
        return subprocess.run(
            [self.environment / "bin" / program, *arguments],
            cwd=self.environment,
            env={"PATH": os.defpath, "HOME": str(self.environment), **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )


def build_and_install(folder: Path) -> InstalledWheel:
    """Build the wheel and install it, with what it requires and no extra, into `folder`."""
    copy = folder / "source"
    copy.mkdir()
    skip = shutil.ignore_patterns("__pycache__")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=skip)
        else:
            shutil.copy(source, copy / name)
    pip = [sys.executable, "-m", "pip", "-qq", "--no-input", "--disable-pip-version-check"]
    built = folder / "built"
    _check([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(copy)])
    (wheel,) = built.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    pins = str(ROOT / "requirements.lock")
    inside = [*pip, "--python", str(environment / "bin" / "python")]
    _check([*inside, "install", "--constraint", pins, str(wheel)])
    return InstalledWheel(wheel, environment)


def _check(command: list[str]) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=INSTALL_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
