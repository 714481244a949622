"""The journal tells the story of one lease."""

from __future__ import annotations

from gpuorchd.observe.journal import Journal
from tests.support.observed import SECRET, ObservedEngine


def test_the_story_of_a_lease_is_told_in_order_and_with_its_causes() -> None:
    engine = ObservedEngine()
    journal = Journal(engine)
    conn = engine.ask("scout")
    engine.ask("critic")
    engine.release(conn)
    engine.pass_s(1)
    (lease_id,) = {
        entry.fields["lease_id"]
        for entry in journal.turn(2)
        if entry.fields.get("agent") == "scout"
    }
    story = journal.story(str(lease_id))
    assert [entry.name for entry in story] == [
        "lease.granted",
        "lease.released",
        "lease.draining",
        "lease.drained",
    ]
    causes = [entry.cause_id for entry in story]
    assert causes == sorted(causes)
    assert causes[1] == causes[2], "the release and the drain are of one turn"
    assert story[0].time_ns < story[-1].time_ns
    assert "lease.granted lease_id=" in str(story[0])
    assert SECRET not in "".join(map(str, story))


def test_the_journal_is_bounded_and_keeps_the_newest() -> None:
    engine = ObservedEngine()
    journal = Journal(engine, entries=10)
    for _ in range(20):
        engine.release(engine.ask())
        engine.pass_s(1)
    assert len(journal) == 10
    assert journal.turn(engine.turns - 1)[0].name == "lease.drained"
