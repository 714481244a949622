"""`python -m tests.sim --seed N --steps N`: play a seed's story again, or look for new ones."""

from __future__ import annotations

import argparse
import itertools
import time

from tests.sim.simulator import Simulation


def main() -> None:
    """Play the seed that is named, or one after the other from it on."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--steps", type=int, default=12_500, help="events of one seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds; 0: without end")
    options = parser.parse_args()
    seeds = itertools.count(options.seed)
    for seed in itertools.islice(seeds, options.seeds or None):
        started_s = time.monotonic()
        simulation = Simulation(seed)
        simulation.run(options.steps)
        took_s = time.monotonic() - started_s
        print(
            f"seed {seed}: {simulation.steps} steps in {simulation.acts} acts, "
            f"{simulation.grants} grants, {simulation.denials} denials, {took_s:.1f} s"
        )


if __name__ == "__main__":
    main()
