"""`gpuorch top`: live on a terminal, and honest where there is none."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli_process import COMMAND, cli_environ, gpuorch, start_gpuorch
from tests.support.daemon_process import (
    ANSWER_DEADLINE_S,
    DaemonProcess,
    LineClient,
    running_daemon,
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, "--simulate", "1x24576") as daemon:
        yield daemon


class Terminal:
    """A terminal of 100 by 30 with `top` on it."""

    def __init__(self, path: Path, interval: str = "200ms") -> None:
        self.fd, self.theirs = pty.openpty()
        self.resize(100, 30)
        self.before = termios.tcgetattr(self.theirs)
        self.seen = b""
        self.process = subprocess.Popen(
            [*COMMAND, "top", "--interval", interval],
            env=cli_environ(path, TERM="xterm-256color"),
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            # A group of its own, which a shell's job control would make: it can be stopped.
            process_group=0,
        )

    def wait_for(self, *texts: bytes) -> None:
        """Read until texts are shown, in any order, after what was waited for last."""
        deadline = time.monotonic() + ANSWER_DEADLINE_S
        while not all(text in self.seen for text in texts):
            left = deadline - time.monotonic()
            assert left > 0, f"{texts!r} not in {self.seen[-3_000:]!r}"
            self.read(left)
        self.seen = self.seen[max(self.seen.index(text) + len(text) for text in texts) :]

    def read(self, timeout_s: float) -> None:
        """Take what is there within a time."""
        if select.select([self.fd], [], [], timeout_s)[0]:
            self.seen += os.read(self.fd, 65_536)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, key: bytes) -> None:
        os.write(self.fd, key)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.theirs)
        os.close(self.fd)


def test_top_follows_what_happens_and_quits_on_q(daemon: DaemonProcess) -> None:
    terminal = Terminal(daemon.socket)
    try:
        terminal.wait_for(b"nobody holds a lease")
        with daemon.client() as client:
            assert client.ask("lease", agent="analyst", min_memory_mb=4_096)["granted"]
            terminal.wait_for(b"analyst")
            terminal.press(b"s")
        terminal.wait_for(b"nobody holds a lease")
        terminal.press(b"q")
        # The screen that was there before comes back.
        terminal.wait_for(b"\x1b[?1049l")
        assert terminal.process.wait(ANSWER_DEADLINE_S) == 0
        assert termios.tcgetattr(terminal.theirs) == terminal.before
    finally:
        terminal.close()


def test_top_outlives_the_daemon(tmp_path: Path) -> None:
    terminal = None
    daemon = DaemonProcess(tmp_path, "--simulate", "1x24576")
    try:
        daemon.wait_until_it_answers()
        terminal = Terminal(daemon.socket)
        terminal.wait_for(b"nobody waits")
        daemon.stop()
        terminal.wait_for(b"no daemon")
        daemon = DaemonProcess(tmp_path, "--simulate", "1x24576")
        daemon.wait_until_it_answers()
        terminal.wait_for(b"ready")
        # Ctrl-C; the terminal is not the one that controls it, so the key alone would not do.
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(ANSWER_DEADLINE_S) == 130
    finally:
        if terminal is not None:
            terminal.close()
        daemon.end()


SHOWN = (b"\x1b[?1049h", b"\x1b[?25l")
GIVEN_BACK = (b"\x1b[?25h", b"\x1b[?1049l")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_ends_top_and_leaves_the_terminal_as_it_was(
    daemon: DaemonProcess, number: signal.Signals
) -> None:
    terminal = Terminal(daemon.socket, "1m")
    try:
        terminal.wait_for(b"nobody waits")
        terminal.process.send_signal(number)
        terminal.wait_for(*GIVEN_BACK)
        assert terminal.process.wait(ANSWER_DEADLINE_S) == -number
        assert termios.tcgetattr(terminal.theirs) == terminal.before
    finally:
        terminal.close()


def test_ctrl_z_gives_the_terminal_back_until_top_goes_on(daemon: DaemonProcess) -> None:
    terminal = Terminal(daemon.socket, "1m")
    try:
        terminal.wait_for(b"nobody waits")
        terminal.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert termios.tcgetattr(terminal.theirs) == terminal.before
        terminal.wait_for(*GIVEN_BACK)
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait_for(SHOWN[0])
        terminal.wait_for(b"nobody waits")
        terminal.press(b"q")
        assert terminal.process.wait(ANSWER_DEADLINE_S) == 0
        assert termios.tcgetattr(terminal.theirs) == terminal.before
    finally:
        terminal.close()


def test_top_shows_a_terminal_of_another_size_at_once(daemon: DaemonProcess) -> None:
    terminal = Terminal(daemon.socket, "1m")
    try:
        terminal.wait_for(b"nobody waits")
        terminal.resize(60, 20)
        # The terminal is not the one that controls it, so it is not told by itself.
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.wait_for(b"nobody waits")
    finally:
        terminal.close()


@pytest.mark.serial
def test_many_events_do_not_make_top_a_load(daemon: DaemonProcess) -> None:
    def looks(client: LineClient) -> int:
        text = client.ask("metrics")["text"]
        found = re.search(r'requests_total{op="gpu_info",outcome="ok"} (\d+)', text)
        assert found is not None
        return int(found[1])

    terminal = Terminal(daemon.socket, "1m")
    try:
        terminal.wait_for(b"nobody waits")
        with daemon.client() as client:
            begun, start_s = looks(client), time.monotonic()
            while (took_s := time.monotonic() - start_s) < 3:
                token = client.ask("lease", agent="churn", min_memory_mb=16)["token"]
                client.ask("release", token=token)
                # A terminal that takes nothing more would hold it up by itself.
                terminal.read(0.0)
            # One every half second, and one that was due at the start.
            made = looks(client) - begun
        assert 2 <= made <= took_s / 0.5 + 1
    finally:
        terminal.close()


def test_top_without_a_terminal_says_what_to_use(daemon: DaemonProcess) -> None:
    done = gpuorch(daemon.socket, "top")
    assert done.returncode == 2
    assert "gpuorch status" in done.stderr


def test_top_in_json_is_a_stream_of_documents(daemon: DaemonProcess) -> None:
    process = start_gpuorch(daemon.socket, "top", "--json", "--interval", "50ms")
    try:
        assert process.stdout is not None
        documents = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert all("gpu_info" in document for document in documents)
    finally:
        process.kill()
        process.communicate()


def test_without_rich_top_says_what_to_install(daemon: DaemonProcess, tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('No module named rich')\n")
    ours, theirs = pty.openpty()
    environ = cli_environ(daemon.socket, TERM="xterm")
    environ["PYTHONPATH"] = f"{tmp_path}:{environ['PYTHONPATH']}"
    try:
        done = subprocess.run(
            [*COMMAND, "top"],
            env=environ,
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            timeout=ANSWER_DEADLINE_S,
            check=False,
        )
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 3
    assert b"pip install 'gpuorchd[cli]'" in done.stderr
