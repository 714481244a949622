"""The acts of the demo, and what has to be true in each.

An act changes something and waits until the change has shown itself. `Expectation`s are what the
demo stands for; one that does not hold fails the demo, and the acts go on.
"""

from __future__ import annotations

from typing import NamedTuple

from libclient.demo.board import ASKS, AWAY, CPU, GPU, WAITS
from libclient.demo.roster import ROSTER
from libclient.demo.stage import Stage
from libclient.sizes import format_duration, format_memory

# How long holders have to yield when SAFE_MODE is switched on.
GRACE_S = 2.0
# For what happens within milliseconds on an idle machine.
SOON_S = 8.0
# Between two starts, so that they ask in the order of the roster and it can be followed.
STAGGER_S = 0.35
# Long enough to read the screen.
READ_S = 2.6

VICTIM = "fact_checker"
HEIR = "newsreader"


class Expectation(NamedTuple):
    """Something the demo stands for, and whether it held."""

    held: bool
    text: str


class Story:
    """One performance."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.expectations: list[Expectation] = []
        self.kills: list[tuple[str, str, float]] = []
        self.safe_mode_refusals = 0

    def perform(self) -> None:
        """Play all acts."""
        self.stage.call("policy_set", changes={"safe_mode_grace_s": GRACE_S})
        self._roster_starts()
        self._holder_is_killed()
        self._turns_are_taken()
        self._safe_mode_on()
        self._safe_mode_off()
        self._curtain()

    @property
    def passed(self) -> bool:
        """Whether everything held."""
        return all(expectation.held for expectation in self.expectations)

    def _expect(self, held: bool, text: str) -> None:
        self.expectations.append(Expectation(held, text))
        if not held:
            self.stage.show.say(f"EXPECTED, AND NOT SO: {text}")

    def _place(self, agent: str) -> str:
        return self.stage.board.actors[agent].place

    def _roster_starts(self) -> None:
        stage = self.stage
        total = sum(entry.limit_mb(stage.scale) for entry in ROSTER)
        stage.show.begin(
            f"1 of 5: the roster starts; its limits add up to {format_memory(total)}, "
            f"the card has {format_memory(stage.capacity_mb)}"
        )
        for entry in ROSTER:
            stage.enter(entry.agent)
            stage.pump(lambda agent=entry.agent: self._place(agent) not in (AWAY, ASKS), SOON_S)  # type: ignore[misc]  # the name is bound now
            stage.watch(STAGGER_S)
        others = [entry.agent for entry in ROSTER if entry.agent != HEIR]
        fits = stage.pump(lambda: all(self._place(agent) == GPU for agent in others), SOON_S)
        self._expect(fits, "all that fits is granted, in the order of priority")
        on_cpu = stage.pump(lambda: stage.board.refusals.get("TIMEOUT", 0) > 0, SOON_S)
        self._expect(on_cpu, f"{HEIR}, for whose vision model there is no room, knows it: TIMEOUT")
        waits = stage.pump(lambda: self._place(HEIR) == WAITS, SOON_S)
        self._expect(waits, f"{HEIR} asks again, for less, and waits: the whole does not fit")
        stage.watch(READ_S)

    def _holder_is_killed(self) -> None:
        stage = self.stage
        stage.show.begin("2 of 5: a holder is killed; its memory goes to the next one")
        held_mb = stage.board.actors[VICTIM].held_mb
        pid, killed_s = stage.kill(VICTIM)
        stage.show.say(f"SIGKILL for {VICTIM} (pid {pid}), which holds {format_memory(held_mb)}")
        got = stage.pump(lambda: stage.board.granted_since(HEIR, killed_s) is not None, SOON_S)
        granted_s = stage.board.granted_since(HEIR, killed_s)
        if got and granted_s is not None:
            gap_s = granted_s - killed_s
            self.kills.append((VICTIM, HEIR, gap_s))
            stage.show.say(f"{HEIR} has its memory {gap_s * 1e3:.0f} ms after the kill")
        self._expect(got, f"{HEIR} gets memory of the killed {VICTIM}")
        stage.watch(READ_S)

    def _turns_are_taken(self) -> None:
        stage = self.stage
        stage.show.begin("3 of 5: one comes back, and turns are taken")
        stage.enter(VICTIM)
        waits = stage.pump(lambda: self._place(VICTIM) == WAITS, SOON_S)
        self._expect(waits, f"{VICTIM} starts again and has to wait for its turn")
        for done, following in (("analyst", VICTIM), ("critic", "analyst")):
            stage.show.say(f"{done} comes to the end of its articles")
            stage.finish(done)
            served = stage.pump(lambda name=following: self._place(name) == GPU, SOON_S)  # type: ignore[misc]  # the name is bound now
            self._expect(served, f"{following} gets what {done} gives back")
            stage.pump(lambda name=done: self._place(name) == WAITS, SOON_S)  # type: ignore[misc]  # the name is bound now
        stage.watch(READ_S / 2)

    def _safe_mode_on(self) -> None:
        stage = self.stage
        stage.show.begin(f"4 of 5: SAFE_MODE is switched on; {format_duration(GRACE_S)} to yield")
        before = stage.board.refusals.get("SAFE_MODE", 0)
        reply = stage.call("policy_set", changes={"safe_mode": True})
        self._expect(reply["safe_mode"] is True, "SAFE_MODE is on")
        denied = stage.pump(lambda: len(stage.board.at(CPU)) == len(ROSTER), GRACE_S + SOON_S)
        self._expect(denied, "every agent goes on with the CPU, and knows why: SAFE_MODE")
        stubborn = ROSTER[-1].agent
        self._expect(stage.board.revoked > 0, f"{stubborn}, which does not yield, loses its lease")
        change = stage.call("policy_set", changes={"default_memory_mb": 1_024})
        unchanged = change.get("note") == "SAFE_MODE" and change["revision"] == reply["revision"]
        self._expect(unchanged, "the policy is read-only meanwhile, and the answer says so")
        stage.watch(READ_S)
        self.safe_mode_refusals = stage.board.refusals.get("SAFE_MODE", 0) - before
        empty = not stage.board.at(GPU)
        self._expect(empty and self.safe_mode_refusals > 0, "nobody is granted anything meanwhile")

    def _safe_mode_off(self) -> None:
        stage = self.stage
        stage.show.begin("5 of 5: SAFE_MODE is switched off; the agents ask again")
        reply = stage.call("policy_set", changes={"safe_mode": False})
        self._expect(reply["safe_mode"] is False, "SAFE_MODE is off")
        full = stage.pump(
            lambda: (
                len(stage.board.at(GPU)) >= len(ROSTER) - 2
                and len(stage.board.at(GPU)) + len(stage.board.at(WAITS)) == len(ROSTER)
            ),
            SOON_S,
        )
        self._expect(full, "leases are granted again")
        stage.watch(READ_S)

    def _curtain(self) -> None:
        stage = self.stage
        stage.show.begin("the end: every process is ended")
        # Free again by the daemon's own account, too: nothing of the demo is left on the card.
        free = stage.wait_until_free(SOON_S)
        self._expect(free, "when all have ended, all of the memory is free again")
        peak_mb = stage.board.peak_mb()
        self._expect(
            peak_mb <= stage.capacity_mb and stage.promised_mb <= stage.capacity_mb,
            f"never more than the card has: at most {format_memory(peak_mb)} of "
            f"{format_memory(stage.capacity_mb)} held, "
            f"{format_memory(stage.promised_mb)} leased and draining in {stage.looks} looks",
        )
        stage.stop()
        self._expect(stage.daemon_code == 0, "the daemon ends in order")
