"""A change of settings that is in force is answered by the next daemon, and not made again."""

from __future__ import annotations

import pytest

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core.model import ConnectionId
from tests.support.succeeding import Core, answers
from tests.support.world import card

ONE = ConnectionId(1)
CHANGE = ev.PolicyChangeAsked(ONE, "p", {"default_memory_mb": 512}, 1, {})


@pytest.fixture
def core() -> Core:
    """One simulated card, and a client that holds some of it."""
    core = Core(card(0, 10_000, drain_ms=100))
    core.arrive(1)
    core.lease(1, "held", 1_000)
    return core


def written(core: Core, event: ev.Event) -> tuple[dict[str, object], ev.Settled]:
    """Have a change written by a daemon that dies before it knows; say what the file tells."""
    (effect,) = [x for x in core.submit(event) if isinstance(x, fx.PersistSettings)]
    asked = effect.document["asked"]
    assert isinstance(asked, dict)
    settled = ev.Settled(asked["epoch"], asked["connection"], asked["request_id"], asked["answer"])
    return dict(effect.document), settled


def is_new(core: Core, request_id: str) -> bool:
    """Whether the server takes a request for a new one."""
    return request_id not in (core.client(1).repeats or {})


def test_a_policy_is_not_set_twice_and_answers_as_if_it_had_been(core: Core) -> None:
    document, settled = written(core, CHANGE)
    policy = core.state.policy.changed({"default_memory_mb": 512}, {})
    core.restart(policy=policy, settled=settled)
    revision = core.state.revision
    # As a new request it would be a conflict: the policy is at 2 already.
    (effect,) = core.repeat(1, "p")
    assert isinstance(effect, fx.AnswerPolicy)
    assert effect == (ONE, "p", None)
    assert core.state.revision == revision == document["revision"]


def test_a_cordon_is_answered_with_its_gpu(core: Core) -> None:
    _, settled = written(core, ev.CordonAsked(ONE, "c", 0, "hot"))
    core.restart(cordons={"GPU-0": "hot"}, settled=settled)
    answer = {"gpu": "GPU-0", "index": 0, "cordoned": True}
    assert core.repeat(1, "c") == [fx.Answer(ONE, "c", answer)]
    _, settled = written(core, ev.CordonAsked(ONE, "u", "GPU-0", None))
    core.restart(cordons={}, settled=settled)
    assert core.repeat(1, "u") == [fx.Answer(ONE, "u", {**answer, "cordoned": False})]
    # And so it would have been answered by the daemon that did it.
    core.submit(ev.CordonAsked(ONE, "c2", 0, "hot"))
    assert answers(core.submit(ev.SettingsPersisted())) == [fx.Answer(ONE, "c2", answer)]


def test_an_answer_that_was_recorded_stands(core: Core) -> None:
    _, settled = written(core, CHANGE)
    core.submit(ev.SettingsPersisted())
    core.restart(settled=settled._replace(answer={"another": "answer"}))
    (effect,) = core.repeat(1, "p")
    assert isinstance(effect, fx.AnswerPolicy)


@pytest.mark.parametrize("other", ["epoch", "connection"])
def test_it_answers_nobody_else(core: Core, other: str) -> None:
    _, settled = written(core, CHANGE)
    if other == "epoch":
        settled = settled._replace(epoch="of another table")
    else:
        settled = settled._replace(conn=ConnectionId(99))
    core.restart(settled=settled)
    assert is_new(core, "p")


def test_what_had_not_reached_the_disk_is_done_when_it_is_asked_again(core: Core) -> None:
    written(core, CHANGE)
    core.restart()
    assert is_new(core, "p")
    written(core, CHANGE)
    (effect,) = answers(core.submit(ev.SettingsPersisted()))
    assert isinstance(effect, fx.AnswerPolicy)
