"""Every scenario of this folder, played and compared with what its text expects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.scenario import Script
from tests.support.scenario_text import read_steps, write_steps

FOLDER = Path(__file__).parent
REWRITE = "REWRITE_SCENARIOS"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_what_happens_is_what_the_text_says(path: Path) -> None:
    outcomes = Script(read_steps(path.read_text())).play()
    if os.environ.get(REWRITE):
        path.write_text(write_steps(outcomes))
        return
    differing = [
        f"{step.line}\n  expected: {sorted(step.expected)}\n  happened: {sorted(shown)}"
        for step, shown in outcomes
        if sorted(step.expected) != sorted(shown)
    ]
    assert not differing, "\n".join(differing)


def test_there_are_scenarios() -> None:
    assert len(list(FOLDER.glob("*.txt"))) > 15


def test_a_wrong_expectation_is_seen() -> None:
    steps = read_steps("card A 1000\nprocess p\nconnect a p\nlease a r1 mem=10\n    granted r1\n")
    outcomes = Script(steps).play()
    assert any(sorted(step.expected) != sorted(shown) for step, shown in outcomes)
