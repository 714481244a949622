"""`python -m libclient.demo`: the demo from start to summary.

Exit code 0: everything held; 1: something did not; 130: interrupted. In every case all that was
started has ended.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

from libclient.demo.show import Show
from libclient.demo.stage import CannotStart, Stage
from libclient.demo.story import Story
from libclient.errors import GpuOrchError
from libclient.sizes import format_duration

INTERRUPTED = 130


def main() -> int:
    """Run the demo and return its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    show = Show()
    try:
        with Stage(show) as stage:
            with show:
                stage.open()
                show.say(f"the daemon is ready: {stage.describe()}")
                if not stage.simulated:
                    show.say("the agents lease and allocate nothing: their bytes are back at once")
                story = Story(stage)
                story.perform()
            summary(show, story)
    except KeyboardInterrupt:
        show.screen.line("interrupted; everything that was started has ended")
        return INTERRUPTED
    except (CannotStart, GpuOrchError) as fault:
        show.screen.line(f"the demo cannot go on: {fault}")
        return 1
    return 0 if story.passed else 1


def summary(show: Show, story: Story) -> None:
    """Tell what happened, and what held."""
    stage, screen = story.stage, show.screen
    board, paint = stage.board, screen.paint
    screen.line(f"\n{paint('what happened', 'bold')}, on {stage.describe()}")
    worst = max(board.grants, key=lambda grant: grant[2], default=None)
    facts: dict[str, object] = {
        "leases granted": len(board.grants),
        "longest wait": "none"
        if worst is None
        else f"{format_duration(round(worst[2], 1))}, by {worst[0]}",
    }
    for victim, heir, gap_s in story.kills:
        facts["holders killed"] = f"1: {victim}; {heir} had its memory {gap_s * 1e3:.0f} ms later"
    facts["went on with the CPU"] = (
        ", ".join(f"{reason} {count}" for reason, count in board.refusals.items()) or "nobody"
    )
    facts["SAFE_MODE"] = (
        f"{story.safe_mode_refusals} refused while it was on, {board.revoked} lease revoked"
    )
    facts["took"] = format_duration(round(stage.elapsed_s, 1))
    screen.facts(facts)
    screen.line()
    for held, text in story.expectations:
        mark = paint("ok", "green") if held else paint("FAILED", "bold red")
        screen.line(f"{mark}  {text}")
    verdict = "everything held" if story.passed else "NOT everything held"
    screen.line(f"\n{paint(verdict, 'bold green' if story.passed else 'bold red')}")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
