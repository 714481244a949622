"""The daemon dies where it hurts most: between a change and its answer, and while it starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_restart import CARD, Client
from tests.support.daemon_process import ANSWER_DEADLINE_S
from tests.support.dying import Dying
from tests.support.init import Init

WRITTEN, START = "settings written", "start"


@pytest.fixture
def dying(tmp_path: Path) -> Dying:
    return Dying(tmp_path / "site")


@pytest.fixture
def manager(tmp_path: Path, dying: Dying) -> Iterator[Init]:
    with Init(tmp_path, *CARD, environ=dying.environ) as found:
        yield found


@pytest.fixture
def client(manager: Init) -> Iterator[Client]:
    found = Client(manager.socket)
    assert found.lease(1, 6_000)["granted"]
    yield found
    found.close()


def died(manager: Init) -> int:
    assert manager.process is not None
    return manager.process.wait(ANSWER_DEADLINE_S)


@pytest.mark.parametrize("op", ["policy_set", "cordon"])
def test_a_change_that_is_on_the_disk_is_answered_and_not_made_again(
    manager: Init, dying: Dying, client: Client, op: str
) -> None:
    before = client.ask(2, "policy_get")["revision"]
    fields: dict[str, object] = (
        {"changes": {"default_memory_mb": 512}, "if_revision": before}
        if op == "policy_set"
        else {"gpu": 0, "reason": "hot"}
    )
    dying.at(WRITTEN)
    client.send(3, op, **fields)
    assert died(manager) == -9
    assert dying.has_come(WRITTEN)
    # Twice: the one who goes on may be killed before it is asked again.
    manager.start()
    client.resumed()
    manager.restart()
    client.go_on()
    reply = client.ask(3, op, **fields)
    assert reply["ok"], reply
    if op == "policy_set":
        assert (reply["revision"], "note" in reply) == (before + 1, False)
        assert reply["policy"]["default_memory_mb"] == 512
    else:
        assert {**reply, "id": 0} == {
            "id": 0,
            "ok": True,
            "gpu": reply["gpu"],
            "index": 0,
            "cordoned": True,
        }
        assert client.ask(4, "gpu_info")["gpus"][0]["state"] == "cordoned"
    assert client.ask(5, "policy_get")["revision"] == before + (op == "policy_set")


def test_safe_mode_that_nobody_could_announce_is_announced(
    manager: Init, dying: Dying, client: Client
) -> None:
    dying.at(WRITTEN)
    client.send(2, "policy_set", changes={"safe_mode": True})
    assert died(manager) == -9
    manager.start()
    client.go_on()
    event = client.message()
    assert (event["event"], event["reason"]) == ("lease.revoking", "SAFE_MODE")
    reply = client.ask(2, "policy_set", changes={"safe_mode": True})
    # As the change itself is answered, not as one that SAFE_MODE lets nobody make.
    assert (reply["safe_mode"], "note" in reply) == (True, False)


def test_a_start_that_fails_leaves_everything_to_the_next(
    manager: Init, dying: Dying, client: Client
) -> None:
    manager.kill()
    dying.at(START)
    manager.start()
    assert died(manager) == 70
    assert dying.has_come(START)
    assert "a start that fails on purpose" in manager.output()
    manager.start()
    # It was greeted by the one that failed, too.
    client.resumed()
    client.go_on()
    assert len(client.ask(2, "whoami")["leases"]) == 1
