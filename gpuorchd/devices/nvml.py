"""Real GPUs: when the probe is asked, what its silence means, and what the core is told.

One probe child is asked at a time, one question at a time: every second, four times as often while
a lease drains or anybody waits, and at once when the core wants a reading. An answer becomes
`DevicesFound` (where the GPUs are not those known before) and `ReadingsTaken`. A probe that dies,
answers nonsense or misses its deadline is killed and abandoned, every known GPU's reading has then
failed, and a new probe starts after a growing pause. One that hangs in the kernel does not die of
that; so many of those and no new one is started until one is gone. A driver that is not there is
asked for again from time to time, with a fresh probe.

Nothing here blocks, opens a device or loads the driver's library: that happens in the child only.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from gpuorchd.core.events import DevicesFound, DevicesLost, ReadingsTaken
from gpuorchd.core.model import DeviceUuid
from gpuorchd.core.state import State
from gpuorchd.devices.answers import BadAnswer, Sample, read_answer
from gpuorchd.devices.child import ProbeChild, Spawn
from gpuorchd.devices.findings import Findings
from gpuorchd.devices.mps import MpsWatch
from gpuorchd.devices.probe_wire import SAMPLE
from gpuorchd.devices.telemetry import (
    NS_PER_S,
    CallHistogram,
    DeviceChecks,
    DeviceEngine,
    DeviceStatus,
    Report,
    Telemetry,
    report_nothing,
)

# Abandoned probes that have not died. Each holds some memory and a place in the process table.
ABANDONED_MAX = 4
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 60.0
# Between the starts of two readings that the core wants: many leases that end together must not
# keep the probe and the loop busy with nothing else.
GAP_S = 0.005
# How long the end waits for killed probes to be gone.
STOP_S = 1.0

NO_GPU_SHOWN = "the NVIDIA driver shows no GPU"


class ProbeOptions(NamedTuple):
    """How the probe is asked. `environment` None is the daemon's own.

    `telemetry` False reads only what admission needs.
    """

    telemetry: bool = True
    period_s: float = 1.0
    hurried_period_s: float = 0.25
    deadline_s: float = 2.0
    # Starting Python, loading the library and initialising a driver that has slept takes seconds.
    first_deadline_s: float = 15.0
    # Between two looks for a driver that is not there.
    retry_s: float = 30.0
    environment: Mapping[str, str] | None = None


class NvmlDevices:
    """A `DeviceSource` of the GPUs that NVML shows.

    Make and use it on the main thread only: the probe dies with the thread that started it.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        loop: asyncio.AbstractEventLoop,
        options: ProbeOptions,
        mps: MpsWatch | None = None,
        report: Report = report_nothing,
        spawn: Spawn = ProbeChild,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._options = options
        self._mps = MpsWatch(wanted=False) if mps is None else mps
        self._report = report
        self._spawn = spawn
        self._found = Findings()
        self._child: ProbeChild | None = None
        # Whether the present child has answered yet: its first answer has more time.
        self._warm = False
        self._dying: set[ProbeChild] = set()
        self._starved = False
        self._number = 0
        # When the question that is out was sent; 0 while none is.
        self._asked_ns = 0
        self._last_asked_ns = 0
        self._again = False
        self._deadline: asyncio.TimerHandle | None = None
        # The next question or, while there is no child, the next child.
        self._next: asyncio.TimerHandle | None = None
        self._failed_in_row = 0
        self._calls: defaultdict[str, CallHistogram] = defaultdict(CallHistogram)
        self._all_gone: asyncio.Event | None = None

    def set_options(self, options: ProbeOptions) -> None:
        """Ask otherwise, from the next question on."""
        self._options = options

    def open(self) -> None:
        """Start looking for GPUs."""
        if self._found.opened:
            return
        self._found = Findings(opened=True, probing=True)
        self._failed_in_row = 0
        self._start_child()

    def close(self) -> None:
        """Kill the probe: the driver is let go of at once. Nothing is submitted."""
        self._drop_child()
        self._found = Findings()

    def take_reading(self) -> None:
        """Take one more reading that starts after now."""
        if self._child is None:
            # The first question to the next child starts later than this.
            return
        if self._asked_ns:
            self._again = True
            return
        self._ask_within(GAP_S - (self._engine.now_ns() - self._last_asked_ns) / NS_PER_S)

    def telemetry(self) -> Mapping[DeviceUuid, Telemetry]:
        """Give the newest readings for people."""
        return self._found.telemetry

    def status(self) -> DeviceStatus:
        """Say how the devices are being read."""
        return self._found.status(self._options.telemetry, self._mps.look())

    def checks(self) -> DeviceChecks:
        """Say what readiness needs to know."""
        return self._found.checks()

    def call_stats(self) -> Mapping[str, CallHistogram]:
        """Give durations and failures of the driver's calls by function."""
        return self._calls

    async def stop(self) -> None:
        """Kill what runs and wait a moment for its end; what hangs in the kernel is left behind."""
        self.close()
        if self._dying:
            self._all_gone = asyncio.Event()
            try:
                await asyncio.wait_for(self._all_gone.wait(), STOP_S)
            except TimeoutError:
                self._report("devices.probe_left_behind", count=len(self._dying))
        for child in self._dying:
            child.forget()
        self._dying.clear()

    def answered(self, child: ProbeChild, payload: bytes) -> None:
        """Take an answer of the probe."""
        if child is not self._child:
            return
        if not self._asked_ns:
            self._fail("the probe spoke unasked")
            return
        try:
            sample = read_answer(payload, self._number)
        except BadAnswer as error:
            self._fail(str(error))
            return
        asked_ns = self._end_question(failed=False)
        for label, duration_ns, failed in sample.calls:
            self._calls[label].add(duration_ns, bool(failed))
        self._take(sample, asked_ns)
        if self._child is child and not self._asked_ns and self._next is None:
            self._ask_within(self._pause_s(asked_ns))

    def broke(self, child: ProbeChild, reason: str) -> None:
        """Replace a probe whose pipe has ended."""
        if child is self._child:
            self._fail(f"the probe failed: {reason}")

    def died(self, child: ProbeChild) -> None:
        """Count an abandoned probe that is gone, and start the one that had to wait for it."""
        self._dying.discard(child)
        if not self._dying and self._all_gone is not None:
            self._all_gone.set()
        if self._starved:
            self._starved = False
            self._start_child()

    def _start_child(self) -> None:
        self._next = None
        if not self._found.opened or self._child is not None:
            return
        if len(self._dying) >= ABANDONED_MAX:
            self._starved = True
            self._report("devices.probe_held_back", abandoned=len(self._dying))
            reason = f"{len(self._dying)} abandoned probes hang in the NVIDIA driver"
            self._tell_fault(reason, self._engine.now_ns())
            return
        try:
            self._child = self._spawn(self._loop, self, self._options.environment)
        except OSError as error:
            self._fail(f"the probe cannot be started: {error}")
            return
        self._warm = False
        self._report("devices.probe_started", pid=self._child.pid)
        self._ask()

    def _drop_child(self) -> None:
        """Kill the child, and end all that was to come of it."""
        self._starved = False
        self._again = False
        self._asked_ns = 0
        for timer in (self._deadline, self._next):
            if timer is not None:
                timer.cancel()
        self._deadline = self._next = None
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            if child.alive:
                self._dying.add(child)

    def _ask_within(self, delay_s: float) -> None:
        """Ask after a delay, or sooner where that was planned already; now where it is over."""
        if delay_s <= 0:
            self._ask()
            return
        when = self._loop.time() + delay_s
        if self._next is not None:
            if self._next.when() <= when:
                return
            self._next.cancel()
        self._next = self._loop.call_at(when, self._ask)

    def _ask(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
        child = self._child
        if child is None:
            return
        self._number += 1
        self._again = False
        now_ns = self._asked_ns = self._last_asked_ns = self._engine.now_ns()
        wanted = self._options.telemetry and self._telemetry_is_due(now_ns)
        if not child.ask(self._number, wanted):
            self._fail("the probe takes no question")
            return
        limit_s = self._options.deadline_s if self._warm else self._options.first_deadline_s
        self._deadline = self._loop.call_later(limit_s, self._on_deadline, child, limit_s)

    def _telemetry_is_due(self, now_ns: int) -> bool:
        # Once a period: the readings in between are for admission and are kept short. A tenth less,
        # because a reading begins a little early as often as a little late.
        last_ns = self._found.telemetry_ns
        if last_ns is None:
            return True
        return now_ns - last_ns > 0.9 * self._options.period_s * NS_PER_S

    def _on_deadline(self, child: ProbeChild, limit_s: float) -> None:
        asked_ns = self._asked_ns
        # Where the loop itself was held up, the answer may be lying there.
        while self._child is child and self._asked_ns == asked_ns and child.receive():
            pass
        if self._child is child and self._asked_ns == asked_ns:
            self._fail(f"the NVIDIA driver did not answer within {limit_s:g} s")

    def _end_question(self, failed: bool) -> int:
        asked_ns, self._asked_ns = self._asked_ns, 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if asked_ns:
            self._calls[SAMPLE].add(self._engine.now_ns() - asked_ns, failed)
        return asked_ns

    def _pause_s(self, asked_ns: int) -> float:
        """How long from now until the next question, counted from the start of the last."""
        passed_s = (self._engine.now_ns() - asked_ns) / NS_PER_S
        if self._again:
            return GAP_S - passed_s
        hurry = anybody_waits_or_drains(self._engine.state)
        period_s = self._options.hurried_period_s if hurry else self._options.period_s
        # Not at once even where a sample takes longer than the period: others need the CPU too.
        return max(GAP_S, period_s - passed_s)

    def _take(self, sample: Sample, asked_ns: int) -> None:
        """Tell the core what an answer says."""
        if sample.init_error is not None:
            self._lose(sample.init_error, sample.init_error)
            return
        self._warm = True
        found = self._found
        found.supported = True
        found.init_error = None
        gpus = {facts.uuid: facts for facts in sample.facts}
        failures = tuple(one for one in sample.failures if one[0] in found.gpus)
        gpus |= {uuid: found.gpus[uuid] for uuid, _reason in failures}
        if not gpus:
            faults = [*sample.nameless, *(f"{uuid}: {reason}" for uuid, reason in sample.failures)]
            if faults:
                self._fail("; ".join(faults))
            else:
                self._lose(NO_GPU_SHOWN, None)
            return
        self._failed_in_row = 0
        changed = gpus != found.gpus
        found.gpus = gpus
        found.probing = False
        found.lost = None
        found.fault = None if sample.readings else failures[0][1]
        if sample.readings:
            found.sampled_ns = asked_ns
        if sample.telemetry:
            found.telemetry = sample.telemetry
            found.telemetry_ns = asked_ns
        for uuid, _reason in sample.failures:
            found.telemetry.pop(uuid, None)
        if changed:
            devices = sorted(gpus.values(), key=lambda facts: facts.index)
            self._engine.submit(DevicesFound(tuple(devices)))
        if self._found is found:
            # Unless the core has let go of the driver meanwhile.
            self._engine.submit(ReadingsTaken(asked_ns, sample.readings, failures))

    def _lose(self, reason: str, init_error: str | None) -> None:
        """There is no driver, or no GPU: look again later, with a child that starts afresh."""
        told = self._found.lost == reason
        self._drop_child()
        self._failed_in_row = 0
        self._found = Findings(
            opened=True, supported=init_error is None, init_error=init_error, lost=reason
        )
        self._next = self._loop.call_later(self._options.retry_s, self._start_child)
        if not told:
            self._engine.submit(DevicesLost(reason))

    def _fail(self, reason: str) -> None:
        """No answer, or none that can be believed: every GPU is unknown; start another child."""
        asked_ns = self._end_question(failed=True) or self._engine.now_ns()
        pid = None if self._child is None else self._child.pid
        self._drop_child()
        self._failed_in_row += 1
        pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(self._failed_in_row - 1, 16))
        self._next = self._loop.call_later(pause_s, self._start_child)
        self._report("devices.probe_failed", pid=pid, reason=reason, retry_s=pause_s)
        self._tell_fault(reason, asked_ns)

    def _tell_fault(self, reason: str, asked_ns: int) -> None:
        """Tell the core that nothing can be read, of those GPUs that it knows or at all."""
        found = self._found
        found.fault = reason
        found.telemetry = {}
        found.telemetry_ns = None
        if found.gpus:
            failures = tuple((uuid, reason) for uuid in found.gpus)
            self._engine.submit(ReadingsTaken(asked_ns, (), failures))
        elif found.lost != reason:
            found.probing = False
            found.lost = reason
            self._engine.submit(DevicesLost(reason))


def anybody_waits_or_drains(state: State) -> bool:
    """Say whether memory that comes back is waited for: readings are then taken more often."""
    return len(state.queue) > 0 or any(device.draining_mb for device in state.order)
