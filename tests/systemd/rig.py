"""A small host with a real systemd, for tests: booted in namespaces of its own, gone at the end.

`Rig` boots it (boot.py), installs this checkout with `make install`, and lets a test drive it:
`systemctl`, the journal, processes of users inside, files, signals. Everything that runs inside is
in one pid namespace, which the kernel ends with its first process; that one ends with this process
at the latest. Left over could be only the folder of its cgroup, which the next rig removes.

Clients have to run inside: the daemon identifies a peer by its pid, which has none from outside.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.daemon_process import wait_until
from tests.support.system_packages import install_command

ROOT = Path(__file__).parent.parent.parent
BOOT_DEADLINE_S = 60.0
STEP_TIMEOUT_S = 60.0
INSTALL_TIMEOUT_S = 110.0
CGROUP_PREFIX = "gpuorchd-rig-"
PR_SET_PDEATHSIG = 1
# Where `make install` puts things.
PYTHON = "/usr/lib/gpuorchd/bin/python"
ENV_FILE = "/etc/justnews/gpu_orchestrator.env"
SOCKET = "/run/justnews/gpuorch.sock"
DAEMON = "gpuorchd.service"
# In the command line of the daemon's child.
PROBE = b"gpuorchd.devices.probe"
SOCKETS = ("gpuorchd.socket", "gpuorchd-metrics.socket")
SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
INSIDE = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "SYSTEMD_COLORS": "0",
    "SYSTEMD_PAGER": "",
}


class RigFailed(Exception):
    """The rig cannot be had; `str()` says why."""


class Rig:
    """One booted host. Close it, or use it in `with`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rig-"))
        self._cgroup = _make_cgroup()
        self._output = (self._folder / "output").open("wb")
        try:
            self._process = self._unshare()
            self.pid = self._first_process()
            self._wait_for_boot()
        except BaseException:
            self.close()
            raise

    # Driving it.

    def run(
        self,
        *command: str,
        user: str | None = None,
        check: bool = True,
        timeout_s: float = STEP_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root or as a user; fail with its output where it fails."""
        done = subprocess.run(
            self._inside(command, user),
            env=INSIDE,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            shown = f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            raise AssertionError(shown)
        return done

    def start(
        self, *command: str, user: str | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a process inside; `options` are those of Popen. The caller ends it.

        What is returned is its parent outside: signals to that one do not reach it, but the end of
        its standard input does; `outer_pid` finds the process itself.
        """
        return subprocess.Popen(self._inside(command, user), env=INSIDE, text=True, **options)

    def python(self, code: str, *words: str, user: str | None = "justnews", **options: Any) -> str:
        """Run Python code with the installed client and return what it prints."""
        return self.run(PYTHON, "-I", "-c", code, *words, user=user, **options).stdout

    def gpuorch(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line client as an agent's user."""
        return self.run("gpuorch", *words, user="justnews", check=check)

    def systemctl(self, *words: str, check: bool = True) -> str:
        """Run systemctl and return what it prints."""
        return self.run("systemctl", *words, check=check).stdout

    def show(self, unit: str, name: str) -> str:
        """Return one property of a unit."""
        return self.systemctl("show", "--value", "--property", name, unit).strip()

    def is_active(self, unit: str) -> bool:
        """Whether a unit is active."""
        return self.show(unit, "ActiveState") == "active"

    def http(self, page: str, port: int = 8014) -> tuple[int, str]:
        """Return status and body of a page of the side HTTP port."""
        code = (
            "import sys, urllib.request, urllib.error\n"
            "try: answer = urllib.request.urlopen(sys.argv[1], timeout=20)\n"
            "except urllib.error.HTTPError as error: answer = error\n"
            "print(answer.status); print(answer.read().decode())\n"
        )
        status, _, body = self.python(code, f"http://127.0.0.1:{port}{page}").partition("\n")
        return int(status), body

    def journal(self, unit: str, cursor: str | None = None) -> list[dict[str, Any]]:
        """Return the journal's entries of a unit, after a place in it (`cursor`) if given."""
        since = () if cursor is None else ("--after-cursor", cursor)
        text = self.run("journalctl", "--output=json", "--all", "--unit", unit, *since).stdout
        return [json.loads(line) for line in text.splitlines()]

    def messages(self, unit: str, cursor: str | None = None) -> list[str]:
        """Return the lines that a unit has logged."""
        return [str(entry.get("MESSAGE")) for entry in self.journal(unit, cursor)]

    def cursor(self) -> str:
        """Return the present end of the journal."""
        self.run("journalctl", "--sync")
        text = self.run("journalctl", "--lines=1", "--output=json").stdout
        return str(json.loads(text)["__CURSOR"])

    # The daemon.

    def main_pid(self) -> int:
        """Return the daemon's pid as seen from outside, 0 while there is none."""
        procs = self._cgroup / "system.slice" / DAEMON / "cgroup.procs"
        try:
            outer = [int(pid) for pid in procs.read_text().split()]
        except OSError:
            return 0
        if not outer:
            return 0
        if len(outer) == 1 and PROBE not in _command(outer[0]):
            return outer[0]
        # A child of it, too, or what one left behind: systemd knows which it is.
        inner = self.show(DAEMON, "MainPID")
        return next((pid for pid in outer if _inner_pid(pid) == inner), 0)

    def kill_daemon(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to the daemon's main process alone; return its pid outside, 0 for none."""
        pid = self.main_pid()
        if pid:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return 0
        return pid

    def wait_for_restart(self, old_pid: int) -> int:
        """Wait until another process is the daemon and answers; return its pid outside."""
        wait_until(lambda: self.main_pid() not in {0, old_pid}, "another main process")
        self.gpuorch("health")
        return self.main_pid()

    def configure(self, **variables: object) -> None:
        """Write the env file; the daemon reads it when it starts."""
        lines = [f"{name}={value}\n" for name, value in variables.items()]
        self.write(ENV_FILE, "".join(lines), 0o640)
        self.run("chown", "root:gpuorchd", ENV_FILE)

    def drop_in(self, unit: str, text: str) -> None:
        """Write a drop-in for a unit and let systemd read it."""
        self.write(f"/etc/systemd/system/{unit}.d/50-test.conf", text)
        self.systemctl("daemon-reload")

    def remove_drop_ins(self) -> None:
        """Remove what `drop_in` wrote."""
        found = list(self.path("/etc/systemd/system").glob("*.d/50-test.conf"))
        for file in found:
            file.unlink()
        if found:
            self.systemctl("daemon-reload")

    # Files and processes.

    def path(self, inside: str) -> Path:
        """Return how a file inside is reached from here."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def install(self, *words: str) -> str:
        """Install this checkout for real; return what `make install` says."""
        command = ("make", "--no-print-directory", "-C", "/checkout", "install", "PREFIX=/usr")
        return self.run(*command, *words, timeout_s=INSTALL_TIMEOUT_S).stdout

    def outer_pid(self, started: subprocess.Popen[str]) -> int:
        """Return the pid outside of what `start` started."""
        wait_until(lambda: bool(_children(started.pid)), "the process inside")
        return _children(started.pid)[0]

    def end(self, started: subprocess.Popen[str]) -> None:
        """End what `start` started, whatever it does, and close its streams."""
        inside = _children(started.pid)
        for pid in inside:
            os.kill(pid, signal.SIGKILL)
        if not inside and started.poll() is None:
            started.kill()
        started.wait(STEP_TIMEOUT_S)
        for stream in (started.stdin, started.stdout, started.stderr):
            if stream is not None:
                stream.close()

    def close(self) -> None:
        """End everything inside and remove what was there."""
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()
            process.wait(STEP_TIMEOUT_S)
        self._output.close()
        _remove_cgroup(self._cgroup)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unshare(self) -> subprocess.Popen[bytes]:
        namespaces = ("mount", "pid", "uts", "ipc", "cgroup", "net")
        unshare = ["unshare", *(f"--{name}" for name in namespaces)]
        unshare += ["--fork", "--kill-child", "--propagation", "private", "--"]
        boot = [sys.executable, "-I", str(Path(__file__).with_name("boot.py"))]
        # Into the cgroup first: what the namespace shows as its root is where it was made.
        script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return subprocess.Popen(
            ["sh", "-c", script, str(self._cgroup), *unshare, *boot, str(self._folder), str(ROOT)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            preexec_fn=_end_with_parent,
        )

    def _first_process(self) -> int:
        def found() -> bool:
            self._check_alive()
            return bool(_children(self._process.pid))

        wait_until(found, "the first process of the namespaces")
        return _children(self._process.pid)[0]

    def _wait_for_boot(self) -> None:
        deadline = time.monotonic() + BOOT_DEADLINE_S
        state = ""
        while state not in {"running", "degraded"}:
            if time.monotonic() > deadline:
                raise RigFailed(f"not booted within {BOOT_DEADLINE_S} s ({state}): {self.output()}")
            self._check_alive()
            state = self.run("systemctl", "is-system-running", "--wait", check=False).stdout.strip()
            if not state:
                time.sleep(0.05)

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise RigFailed(f"it ended with {self._process.returncode}: {self.output()}")

    def output(self) -> str:
        """What boot.py and systemd have written."""
        return (self._folder / "output").read_text(errors="replace").strip()

    def _inside(self, command: Sequence[str], user: str | None) -> list[str]:
        enter = ["nsenter", f"--target={self.pid}", "--all", "--"]
        if user is not None:
            entries = self.path("/etc/passwd").read_text().splitlines()
            gid = next(line.split(":")[3] for line in entries if line.startswith(f"{user}:"))
            enter += ["setpriv", f"--reuid={user}", f"--regid={gid}", "--init-groups", "--"]
        return [*enter, *command]


def refusal() -> str | None:
    """Say why no rig can be booted here, None where one can. In CI a skip for it fails the run."""
    if os.geteuid() != 0:
        return "systemd is booted in namespaces, which takes root"
    for program in ("unshare", "nsenter", "pivot_root", "setpriv", "make"):
        if shutil.which(program) is None:
            return f"{program} is missing"
    if not any(os.path.exists(path) for path in SYSTEMD):
        return f"systemd is missing; run: {install_command(['systemctl'])}"
    try:
        _remove_cgroup(_make_cgroup())
    except (RigFailed, OSError) as error:
        return f"no cgroup can be made here: {error}"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--cgroup", "--net", "--propagation", "private",
         "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode:
        return f"namespaces are not allowed here: {tried.stderr.strip()}"
    return None


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _inner_pid(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    return line.split()[-1]


def _make_cgroup() -> Path:
    """Make a cgroup for one rig below this process's own, and sweep those of rigs that are gone."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    at = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
    if at is None:
        raise RigFailed("no cgroup2 is mounted on this machine")
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    parent = at / own.lstrip("/")
    for old in parent.glob(f"{CGROUP_PREFIX}*"):
        if not Path("/proc", old.name.removeprefix(CGROUP_PREFIX)).exists():
            _remove_cgroup(old)
    made = parent / f"{CGROUP_PREFIX}{os.getpid()}"
    made.mkdir(exist_ok=True)
    return made


def _remove_cgroup(cgroup: Path) -> None:
    """Remove a cgroup and those below it, once their processes have ended."""

    def emptied() -> bool:
        for folder, _, _ in os.walk(cgroup, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:
                return False
        return True

    _wait_a_little(emptied)


def _wait_a_little(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
