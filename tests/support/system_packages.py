"""Programs of the system that tests and benchmarks use, and how to come by them.

As root with CI set they are installed where they are missing; otherwise the command to run is named
and what needs them skips, with that command as its reason. `python -m tests.support.system_packages
test` sees to what `make test` needs, `bench` to what `make bench` needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.support.skips import in_ci

# Program to Debian package.
PACKAGES = {
    "cc": "gcc",
    "curl": "curl",
    "nc": "netcat-openbsd",
    "redis-server": "redis-server",
    "socat": "socat",
    "systemctl": "systemd",
    "tmux": "tmux",
}
# What each target of the Makefile needs.
NEEDED = {
    "test": ("cc", "curl", "nc", "socat", "systemctl", "tmux"),
    "bench": ("cc", "redis-server"),
}
# A package index that is being updated answers again after a moment.
RETRY_AFTER_S = 5.0


def path_of(program: str) -> str | None:
    """Return where a program is, None where it is missing.

    `nc` counts only in the version that speaks Unix sockets.
    """
    path = shutil.which(program)
    if path is not None and program == "nc" and not _speaks_unix_sockets(path):
        return None
    return path


def require(program: str) -> str:
    """Return where a program is, or skip the test and say what to install."""
    path = path_of(program)
    if path is None:
        pytest.skip(f"{program} is missing; run: {install_command([program])}")
    return path


def install_command(programs: list[str]) -> str:
    """Return the command that installs these programs."""
    return "sudo apt-get install -y " + " ".join(sorted({PACKAGES[name] for name in programs}))


def main() -> None:
    """See to what the target on the command line needs; never fail for want of it."""
    missing = [program for program in NEEDED[sys.argv[1]] if path_of(program) is None]
    if not missing:
        return
    if os.geteuid() == 0 and in_ci() and shutil.which("apt-get") is not None:
        _install(missing)
        return
    print(f"missing, and what needs it is skipped: {', '.join(missing)}")
    print(f"  to install: {install_command(missing)}")


def _install(programs: list[str]) -> None:
    packages = sorted({PACKAGES[name] for name in programs})
    print(f"installing {' '.join(packages)}", flush=True)
    # RUNLEVEL keeps a package from starting its service: what is needed is started by the tests.
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    steps = (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages],
    )
    for last in (False, True):
        if all(_ran(step, environ) for step in steps):
            return
        if not last:
            time.sleep(RETRY_AFTER_S)
    # The tests say what they miss, by name.
    print("apt-get failed twice", flush=True)


def _ran(command: list[str], environ: dict[str, str]) -> bool:
    done = subprocess.run(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(done.stdout, flush=True)
    return done.returncode == 0


def _speaks_unix_sockets(nc: str) -> bool:
    done = subprocess.run(
        [nc, "-h"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    # The traditional netcat knows neither -U nor -N; both list their options in one word or many.
    return "-U" in done.stdout + done.stderr


if __name__ == "__main__":
    main()
