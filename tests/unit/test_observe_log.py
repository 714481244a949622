"""The log: what reaches a reader, what never does, and what it may cost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gpuorchd.core.effects import Announce
from gpuorchd.observe import log as log_module
from gpuorchd.observe.events import CATALOGUE, Level
from gpuorchd.observe.log import CHATTY_PER_S, Log, choose_form
from tests.support.observed import SECRET, ObservedEngine, until

WITHHELD = {"lease_id": "l1", "agent": "critic", "memory_mb": 5, "gpus": [], "pids": [7]}


@dataclass
class Pipe:
    """A pipe as the log's output, and what came out of it."""

    reader: int
    writer: int
    seen: bytes = field(default=b"")

    def drain(self) -> str:
        """Read what there is now; return all that was ever read."""
        while True:
            try:
                data = os.read(self.reader, 65_536)
            except BlockingIOError:
                return self.seen.decode()
            if not data:
                return self.seen.decode()
            self.seen += data

    def entries(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.drain().splitlines()]

    def names(self) -> list[object]:
        return [entry["event"] for entry in self.entries()]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    pipe = Pipe(reader, writer)
    yield pipe
    os.close(writer)
    if pipe.reader >= 0:
        os.close(pipe.reader)


def test_an_announced_lease_is_logged_with_the_turn_that_caused_it(pipe: Pipe) -> None:
    engine = ObservedEngine()
    log = Log(form="json", fd=pipe.writer)
    log.attach(engine)
    turn = engine.turns + 1
    conn = engine.ask("scout")
    engine.release(conn)
    log.close()
    granted, released, draining = pipe.entries()
    assert (granted["event"], released["event"]) == ("lease.granted", "lease.released")
    assert draining["event"] == "lease.draining"
    assert granted["agent"] == "scout"
    assert granted["level"] == "info"
    assert granted["cause_id"] == turn
    assert released["cause_id"] == draining["cause_id"] == turn + 1
    assert str(granted["timestamp"]).endswith("Z")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpuorchd.observe.log_lines", None)


@pytest.mark.usefixtures("no_library")
def test_without_its_library_the_log_is_plain_and_says_so(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    log.event("daemon.stopped")
    log.close()
    stopped, failed = pipe.entries()
    assert (stopped["event"], stopped["level"]) == ("daemon.stopped", "info")
    assert (failed["event"], failed["level"]) == ("log.library_failed", "error")
    assert "log_lines" in str(failed["error"])


@pytest.mark.usefixtures("no_library")
async def test_without_its_library_the_log_is_written_while_the_daemon_runs(pipe: Pipe) -> None:
    log = Log(form="journal", fd=pipe.writer)
    log.start(asyncio.get_running_loop())
    log.event("daemon.stopped")
    await until(lambda: "log.library_failed" in pipe.drain())
    assert pipe.drain().splitlines()[0].startswith('<6>{"event": "daemon.stopped"')
    log.close()


def test_nothing_is_written_before_the_log_is_started_and_nothing_is_lost(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    log.event("daemon.stop_asked", signal="SIGTERM")
    assert pipe.drain() == ""
    log.close()
    assert pipe.names() == ["daemon.stop_asked"]


async def test_a_started_log_writes_by_itself(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    log.event("daemon.started", version="1", epoch="e", pid=1, socket="/s", safe_mode=False)
    log.start(asyncio.get_running_loop())
    await until(lambda: "daemon.started" in pipe.drain())
    log.event("daemon.stopped")
    await until(lambda: "daemon.stopped" in pipe.drain())
    log.close()


def test_chatty_events_are_bounded_in_rate_and_the_rest_is_counted(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    for number in range(CHATTY_PER_S + 150):
        log.event("lease.denied", agent=f"a{number}", note="QUOTA", waited_s=0.0)
    log.close()
    *lines, last = pipe.entries()
    assert [entry["event"] for entry in lines] == ["lease.denied"] * CHATTY_PER_S
    assert (last["event"], last["kind"], last["count"]) == ("log.suppressed", "lease.denied", 150)
    assert log.suppressed_total == 150


def test_announced_leases_beyond_the_rate_are_counted_too(pipe: Pipe) -> None:
    engine = ObservedEngine()
    log = Log(form="json", fd=pipe.writer)
    log.attach(engine)
    for _ in range(CHATTY_PER_S + 30):
        engine.release(engine.ask())
    log.close()
    entries = pipe.entries()
    suppressed = [entry for entry in entries if entry["event"] == "log.suppressed"]
    told = {entry["kind"]: entry["count"] for entry in suppressed}
    assert told == {"lease.granted": 30, "lease.released": 30, "lease.draining": 30}
    assert sum(entry["event"] == "lease.granted" for entry in entries) == CHATTY_PER_S


async def test_a_new_second_has_lines_again(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "WINDOW_S", 0.01)
    log = Log(form="json", fd=pipe.writer)
    log.start(asyncio.get_running_loop())
    for _ in range(CHATTY_PER_S + 1):
        log.event("lease.denied", agent="a", note="QUOTA", waited_s=0.0)
    await until(lambda: log.suppressed_total == 1)
    log.event("lease.denied", agent="late", note="QUOTA", waited_s=0.0)
    await until(lambda: '"late"' in pipe.drain())
    log.close()


def test_warnings_are_never_suppressed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        log = Log(form="json", fd=file.fileno())
        for _ in range(10 * CHATTY_PER_S):
            log.event("lease.withheld", **WITHHELD)
        log.close()
    names = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert names == ["lease.withheld"] * (10 * CHATTY_PER_S)


def test_one_busy_event_leaves_the_lines_of_others_alone(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    for _ in range(10 * CHATTY_PER_S):
        log.event("lease.denied", agent="a", note="QUOTA", waited_s=0.0)
    log.event("lease.released", lease_id="l9", agent="a")
    log.close()
    assert "lease.released" in pipe.names()


def test_only_declared_fields_are_written_and_the_others_are_named_once(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    for _ in range(3):
        log.event("lease.revoked", lease_id="l1", agent="a", reason="r", token=SECRET)
    log.event("lease.invented", token=SECRET)
    log.close()
    assert SECRET not in pipe.drain()
    undeclared = [entry for entry in pipe.entries() if entry["event"] == "log.undeclared"]
    assert [(entry["kind"], entry["fields"]) for entry in undeclared] == [
        ("lease.revoked", ["token"]),
        ("lease.invented", ["token"]),
    ]


def test_no_event_declares_a_field_for_a_secret() -> None:
    fields = {field for kind in CATALOGUE.values() for field in kind.fields}
    assert not [name for name in fields if re.search("token|secret|payload|env", name)]


def test_what_goes_to_an_owner_alone_is_not_logged(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    log.announce(Announce("lease.queued", {"agent": "a", "position": 1}, private=True))
    log.close()
    assert pipe.drain() == ""


@pytest.mark.parametrize("form", ["console", "json", "journal"])
def test_a_value_cannot_break_out_of_its_line(pipe: Pipe, form: str) -> None:
    log = Log(form=form, fd=pipe.writer)
    evil = "x\n<3>event=forged \x1b[31m\u2028\x9b"
    log.event("gpu.cordoned", gpu="GPU-0", index=0, reason=evil)
    log.close()
    text = pipe.drain()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", text)
    events = [line for line in text.splitlines() if not line.startswith("    ")]
    assert len(events) == 1
    assert "gpu.cordoned" in events[0]


def test_the_journal_form_is_key_and_value_behind_a_priority(pipe: Pipe) -> None:
    log = Log(form="journal", fd=pipe.writer)
    log.event("gpu.cordoned", gpu="GPU-0", index=0, reason="fan is loud")
    log.event("lease.withheld", **WITHHELD)
    log.close()
    assert pipe.drain().splitlines() == [
        '<6>event=gpu.cordoned cause_id=0 gpu=GPU-0 index=0 reason="fan is loud"',
        "<4>event=lease.withheld cause_id=0 lease_id=l1 agent=critic memory_mb=5 gpus=[] pids=[7]",
    ]


def test_a_traceback_stays_readable_on_a_console(pipe: Pipe) -> None:
    log = Log(form="console", fd=pipe.writer)
    log.event("daemon.bug_met", what="a callback", error="Traceback:\n  here\nValueError: no")
    log.close()
    first, *rest = pipe.drain().splitlines()
    assert "daemon.bug_met" in first
    assert rest == ["    Traceback:", "      here", "    ValueError: no"]


def test_a_long_value_is_cut(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    log.event("daemon.loop_failed", what="w", error="e" * 100_000)
    log.close()
    (entry,) = pipe.entries()
    assert str(entry["error"]).endswith("e[cut]")
    assert len(str(entry["error"])) < 10_000


@pytest.mark.parametrize(("on_terminal", "coloured"), [(True, True), (False, False)])
def test_colours_are_for_terminals_alone(pipe: Pipe, on_terminal: bool, coloured: bool) -> None:
    reader, terminal = os.openpty()
    try:
        log = Log(form="console", fd=terminal if on_terminal else pipe.writer)
        log.event("daemon.hangup_ignored")
        log.close()
        text = os.read(reader if on_terminal else pipe.reader, 4_096)
        assert b"daemon.hangup_ignored" in text
        assert (b"\x1b[" in text) == coloured
        assert choose_form(terminal, {}) == "console"
    finally:
        os.close(reader)
        os.close(terminal)


def test_the_form_is_chosen_by_what_the_output_is(pipe: Pipe) -> None:
    status = os.fstat(pipe.writer)
    stream = f"{status.st_dev}:{status.st_ino}"
    assert choose_form(pipe.writer, {"JOURNAL_STREAM": stream}) == "journal"
    assert choose_form(pipe.writer, {"JOURNAL_STREAM": "1:1"}) == "json"
    assert choose_form(pipe.writer, {}) == "json"


def test_a_less_severe_event_is_left_out_below_the_level(pipe: Pipe) -> None:
    log = Log(form="json", level="warning", fd=pipe.writer)
    log.event("daemon.hangup_ignored")
    log.event("lease.withheld", **WITHHELD)
    log.close()
    assert pipe.names() == ["lease.withheld"]


async def test_a_reader_that_takes_nothing_holds_up_nobody_and_is_told_what_it_missed(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "QUEUE_MAX", 100)
    monkeypatch.setattr(log_module, "RETRY_S", 0.01)
    log = Log(form="json", fd=pipe.writer)
    log.start(asyncio.get_running_loop())
    # The pipe takes 64 KiB, the queue 100 events; the rest is lost, and the loop runs on.
    sent = 0
    while log.lost_total < 50:
        log.event("daemon.loop_failed", what="w", error="e" * 4_000)
        sent += 1
        if sent % 50 == 0:
            await asyncio.sleep(0.01)
    await until(lambda: "log.lost" in pipe.drain())
    log.close()
    names = pipe.names()
    told = sum(int(str(x["count"])) for x in pipe.entries() if x["event"] == "log.lost")
    assert told == log.lost_total
    assert names.count("daemon.loop_failed") == sent - log.lost_total


async def test_a_reader_that_is_gone_is_no_failure(pipe: Pipe) -> None:
    log = Log(form="json", fd=pipe.writer)
    os.close(pipe.reader)
    pipe.reader = -1
    log.start(asyncio.get_running_loop())
    log.event("daemon.hangup_ignored")
    await until(lambda: log._output.broken)
    log.event("daemon.hangup_ignored")
    log.close()


def test_closing_waits_no_longer_than_it_says_for_a_reader_that_takes_nothing(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "CLOSE_S", 0.02)
    log = Log(form="json", fd=pipe.writer)
    for _ in range(100):
        log.event("daemon.loop_failed", what="w", error="e" * 4_000)
    log.close()
    assert log._output.pending


def test_levels_are_those_of_the_command_line() -> None:
    assert [level.name.lower() for level in Level] == ["debug", "info", "warning", "error"]
    with pytest.raises(ValueError, match="log form"):
        Log(form="xml")
