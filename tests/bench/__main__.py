"""Run every benchmark in turn: `python -m tests.bench [--json] [NAME ...]`.

Ends with 1 where an aim was missed. With `--json` each benchmark's line is one JSON object.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.support.daemon_process import ROOT

BENCHMARKS = ("pair", "burst", "hostile", "idle_holders", "pair_managed", "restart")


def main() -> int:
    """Run what was named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    worst = 0
    for name in options.names or BENCHMARKS:
        command = [sys.executable, "-m", f"tests.bench.{name}"]
        command += ["--json"] if options.json else []
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False)
        worst = max(worst, abs(done.returncode))
    return min(worst, 1)


if __name__ == "__main__":
    sys.exit(main())
