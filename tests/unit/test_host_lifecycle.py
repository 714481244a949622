"""What ends the daemon, and with which code."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from gpuorchd.host.lifecycle import Lifecycle
from gpuorchd.host.start import EXIT_BUG


class Reports:
    """The events that were reported."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def __call__(self, event: str, /, **fields: object) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
async def lifecycle(reports: Reports) -> AsyncIterator[Lifecycle]:
    installed = Lifecycle(asyncio.get_running_loop(), reports)
    installed.install()
    yield installed
    installed.uninstall()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_asks_for_a_clean_end(
    lifecycle: Lifecycle, reports: Reports, number: signal.Signals
) -> None:
    os.kill(os.getpid(), number)
    assert await asyncio.wait_for(lifecycle.ended, 10) == 0
    assert reports.events == [("daemon.stop_asked", {"signal": number.name})]


async def test_a_hangup_does_not_end_it(lifecycle: Lifecycle, reports: Reports) -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(lifecycle.ended, 10)
    assert "daemon.hangup_ignored" in reports.names()


async def test_an_exception_in_a_callback_ends_it_as_a_bug_with_its_place(
    lifecycle: Lifecycle, reports: Reports
) -> None:
    def fall() -> None:
        raise KeyError("a bug")

    asyncio.get_running_loop().call_soon(fall)
    assert await asyncio.wait_for(lifecycle.ended, 10) == EXIT_BUG
    ((name, fields),) = reports.events
    assert name == "daemon.bug_met"
    assert "KeyError: 'a bug'" in str(fields["error"])
    assert "in fall" in str(fields["error"])


async def test_a_failure_from_outside_does_not_end_it(
    lifecycle: Lifecycle, reports: Reports
) -> None:
    def fail() -> None:
        raise OSError(24, "Too many open files")

    loop = asyncio.get_running_loop()
    loop.call_soon(fail)
    passed = loop.create_future()
    loop.call_soon(passed.set_result, None)
    await passed
    assert not lifecycle.ended.done()
    assert reports.names() == ["daemon.loop_failed"]


async def test_after_uninstall_the_signals_are_no_longer_ours(reports: Reports) -> None:
    before = signal.getsignal(signal.SIGHUP)
    lifecycle = Lifecycle(asyncio.get_running_loop(), reports)
    lifecycle.install()
    lifecycle.uninstall()
    assert signal.getsignal(signal.SIGHUP) == before
    assert not reports.events


def run(script: str) -> subprocess.CompletedProcess[str]:
    header = (
        "import asyncio, os, signal\n"
        "from gpuorchd.host import lifecycle\n"
        "from gpuorchd.host.lifecycle import Lifecycle\n"
        "def report(event, /, **fields): print(event)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", header + script],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_an_end_that_hangs_is_forced_with_the_code_that_it_was_to_have() -> None:
    done = run(
        "lifecycle.STOP_DEADLINE_S = 0.01\n"
        "async def main():\n"
        "    life = Lifecycle(asyncio.get_running_loop(), report)\n"
        "    life.ended.set_result(0)\n"
        "    life.set_deadline(lambda: print('released'))\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    assert done.returncode == 0
    assert done.stdout.split() == ["daemon.stop_overdue", "released"]


@pytest.mark.parametrize("loop", ["asyncio.new_event_loop", "uvloop.new_event_loop"])
def test_further_signals_change_nothing_up_to_the_very_end(loop: str) -> None:
    done = run(
        "import atexit, sys, uvloop\n"
        "async def main():\n"
        "    life = Lifecycle(asyncio.get_running_loop(), report)\n"
        "    life.install()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    code = await life.ended\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    await asyncio.to_thread(lambda: None)\n"
        "    life.go_deaf()\n"
        "    for number in lifecycle.SIGNALS:\n"
        "        os.kill(os.getpid(), number)\n"
        "    return code\n"
        "def at_exit():\n"
        "    for number in lifecycle.SIGNALS:\n"
        "        os.kill(os.getpid(), number)\n"
        "    print('exit')\n"
        "atexit.register(at_exit)\n"
        f"with asyncio.Runner(loop_factory={loop}) as runner:\n"
        "    code = runner.run(main())\n"
        "sys.exit(code)\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["daemon.stop_asked", "daemon.stop_repeated", "exit"]
