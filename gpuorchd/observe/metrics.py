"""Metrics: counted in plain integers while the daemon works, made into text when somebody asks.

    AnswerGrant, AnswerDenial, Announce ─▶ Counts ─┐
    state, other rooms' figures (Sources) ─────────┴▶ families ─▶ exposition ─▶ text, slice by slice

What a lease pays is a few additions; no object of prometheus_client is touched outside a scrape.
A scrape gives the loop its turn after every few dozen samples, so that leases go on meanwhile;
scrapes at the same time share one rendering. The number of series is bounded (see
`tally.BoundedNames`).
"""

from __future__ import annotations

import asyncio
from types import ModuleType

from gpuorchd.core.effects import Announce, AnswerDenial, AnswerGrant
from gpuorchd.core.model import Note
from gpuorchd.observe import metric_table as table
from gpuorchd.observe.families import Families
from gpuorchd.observe.loading import load
from gpuorchd.observe.loop_lag import LoopLag
from gpuorchd.observe.sources import ObservedEngine, Sources
from gpuorchd.observe.survey import take_survey
from gpuorchd.observe.tally import NS_PER_S, BoundedNames, Histogram
from libclient.wire.vocabulary import EVENTS

# Samples made into text before the loop gets its turn: about half a millisecond.
SLICE_SAMPLES = 50
# Agents with a series of their own, and for how long one that holds nothing keeps it.
AGENT_NAMES = 64
AGENT_IDLE_NS = 6 * 3_600 * NS_PER_S
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

OUTCOME_OF = {Note.TIMEOUT: "timeout", Note.CANCELLED: "cancelled"}


class Counts:
    """What has been counted since the start. Integers only rise."""

    __slots__ = (
        "agents",
        "denials",
        "drain",
        "events",
        "grant",
        "granted",
        "lag",
        "started_ns",
        "wait",
        "withheld_mb",
    )

    def __init__(self, started_ns: int) -> None:
        self.started_ns = started_ns
        self.granted = 0
        self.withheld_mb = 0
        self.denials = dict.fromkeys((note.value for note in Note), 0)
        self.events = dict.fromkeys(EVENTS, 0)
        self.wait = Histogram(table.WAIT_BOUNDS_S)
        self.grant = Histogram(table.GRANT_BOUNDS_S)
        self.drain = Histogram(table.DRAIN_BOUNDS_S)
        self.lag = Histogram(table.LAG_BOUNDS_S)
        self.agents = BoundedNames(AGENT_NAMES, AGENT_IDLE_NS)

    def lease_outcomes(self) -> dict[str, int]:
        """Lease requests by how they were decided."""
        outcomes = {"granted": self.granted, "denied": 0, "timeout": 0, "cancelled": 0}
        for note in Note:
            outcomes[OUTCOME_OF.get(note, "denied")] += self.denials[note.value]
        return outcomes


class Metrics:
    """Count what an engine does and render it on demand.

    Make it after the rooms that answer have registered: the grant histogram then covers the answer.
    `sources` may be filled in later, until the first scrape.
    """

    def __init__(self, engine: ObservedEngine, sources: Sources | None = None) -> None:
        self._engine = engine
        self.sources = Sources() if sources is None else sources
        self.counts = Counts(engine.now_ns())
        self.lag = LoopLag(self.counts.lag)
        self._rendering: asyncio.Task[bytes] | None = None
        engine.on(AnswerGrant, self._on_grant)
        engine.on(AnswerDenial, self._on_denial)
        engine.on(Announce, self._on_announce)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to probe the loop's lag. Call it once, when the daemon answers."""
        # Nobody was there to be told of it: it is an event of the daemon's all the same.
        self.counts.events["daemon.started"] += 1
        self.lag.start(loop)

    async def stop(self) -> None:
        """End the probe and a rendering that is under way; whoever awaits it is cancelled."""
        self.lag.stop()
        if self._rendering is not None:
            self._rendering.cancel()
            await asyncio.wait([self._rendering])

    async def render(self) -> bytes:
        """Render the page in the text format, `CONTENT_TYPE`; a caller may be cancelled alone."""
        if self._rendering is None:
            self._rendering = asyncio.create_task(self._render(), name="metrics-rendering")
            self._rendering.add_done_callback(self._rendered)
        return await asyncio.shield(self._rendering)

    async def render_text(self) -> str:
        """Render the page as text, for the socket's `metrics`."""
        return (await self.render()).decode()

    def _rendered(self, task: asyncio.Task[bytes]) -> None:
        self._rendering = None

    async def _render(self) -> bytes:
        exposition: ModuleType = await load("gpuorchd.observe.exposition")
        survey = await take_survey(self._engine.state, self._engine.now_ns())
        families = Families(self._engine, self.counts, self.sources, survey)
        page: list[bytes] = []
        for part in families.slices():
            unsliced = 0
            for spec, rows in part():
                if not rows:
                    continue
                for start in range(0, len(rows), SLICE_SAMPLES):
                    chunk = rows[start : start + SLICE_SAMPLES]
                    page.append(exposition.expose(spec, chunk, with_header=start == 0))
                    unsliced += len(chunk)
                    if unsliced >= SLICE_SAMPLES:
                        unsliced = 0
                        await asyncio.sleep(0)
            await asyncio.sleep(0)
        return b"".join(page)

    def _on_grant(self, effect: AnswerGrant) -> None:
        counts = self.counts
        counts.granted += 1
        lease = effect.lease
        counts.wait.add(lease.waited_ns)
        counts.grant.add(self._engine.now_ns() - lease.granted_ns)

    def _on_denial(self, effect: AnswerDenial) -> None:
        self.counts.denials[effect.denial.note.value] += 1

    def _on_announce(self, effect: Announce) -> None:
        if effect.private:
            return
        counts = self.counts
        name = effect.name
        if name in counts.events:
            counts.events[name] += 1
        if name == "lease.drained":
            drain_s = effect.fields.get("drain_s")
            if isinstance(drain_s, int | float):
                counts.drain.add(round(drain_s * NS_PER_S))
        elif name == "lease.withheld":
            memory_mb = effect.fields.get("memory_mb")
            if isinstance(memory_mb, int):
                counts.withheld_mb += memory_mb
