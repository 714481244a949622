"""The tools that are at hand when something is wrong: socat and nc speak to the daemon."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import system_packages
from tests.support.daemon_process import DaemonProcess, running_daemon

# socat and nc end by themselves when the daemon has answered and closed.
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    # What one test leased must not be missing in the next.
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
    folder = tmp_path_factory.mktemp("d")
    with running_daemon(folder, "--simulate", "1x24576", environ=environ) as daemon:
        yield daemon


@pytest.fixture(params=["socat", "nc"])
def tool(request: pytest.FixtureRequest, daemon: DaemonProcess) -> list[str]:
    program = system_packages.require(request.param)
    if request.param == "socat":
        return [program, "-t5", "-", f"UNIX-CONNECT:{daemon.socket}"]
    return [program, "-NU", str(daemon.socket)]


def test_a_bare_op_prints_readable_json(tool: list[str]) -> None:
    (reply,) = _said_to(tool, "gpu_info\n")
    assert reply["ok"] is True
    assert reply["available"] is True
    assert [gpu["memory_total_mb"] for gpu in reply["gpus"]] == [24_576]


def test_the_end_of_input_ends_the_last_line(tool: list[str]) -> None:
    (reply,) = _said_to(tool, "health")
    assert reply["status"] == "ok"


def test_several_requests_are_answered_in_their_order(tool: list[str]) -> None:
    replies = _said_to(tool, '{"op":"hello","id":1}\nwhoami\n{"op":"queue","id":"q"}\n')
    assert [reply["id"] for reply in replies] == [1, None, "q"]


def test_a_waiting_request_is_cancelled_at_the_end_of_input(tool: list[str]) -> None:
    first = '{"op":"lease","id":"a","agent":"x","exclusive":true}\n'
    second = '{"op":"lease","id":"b","agent":"x","exclusive":true,"wait_s":600}\n'
    messages = _said_to(tool, first + second)
    replies = {message["id"]: message for message in messages if "event" not in message}
    assert replies["a"]["granted"] is True
    assert (replies["b"]["granted"], replies["b"]["note"]) == (False, "CANCELLED")


def test_a_mistake_is_answered_with_its_field(tool: list[str]) -> None:
    (reply,) = _said_to(tool, '{"op":"lease","agent":"x","memory":"4GiB"}\n')
    assert reply["error"]["code"] == "bad_request"
    assert reply["error"]["field"] == "memory"


def _said_to(tool: list[str], text: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        tool, input=text, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
