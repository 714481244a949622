"""Every error of the contract that a client can bring about, with the field and message it has."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon_process import DaemonProcess, running_daemon
from tests.support.wire import FrameClient, packed

ASK = {"agent": "a", "min_memory_mb": 1}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
    folder = tmp_path_factory.mktemp("d")
    with running_daemon(folder, "--simulate", "1x24576", environ=environ) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[FrameClient]:
    with FrameClient(daemon.socket) as client:
        yield client


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("agent", ""),
        ("agent", "x" * 129),
        ("agent", "a\nb"),
        ("agent", "\x1b[31m"),
        ("agent", "\u202e"),
        ("agent", 5),
        ("agent", None),
        ("min_memory_mb", -1),
        ("min_memory_mb", 16_777_217),
        ("min_memory_mb", 1.0),
        ("min_memory_mb", True),
        ("min_memory_mb", "1"),
        ("min_memory_mb", None),
        ("gpus", 0),
        ("gpus", 65),
        ("exclusive", 1),
        ("share_pct", 0),
        ("share_pct", 101),
        ("priority", "urgent"),
        ("priority", 1),
        ("wait_s", -0.1),
        ("wait_s", 604_801),
        ("wait_s", float("nan")),
        ("wait_s", float("inf")),
        ("wait_s", False),
        ("devices", []),
        ("devices", [0] * 65),
        ("devices", [1.5]),
        ("devices", [True]),
        ("devices", 0),
        ("preemptible", "yes"),
        ("expected_s", 0),
        ("expected_s", float("inf")),
        ("purpose", "x" * 257),
        ("purpose", "a\x00b"),
        ("labels", {"x" * 65: "y"}),
        ("labels", {"x": "y" * 257}),
        ("labels", {"x": "\r"}),
        ("labels", {"\t": "x"}),
        ("labels", {str(n): "x" for n in range(17)}),
        ("labels", {"x": 1}),
        ("labels", {1: "x"}),
        ("labels", []),
        ("colour", "red"),
        ("token", "x"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("op", ["lease", "explain"])
def test_a_wrong_field_is_named_and_changes_nothing(
    client: FrameClient, op: str, field: str, value: object
) -> None:
    reply = client.ask(op, **{**ASK, field: value})
    assert reply["error"]["code"] == "bad_request"
    assert reply["error"]["field"] == field
    assert field in reply["error"]["message"]
    assert reply["error"]["message"].isprintable()
    assert client.ask("whoami")["leases"] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("agent", "x" * 128),
        ("agent", "\u00fcber \u4e2d"),
        ("min_memory_mb", 0),
        ("gpus", 64),
        ("wait_s", 604_800),
        ("wait_s", 0.5),
        ("devices", [0]),
        ("expected_s", 1e-9),
        ("expected_s", 1.7e308),
        ("purpose", "x" * 256),
        ("purpose", ""),
        ("labels", {str(n): "x" * 256 for n in range(16)}),
        ("labels", {}),
        ("share_pct", None),
        ("priority", None),
        ("devices", None),
        ("labels", None),
    ],
    ids=repr,
)
def test_a_field_at_its_bound_is_taken(client: FrameClient, field: str, value: object) -> None:
    assert client.ask("explain", **{**ASK, field: value})["ok"] is True


@pytest.mark.parametrize(
    ("op", "fields", "field"),
    [
        ("lease", {}, "agent"),
        ("release", {}, "token"),
        ("release", {"token": ""}, "token"),
        ("renew", {"token": 1}, "token"),
        ("cancel", {}, "request_id"),
        ("cancel", {"request_id": True}, "request_id"),
        ("seal", {"signal": "KILL"}, "signal"),
        ("allocations", {"limit": 0}, "limit"),
        ("allocations", {"limit": 1_001}, "limit"),
        ("allocations", {"after": "nonsense"}, "after"),
        ("queue", {"after": "x"}, "after"),
        ("subscribe", {"topics": []}, "topics"),
        ("subscribe", {"topics": ["weather.*"]}, "topics"),
        ("subscribe", {"topics": "lease"}, "topics"),
        ("unsubscribe", {}, "subscription"),
        ("policy_set", {}, "changes"),
        ("policy_set", {"changes": []}, "changes"),
        ("policy_set", {"changes": {}, "if_revision": -1}, "if_revision"),
        ("policy_set", {"changes": {"colour": 1}}, "colour"),
        ("cordon", {}, "gpu"),
        ("cordon", {"gpu": 0, "reason": "a\nb"}, "reason"),
        ("revoke", {"lease_id": "x", "grace_s": 86_401}, "grace_s"),
        ("health", {"verbose": True}, "verbose"),
        ("hello", {"protocol": "1"}, "protocol"),
    ],
)
def test_a_wrong_field_of_any_op_is_named(
    client: FrameClient, op: str, fields: dict[str, object], field: str
) -> None:
    reply = client.ask(op, **fields)
    assert (reply["error"]["code"], reply["error"]["field"]) == ("bad_request", field)


@pytest.mark.parametrize("op", [None, 5, True, ["health"], b"health"], ids=repr)
def test_an_op_that_is_no_text_is_a_bad_request(client: FrameClient, op: object) -> None:
    client.send_all([{"id": 1, "op": op}, {"id": 2}])
    for number in (1, 2):
        reply = client.reply()
        assert (reply["id"], reply["error"]["code"]) == (number, "bad_request")
        assert reply["error"]["field"] == "op"


def test_an_unknown_op_is_named_shortened(client: FrameClient) -> None:
    reply = client.ask("x\n" * 10_000)
    assert reply["error"]["code"] == "unknown_op"
    assert reply["error"]["message"].isprintable()
    assert len(reply["error"]["message"]) < 500
    assert client.ask("health")["ok"] is True


def test_a_token_that_no_lease_has_is_unknown(client: FrameClient) -> None:
    grant = client.ask("lease", **ASK)
    client.ask("release", token=grant["token"])
    for op in ("release", "renew", "reattach"):
        for token in (grant["token"], "0" * 32, "x"):
            assert client.ask(op, token=token)["error"]["code"] == "unknown_token"


def test_a_lease_belongs_to_its_connection(daemon: DaemonProcess, client: FrameClient) -> None:
    token = client.ask("lease", **ASK)["token"]
    with FrameClient(daemon.socket) as other:
        assert other.ask("release", token=token)["error"]["code"] == "not_owner"
        assert other.ask("renew", token=token)["error"]["code"] == "not_owner"
    assert client.ask("release", token=token)["released"] is True


def test_what_does_not_wait_cannot_be_cancelled(client: FrameClient) -> None:
    grant_id = client.send("lease", **ASK)
    assert client.reply()["granted"] is True
    for target in (grant_id, 999, "x"):
        assert client.ask("cancel", request_id=target)["error"]["code"] == "unknown_request"


def test_what_is_not_there_is_not_found(client: FrameClient) -> None:
    for devices in (["GPU-none"], [2**63 - 1]):
        reply = client.ask("lease", **ASK, devices=devices)
        assert (reply["error"]["code"], reply["error"]["field"]) == ("not_found", "devices")
    assert client.ask("cordon", gpu=7)["error"]["code"] == "not_found"
    assert client.ask("uncordon", gpu="GPU-none")["error"]["code"] == "not_found"
    assert client.ask("revoke", lease_id="none-1")["error"]["code"] == "not_found"
    assert client.ask("unsubscribe", subscription=1)["error"]["code"] == "not_found"


def test_a_revision_that_has_passed_is_a_conflict(client: FrameClient) -> None:
    revision = client.ask("policy_get")["revision"]
    reply = client.ask("policy_set", changes={}, if_revision=revision + 1)
    assert (reply["error"]["code"], reply["error"]["retryable"]) == ("conflict", True)


ADMIN_REQUESTS = (
    {"op": "policy_set", "changes": {"default_memory_mb": 77}},
    {"op": "cordon", "gpu": 0},
    {"op": "uncordon", "gpu": 0},
    {"op": "revoke", "lease_id": "none-1"},
)
ASK_AS = """
import json, os, socket, sys
uid, gid, groups, path = json.loads(sys.argv[1])
os.setgroups(groups); os.setgid(gid); os.setuid(uid)
s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(path)
s.sendall(sys.stdin.buffer.read()); s.shutdown(socket.SHUT_WR)
while data := s.recv(65536):
    sys.stdout.write(data.decode())
"""


def answers_to(
    path: str, uid: int, gid: int, groups: list[int], requests: list[dict[str, object]]
) -> list[dict[str, Any]]:
    """Send lines as another user, and return the replies."""
    who = json.dumps([uid, gid, groups, path])
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(
        [sys.executable, "-c", ASK_AS, who],
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="gpuorchd-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_admin_ops_are_for_root_and_the_admin_group(open_folder: Path) -> None:
    flags = ("--simulate", "1x1000", "--admin-group", "4711", "--socket-mode", "0666")
    requests = [dict(request) for request in ADMIN_REQUESTS]
    with running_daemon(open_folder, *flags) as daemon:
        path = str(daemon.socket)
        strangers = answers_to(path, 4000, 4000, [4001], [*requests, {"op": "whoami"}])
        codes = [reply["error"]["code"] for reply in strangers[:-1]]
        assert codes == ["forbidden"] * 4
        assert (strangers[-1]["uid"], strangers[-1]["admin"]) == (4000, False)
        for gid, groups in ((4711, []), (4000, [4711]), (4000, [*range(5000, 5300), 4711])):
            members = answers_to(path, 4000, gid, groups, [*requests, {"op": "whoami"}])
            assert [reply["ok"] for reply in members[:3]] == [True, True, True]
            assert members[3]["error"]["code"] == "not_found"
            assert members[4]["admin"] is True


def test_requests_that_come_while_it_stops_are_answered_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("s")
    with (
        running_daemon(folder, "--simulate", "1x1000") as daemon,
        FrameClient(daemon.socket) as holder,
        FrameClient(daemon.socket) as slow,
    ):
        holder.ask("lease", agent="a", exclusive=True)
        waiting = holder.send("lease", agent="a", exclusive=True, wait_s=60)
        holder.event("lease.queued")
        # A reader that is behind keeps the daemon for the second that it gives its replies.
        slow.fill(packed({"id": 1, "op": "policy_get"}))
        daemon.process.terminate()
        late = holder.reply()
        assert (late["id"], late["error"]["code"]) == (waiting, "shutting_down")
        assert late["error"]["retryable"] is True
        assert holder.event("daemon.stopping")["seq"] > 0
        assert holder.ask("health")["error"]["code"] == "shutting_down"
        assert daemon.wait(10) == 0
        assert holder.rest() == []


def test_the_socket_type_is_a_stream(daemon: DaemonProcess) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
        pytest.raises(OSError, match="rong type"),
    ):
        sock.connect(str(daemon.socket))
