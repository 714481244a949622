"""The seeded simulation as a test: every seed plays its story to a good end."""

from __future__ import annotations

import pytest

from tests.sim.simulator import Simulation

# 8 seeds of 15,000 events: 120,000 in all.
SEEDS = tuple(range(1, 9))
STEPS = 15_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_story_breaks_no_promise_and_comes_to_rest(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    simulation = Simulation(seed)
    simulation.run(STEPS)
    with capsys.disabled():
        print(
            f"\nseed {seed}: {simulation.steps} steps in {simulation.acts} acts, "
            f"{simulation.grants} grants, {simulation.denials} denials"
        )
    assert simulation.steps >= STEPS
    assert simulation.grants > STEPS // 50, "a story in which hardly anything is granted"


def test_the_seeds_make_a_hundred_thousand_steps() -> None:
    assert len(SEEDS) * STEPS >= 100_000


def test_a_seed_tells_the_same_story_again() -> None:
    first, second = Simulation(99), Simulation(99)
    first.run(600)
    second.run(600)
    assert list(first.stage.trace) == list(second.stage.trace)
    assert first.steps == second.steps
