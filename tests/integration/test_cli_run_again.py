"""`gpuorch run` while the daemon that it waits on goes away and comes back."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli_process import start_gpuorch
from tests.support.daemon_process import ANSWER_DEADLINE_S
from tests.support.proxy import FakeDaemon, Script, Served, grant_fields

WAIT_S = 60.0
AS_IF_LEFT_S = 0.3


def outcome(daemon_path: str, *words: str) -> tuple[int, str, str]:
    run = start_gpuorch(Path(daemon_path), "run", "--mem", "2GiB", *words, "--", "echo", "ran")
    with run:
        out, err = run.communicate(timeout=ANSWER_DEADLINE_S)
    return run.returncode, out.decode(), err.decode()


def queued(conn: Served) -> dict[str, Any]:
    """Let a lease wait, for a while that can be told from none."""
    request = conn.expect("lease")
    conn.event("lease.queued", request_id=request["id"], position=1, ahead=0, eta_s=None)
    time.sleep(AS_IF_LEFT_S)
    return request


def goes_away(conn: Served) -> None:
    queued(conn)


def stops(conn: Served) -> None:
    conn.refuse(queued(conn), "shutting_down", retryable=True)


def grants(conn: Served) -> None:
    conn.reply(conn.expect("lease"), **grant_fields())
    conn.reply(conn.expect("seal"))
    conn.wait_for_end()


@pytest.mark.parametrize("leave", [goes_away, stops])
def test_a_wait_goes_on_with_the_next_daemon_for_what_is_left_of_it(
    tmp_path: Path, leave: Script
) -> None:
    with FakeDaemon(tmp_path, leave, grants) as daemon:
        code, out, err = outcome(daemon.path, "--wait", f"{WAIT_S:g}s")
        assert (code, out) == (0, "ran\n"), err
        first, second = (one for one in daemon.requests if one["op"] == "lease")
    assert first["wait_s"] == WAIT_S
    assert WAIT_S / 2 < second["wait_s"] <= WAIT_S - AS_IF_LEFT_S
    without = {"id", "wait_s"}
    assert {name: first[name] for name in first.keys() - without} == {
        name: second[name] for name in second.keys() - without
    }


def test_without_a_wait_a_daemon_that_goes_away_is_told_at_once(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path, goes_away, grants) as daemon:
        code, out, err = outcome(daemon.path, "--fallback", "fail")
        assert (code, out) == (69, ""), err
        assert daemon.ops() == ["lease"]


def test_a_daemon_that_does_not_come_back_costs_the_wait_and_no_more(tmp_path: Path) -> None:
    left = threading.Event()

    def leave(conn: Served) -> None:
        queued(conn)
        Path(daemon.path).unlink()
        left.set()

    with FakeDaemon(tmp_path, leave) as daemon:
        start_s = time.monotonic()
        code, out, err = outcome(daemon.path, "--wait", "1500ms", "--fallback", "fail")
        took_s = time.monotonic() - start_s
        assert left.is_set()
    assert (code, out) == (69, ""), err
    assert "NO_DAEMON" in err
    assert took_s >= 1.5


def test_a_daemon_that_closes_every_connection_is_not_asked_for_ever(tmp_path: Path) -> None:
    def closes(conn: Served) -> None:
        conn.request()

    with FakeDaemon(tmp_path, closes) as daemon:
        code, out, err = outcome(daemon.path, "--wait", "10m", "--fallback", "fail")
        assert (code, out) == (69, ""), err
        assert len(daemon.requests) == 5


def test_ctrl_c_ends_the_search_for_a_daemon(tmp_path: Path) -> None:
    left = threading.Event()

    def leave(conn: Served) -> None:
        queued(conn)
        Path(daemon.path).unlink()
        left.set()

    with FakeDaemon(tmp_path, leave) as daemon:
        words = ("run", "--mem", "2GiB", "--wait", "10m", "--", "echo", "ran")
        with start_gpuorch(Path(daemon.path), *words) as run:
            assert left.wait(20)
            run.send_signal(signal.SIGINT)
            out, _ = run.communicate(timeout=ANSWER_DEADLINE_S)
    assert (run.returncode, out) == (130, b"")
