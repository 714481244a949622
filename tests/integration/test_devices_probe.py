"""The probe as a process: it is replaced when it fails, and holds nothing that it should not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpuorchd.core.events import DevicesFound, DevicesLost, ReadingsTaken
from gpuorchd.devices import nvml
from gpuorchd.devices.child import ProbeChild
from gpuorchd.devices.nvml import NvmlDevices, ProbeOptions
from gpuorchd.devices.proc_facts import read_stat
from tests.support.daemon_process import wait_until
from tests.support.fake_cards import FakeCards, card, uuid_of
from tests.support.opened_sources import Open, failed, gone, good, has_ended, opened_sources, until
from tests.support.recording_engine import DEADLINE_S, RecordingEngine
from tests.support.sources import ROOT

MISSED_DEADLINE_S = 0.4

opened = pytest.fixture(opened_sources)


async def test_a_probe_that_is_killed_is_replaced(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(tmp_path, card())
    source, engine = opened(cards, period_s=0.05)
    await engine.first(ReadingsTaken, good)
    (pid,) = cards.importers()
    seen = len(engine.events)
    os.kill(pid, signal.SIGKILL)
    taken = await engine.first(ReadingsTaken, failed, seen)
    assert taken.failures == ((uuid_of(0), "the probe failed: its process ended"),)
    assert source.telemetry() == {}
    assert not source.checks().answering
    await engine.first(ReadingsTaken, good, seen)
    assert source.checks().answering
    assert len(cards.importers()) == 2
    assert len(engine.of(DevicesFound)) == 1


async def test_a_probe_that_hangs_is_abandoned_and_replaced(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(tmp_path, card(0), card(1))
    source, engine = opened(cards, period_s=0.05, deadline_s=MISSED_DEADLINE_S)
    await engine.first(ReadingsTaken, good)
    cards.show(card(0), card(1), hang="nvmlDeviceGetMemoryInfo_v2")
    taken = await engine.first(ReadingsTaken, failed)
    passed_s = (engine.now_ns() - taken.started_ns) / 1e9
    assert passed_s >= MISSED_DEADLINE_S
    assert [reason for _, reason in taken.failures] == [
        "the NVIDIA driver did not answer within 0.4 s"
    ] * 2
    assert not source.checks().answering
    assert source.call_stats()["sample"].failures == 1
    await gone(cards.importers()[0])
    cards.show(card(0), card(1))
    await engine.first(ReadingsTaken, good, len(engine.events))
    assert source.checks().answering


async def test_a_first_probe_that_hangs_ends_with_no_gpu_and_is_not_ready(
    tmp_path: Path, opened: Open
) -> None:
    cards = FakeCards(tmp_path, card(), hang="nvmlInit")
    source, engine = opened(cards, first_deadline_s=1.0)
    assert source.checks().first_probe_running
    lost = await engine.first(DevicesLost)
    assert lost.reason == "the NVIDIA driver did not answer within 1 s"
    checks = source.checks()
    assert (checks.first_probe_running, checks.answering) == (False, False)
    cards.show(card())
    await engine.first(ReadingsTaken, good)


async def test_abandoned_probes_that_do_not_die_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(nvml, "BACKOFF_MAX_S", 0.01)

    class Undying(ProbeChild):
        """Hangs in the kernel, as it were: SIGKILL does nothing to it until `let_go`."""

        def kill(self) -> None:
            self._close_pipe()

        def let_go(self) -> None:
            super().kill()

    children: list[Undying] = []

    def spawn(*arguments: Any) -> Undying:
        children.append(Undying(*arguments))
        return children[-1]

    told: list[str] = []

    def report(event: str, /, **_fields: object) -> None:
        told.append(event)
        if event == "devices.probe_held_back":
            held_back.set()

    held_back = asyncio.Event()
    cards = FakeCards(tmp_path, card(), hang="nvmlInit")
    engine = RecordingEngine()
    options = ProbeOptions(environment=cards.environment, first_deadline_s=0.3)
    source = NvmlDevices(engine, asyncio.get_running_loop(), options, report=report, spawn=spawn)
    source.open()
    async with asyncio.timeout(DEADLINE_S):
        await held_back.wait()
    assert len(children) == nvml.ABANDONED_MAX
    assert all(child.alive for child in children)
    assert "abandoned probes hang" in source.checks().detail
    cards.show(card())
    held_back.clear()
    children[0].let_go()
    await gone(children[0].pid)
    await until(lambda: len(children) > nvml.ABANDONED_MAX)
    # The fifth may be too slow for the short deadline as well: then it waits for the next death.
    for child in children[1:]:
        child.let_go()
        await gone(child.pid)
    source.close()
    for child in children:
        child.let_go()
    await source.stop()
    assert told.count("devices.probe_started") >= nvml.ABANDONED_MAX + 1


async def test_closing_lets_go_of_the_driver_and_opening_finds_it_anew(
    tmp_path: Path, opened: Open
) -> None:
    cards = FakeCards(tmp_path, card())
    source, engine = opened(cards)
    await engine.first(ReadingsTaken)
    seen = len(engine.events)
    source.close()
    await gone(cards.importers()[0])
    assert len(engine.events) == seen, "closing is the core's wish: it is told nothing"
    status = source.status()
    assert (status.nvml_supported, status.sampled_ns, source.telemetry()) == (False, None, {})
    assert source.checks()[:2] == (False, True)
    source.take_reading()
    source.open()
    assert source.checks().first_probe_running
    await engine.first(DevicesFound, after=seen)
    await engine.first(ReadingsTaken, good, seen)


async def test_letting_go_in_the_middle_of_an_answer_is_heeded(tmp_path: Path) -> None:
    def react(event: object) -> None:
        if isinstance(event, DevicesFound):
            source.close()

    engine = RecordingEngine(react)
    cards = FakeCards(tmp_path, card())
    options = ProbeOptions(environment=cards.environment)
    source = NvmlDevices(engine, asyncio.get_running_loop(), options)
    source.open()
    await engine.first(DevicesFound)
    await gone(cards.importers()[0])
    await source.stop()
    assert engine.of(ReadingsTaken) == []


async def test_the_probe_inherits_its_pipe_and_nothing_else(tmp_path: Path, opened: Open) -> None:
    with (tmp_path / "secret").open("w") as secret:
        # As a descriptor that a service manager has passed: not closed on exec by itself.
        os.set_inheritable(secret.fileno(), True)
        cards = FakeCards(tmp_path, card())
        _, engine = opened(cards)
        await engine.first(ReadingsTaken)
    (pid,) = cards.importers()
    found = {
        int(number): os.readlink(f"/proc/{pid}/fd/{number}")
        for number in os.listdir(f"/proc/{pid}/fd")
    }
    assert found[0].startswith("socket:")
    assert found[1] == "/dev/null"
    assert set(found) == {0, 1, 2}
    facts = read_stat(pid)
    assert facts is not None
    assert facts.ppid == os.getpid()
    assert os.getsid(pid) == pid, "the terminal's signals are not for it"


async def test_the_probe_ignores_what_ends_the_daemon(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(tmp_path, card())
    source, engine = opened(cards, period_s=3_600)
    await engine.first(ReadingsTaken)
    (pid,) = cards.importers()
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    source.take_reading()
    await engine.first(ReadingsTaken, lambda _taken: len(engine.of(ReadingsTaken)) == 2)
    assert cards.importers() == [pid]


HOLD = """
import asyncio, uvloop
from gpuorchd.devices.child import ProbeChild
from gpuorchd.devices.nvml import NvmlDevices, ProbeOptions
from tests.support.recording_engine import RecordingEngine
from gpuorchd.core.events import ReadingsTaken

async def main():
    engine = RecordingEngine()
    NvmlDevices(engine, asyncio.get_running_loop(), ProbeOptions(period_s=0.05)).open()
    await engine.first(ReadingsTaken)
    print("read", flush=True)
    await asyncio.sleep(3600)

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("hang", [None, "nvmlDeviceGetMemoryInfo_v2"])
def test_the_probe_dies_with_the_daemon(tmp_path: Path, hang: str | None) -> None:
    cards = FakeCards(tmp_path, card())
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], env=cards.environment, cwd=ROOT, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"read\n"
        (pid,) = cards.importers()
        if hang is not None:
            # It will not look at its pipe any more; only the kernel can tell it.
            cards.show(card(), hang=hang)
            wait_until(lambda: cards.hanging() == [pid], "the probe hangs")
        holder.kill()
    wait_until(lambda: has_ended(pid), "the probe is gone")


def test_the_probe_imports_next_to_nothing() -> None:
    listed = subprocess.run(
        [sys.executable, "-c",
         "import sys; before = set(sys.modules); import gpuorchd.devices.probe; "
         "print(*sorted(set(sys.modules) - before))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(listed.stdout.split())
    heavy = {"pynvml", "asyncio", "uvloop", "msgpack", "msgspec", "aiohttp", "structlog",
             "prometheus_client", "dataclasses", "inspect", "subprocess"}  # fmt: skip
    assert not loaded & heavy
    ours = {name for name in loaded if name.startswith("gpuorchd.")}
    assert ours == {
        "gpuorchd.devices", "gpuorchd.devices.driver", "gpuorchd.devices.probe",
        "gpuorchd.devices.probe_wire", "gpuorchd.devices.proc_facts",
    }  # fmt: skip


async def test_a_daemons_own_process_never_loads_the_binding(tmp_path: Path, opened: Open) -> None:
    cards = FakeCards(tmp_path, card())
    _, engine = opened(cards)
    await engine.first(ReadingsTaken)
    assert os.getpid() not in cards.importers()
    assert "pynvml" not in sys.modules
