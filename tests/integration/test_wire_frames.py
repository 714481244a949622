"""Frame mode as the contract has it: what is sent wrongly, in pieces, at once, or twice."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgpack
import pytest

from tests.support.daemon_process import DaemonProcess, running_daemon
from tests.support.wire import LENGTH, FrameClient, framed, packed

HEALTH = packed({"id": 1, "op": "health"})
# What the contract allows a client to announce.
LIMIT = 65_536


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    environ = {"GPUORCH_SIMULATE_DRAIN_S": "0"}
    folder = tmp_path_factory.mktemp("d")
    with running_daemon(folder, "--simulate", "2x24576", environ=environ) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[FrameClient]:
    with FrameClient(daemon.socket) as client:
        yield client


def nested(levels: int) -> bytes:
    """A request whose `changes` hold one array inside another."""
    return b"\x83\xa2id\x01\xa2op\xaapolicy_set\xa7changes\x81\xa1a" + b"\x91" * levels + b"\x01"


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(b"\x01", id="a number"),
        pytest.param(b"\x91\x01", id="an array"),
        pytest.param(b"\x81\x01\x01", id="a map with a number as key"),
        pytest.param(b"\x81\xa2id", id="cut short"),
        pytest.param(msgpack.packb({"id": 1, "op": "health"}) + b"\x01", id="trailing bytes"),
        pytest.param(b"\x81\xa2op\xa1\xff", id="text that is not UTF-8"),
        pytest.param(nested(100), id="nesting of 100"),
        pytest.param(nested(60_000), id="nesting of 60,000"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map of four billion pairs"),
        pytest.param(bytes(LIMIT), id="the largest frame, of zeros"),
    ],
)
def test_what_is_no_message_is_answered_bad_frame_and_closed(
    daemon: DaemonProcess, client: FrameClient, payload: bytes
) -> None:
    client.send_bytes(framed(payload) + HEALTH)
    (reply,) = client.rest()
    assert (reply["id"], reply["ok"], reply["error"]["code"]) == (None, False, "bad_frame")
    assert reply["error"]["retryable"] is False
    with FrameClient(daemon.socket) as other:
        assert other.ask("health")["ok"] is True


def test_a_frame_of_no_bytes_is_a_bad_frame(client: FrameClient) -> None:
    client.send_bytes(LENGTH.pack(0))
    (reply,) = client.rest()
    assert reply["error"]["code"] == "bad_frame"


@pytest.mark.parametrize("announced", [LIMIT + 1, 0x1FFF_FFFF, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_a_frame_over_the_limit_is_refused_before_its_body_comes(
    client: FrameClient, announced: int
) -> None:
    client.send_bytes(LENGTH.pack(announced))
    (reply,) = client.rest()
    assert reply["error"]["code"] == "frame_too_large"
    assert str(announced) in reply["error"]["message"]
    assert str(LIMIT) in reply["error"]["message"]


def test_a_body_that_comes_after_the_refusal_is_not_kept(client: FrameClient) -> None:
    client.send_bytes(LENGTH.pack(0x8000_0000))
    # The daemon stops reading it soon: it is cut off, or the socket is full.
    assert client.fill(bytes(65_536)) < 8_000_000


def test_the_largest_frame_is_taken(client: FrameClient) -> None:
    plain = msgpack.packb({"id": 1, "op": "hello", "client": ""})
    # 65,536 bytes of a request that is wrong for one field only.
    filling = LIMIT - len(plain) - 2
    message = {"id": 1, "op": "hello", "client": "x" * filling}
    payload = msgpack.packb(message)
    assert len(payload) == LIMIT
    client.send_bytes(framed(payload))
    reply = client.reply()
    assert (reply["error"]["code"], reply["error"]["field"]) == ("bad_request", "client")
    assert client.ask("health")["ok"] is True


def test_a_request_that_comes_byte_by_byte_is_answered(client: FrameClient) -> None:
    for byte in HEALTH:
        client.send_bytes(bytes([byte]))
    assert client.reply()["status"] == "ok"


def test_a_half_frame_holds_nobody_up(daemon: DaemonProcess, client: FrameClient) -> None:
    client.send_bytes(HEALTH[:-1])
    with FrameClient(daemon.socket) as other:
        began = time.monotonic()
        assert other.ask("lease", agent="a", min_memory_mb=1)["granted"] is True
        assert time.monotonic() - began < 2.0
    assert client.is_silent()
    client.send_bytes(HEALTH[-1:])
    assert client.reply()["status"] == "ok"


def test_a_client_that_leaves_within_a_frame_leaves_nothing(daemon: DaemonProcess) -> None:
    for _ in range(50):
        with FrameClient(daemon.socket) as client:
            client.send_bytes(HEALTH + HEALTH[:7])
    with FrameClient(daemon.socket) as client:
        assert client.ask("allocations")["allocations"] == []


def test_pipelined_requests_are_answered_in_their_order(client: FrameClient) -> None:
    ops = ["health", "hello", "nonsense", "whoami", "queue", "metrics", "gpu_info", "ready"]
    messages = [{"id": number, "op": ops[number % len(ops)]} for number in range(500)]
    client.send_all(messages)
    assert [client.reply()["id"] for _ in messages] == list(range(500))


def test_changes_that_are_kept_on_disk_are_answered_in_their_place(client: FrameClient) -> None:
    changes = [{"default_memory_mb": 100 + number} for number in range(5)]
    messages: list[dict[str, object]] = []
    for change in changes:
        messages.append({"id": len(messages), "op": "policy_set", "changes": change})
        messages.append({"id": len(messages), "op": "policy_get"})
    client.send_all(messages)
    replies = [client.reply() for _ in messages]
    assert [reply["id"] for reply in replies] == list(range(len(messages)))
    shown = [reply["policy"]["default_memory_mb"] for reply in replies]
    assert shown == [100, 100, 101, 101, 102, 102, 103, 103, 104, 104]


def test_a_waiting_lease_holds_up_no_other_request(client: FrameClient) -> None:
    holding = client.ask("lease", agent="a", exclusive=True, gpus=2)
    waiting = client.send("lease", agent="a", exclusive=True, wait_s=60)
    assert client.ask("health")["ok"] is True
    assert client.event("lease.queued")["request_id"] == waiting
    client.ask("release", token=holding["token"])
    late = client.reply()
    assert (late["id"], late["granted"]) == (waiting, True)


@pytest.mark.parametrize("request_id", [0, 1, 2**63 - 1, "a", "x" * 64, "\u00fc\u4e2d", " ", "\n"])
def test_an_id_comes_back_as_it_was_sent(client: FrameClient, request_id: object) -> None:
    assert client.ask("health", id=request_id)["id"] == request_id


@pytest.mark.parametrize(
    "request_id",
    [None, -1, 2**63, 2**64 - 1, "", "x" * 65, 1.0, True, b"a", [1], {"a": 1}],
    ids=repr,
)
def test_an_id_that_cannot_be_used_is_refused_and_not_echoed(
    client: FrameClient, request_id: object
) -> None:
    client.send("health", id=request_id)
    reply = client.reply()
    assert reply["id"] is None
    assert (reply["error"]["code"], reply["error"]["field"]) == ("bad_request", "id")
    assert client.ask("health")["ok"] is True


def test_a_request_without_an_id_is_refused(client: FrameClient) -> None:
    client.send_bytes(packed({"op": "health"}))
    reply = client.reply()
    assert (reply["id"], reply["error"]["field"]) == (None, "id")


@pytest.mark.parametrize("again", ["health", "lease", "nonsense", "release", "metrics"])
def test_the_id_of_a_living_lease_cannot_be_used_again(client: FrameClient, again: str) -> None:
    grant = client.ask("lease", id="mine", agent="a", min_memory_mb=1)
    client.send(again, id="mine")
    reply = client.reply()
    assert reply["id"] is None
    assert (reply["error"]["code"], reply["error"]["field"]) == ("bad_request", "id")
    assert client.ask("release", id="other", token=grant["token"])["released"] is True
    assert client.ask("health", id="mine")["ok"] is True


def test_the_id_of_a_waiting_request_cannot_be_used_again(client: FrameClient) -> None:
    client.ask("lease", agent="a", exclusive=True, gpus=2)
    client.send("lease", id="w", agent="a", exclusive=True, wait_s=60)
    client.send("health", id="w")
    assert client.reply()["error"]["field"] == "id"
    assert client.ask("cancel", request_id="w")["cancelled"] is True
    assert client.reply()["note"] == "CANCELLED"


def test_a_number_and_its_text_are_two_ids(client: FrameClient) -> None:
    client.ask("lease", id=7, agent="a", min_memory_mb=1)
    assert client.ask("health", id="7")["id"] == "7"


def test_the_end_of_input_ends_a_frame_connection_at_once(
    daemon: DaemonProcess, client: FrameClient
) -> None:
    client.ask("lease", agent="a", min_memory_mb=1)
    client.socket.shutdown(1)
    assert client.rest() == []
    with FrameClient(daemon.socket) as other:
        assert other.ask("allocations")["allocations"] == []
