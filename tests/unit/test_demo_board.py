"""What the demo makes of its agents' reports: who is where, and whether too much was ever held."""

from __future__ import annotations

from typing import Any

from libclient.demo.board import CPU, DEAD, GPU, WAITS, Board


def report(agent: str, kind: str, at: float, **fields: Any) -> dict[str, Any]:
    return {"agent": agent, "kind": kind, "at": at, **fields}


def grant(agent: str, at: float, memory_mb: int, waited_s: float = 0.0) -> dict[str, Any]:
    fields = {"lease_id": f"l-{agent}", "memory_mb": memory_mb, "gpu": 0, "waited_s": waited_s}
    return report(agent, "gpu", at, **fields)


def test_what_two_held_at_once_is_added_up() -> None:
    board = Board()
    board.take(grant("analyst", 1.0, 1_000))
    board.take(grant("scout", 2.0, 2_000))
    board.take(report("analyst", "releasing", 3.0, reason=None))
    board.take(grant("critic", 3.0, 1_500))
    assert board.peak_mb() == 3_500


def test_memory_that_went_on_from_one_to_the_next_does_not_count_twice() -> None:
    board = Board()
    board.take(grant("analyst", 1.0, 1_000))
    board.killed("analyst", 2.0)
    board.take(grant("scout", 2.0, 1_000))
    assert board.peak_mb() == 1_000
    assert board.actors["analyst"].place == DEAD


def test_a_wait_is_told_once_and_its_place_kept_up() -> None:
    board = Board()
    board.take(report("scout", "asking", 1.0, memory_mb=4_096, wait_s=300))
    first = board.take(report("scout", "waiting", 1.1, position=2, eta_s=None))
    again = board.take(report("scout", "waiting", 1.5, position=1, eta_s=None))
    assert first == "scout waits for 4 GiB, 1 ahead"
    assert again is None
    actor = board.actors["scout"]
    assert (actor.place, actor.story, actor.since_s) == (WAITS, "for 4 GiB, next", 1.1)


def test_a_refusal_that_repeats_itself_is_counted_and_told_once() -> None:
    board = Board()
    reports = []
    for at in (1.0, 3.0):
        board.take(report("scout", "asking", at, memory_mb=4_096, wait_s=300))
        reports.append(
            board.take(report("scout", "cpu", at, reason="SAFE_MODE", detail="host: no"))
        )
    assert reports == ["scout goes on with the CPU: SAFE_MODE: no", None]
    assert board.refusals == {"SAFE_MODE": 2}
    assert [actor.member.agent for actor in board.at(CPU)] == ["scout"]


def test_the_first_grant_after_a_moment_is_found() -> None:
    board = Board()
    board.take(grant("scout", 1.0, 1_000))
    assert board.granted_since("scout", 1.0) is None
    assert "after 3s" in (board.take(grant("scout", 4.0, 1_000, waited_s=3.0)) or "")
    assert board.granted_since("scout", 1.0) == 4.0
    assert [actor.place for actor in board.at(GPU)] == [GPU]


def test_a_lease_that_was_taken_is_held_no_more() -> None:
    board = Board()
    board.take(grant("balancer", 1.0, 1_000))
    board.take(report("balancer", "revoking", 2.0, reason="SAFE_MODE", deadline_s=2.0))
    assert board.actors["balancer"].place == GPU
    board.take(report("balancer", "lost", 4.0, reason="revoked: SAFE_MODE"))
    assert board.actors["balancer"].held_mb == 0
    assert board.revoked == 1
