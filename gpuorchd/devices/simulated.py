"""Cards that are not there: made up for trials and tests, or none at all.

A simulated card has no driver and no reading. The core knows it by its `drain_ns` and keeps its
books itself: a lease uses all of its bytes from its grant, and they come back that long after its
end. So this source only says which cards there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpuorchd.core.events import DevicesFound, DevicesLost
from gpuorchd.core.model import NS_PER_S, DeviceFacts, DeviceUuid
from gpuorchd.devices.mps import MpsWatch
from gpuorchd.devices.telemetry import (
    CallHistogram,
    DeviceChecks,
    DeviceStatus,
    EventSink,
    Telemetry,
)

CARDS_MAX = 64
# What a lease can ask for at most.
CARD_MAX_MB = 16_777_216
VARIABLE = "GPUORCH_SIMULATE"
CARD_NAME = "Simulated GPU"


def parse_cards(text: str, variable: str = VARIABLE) -> tuple[int, ...]:
    """Read `2x81920`, `24576` or `1x24576,2x81920` as the MiB of each card.

    Raises ValueError, which names `variable`, the value and what is allowed.
    """
    cards: list[int] = []
    for part in text.split(","):
        count_text, times, memory_text = part.strip().partition("x")
        if not times:
            count_text, memory_text = "1", count_text
        count, memory_mb = _whole(count_text), _whole(memory_text)
        fits = 1 <= count <= CARDS_MAX - len(cards) and 1 <= memory_mb <= CARD_MAX_MB
        if not fits:
            raise ValueError(
                f"{variable} is {text!r}; allowed: MIB, COUNTxMIB or several of these with commas, "
                f"1 to {CARDS_MAX} cards of 1 to {CARD_MAX_MB} MiB"
            )
        cards += [memory_mb] * count
    return tuple(cards)


def _whole(text: str) -> int:
    # int() alone takes "+1", "1_000" and digits of other scripts. 0 is never allowed here.
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0


class SimulatedDevices:
    """A `DeviceSource` of simulated cards. `cards_mb` is the memory of each, in order of index."""

    def __init__(
        self,
        engine: EventSink,
        cards_mb: Sequence[int],
        drain_s: float = 0.1,
        mps: MpsWatch | None = None,
    ) -> None:
        self._engine = engine
        self._mps = MpsWatch(wanted=False) if mps is None else mps
        self._opened = False
        self.devices = tuple(
            DeviceFacts(
                uuid=DeviceUuid(f"GPU-51a7ed00-0000-4000-8000-{index:012d}"),
                index=index,
                name=CARD_NAME,
                total_mb=memory_mb,
                drain_ns=round(drain_s * NS_PER_S),
            )
            for index, memory_mb in enumerate(cards_mb)
        )

    def open(self) -> None:
        """Find the cards."""
        if not self._opened:
            self._opened = True
            self._engine.submit(DevicesFound(self.devices))

    def close(self) -> None:
        """Find no more; there is no driver to let go of."""
        self._opened = False

    def take_reading(self) -> None:
        """Nothing can be read: the core knows what is used."""

    def telemetry(self) -> Mapping[DeviceUuid, Telemetry]:
        """Give none: a card that is not there has no temperature."""
        return {}

    def status(self) -> DeviceStatus:
        """Say that there is no NVML, and no need of it."""
        return _status(self._mps, None if self._opened else "no GPU is looked for")

    def checks(self) -> DeviceChecks:
        """Say what readiness needs to know."""
        detail = f"{len(self.devices)} simulated cards" if self._opened else "closed"
        return DeviceChecks(False, True, detail)

    def call_stats(self) -> Mapping[str, CallHistogram]:
        """Give none: no driver is called."""
        return {}

    async def stop(self) -> None:
        """Hold nothing that has to be given back."""
        self._opened = False


class NoDevices:
    """A `DeviceSource` of nothing, for a host that is to have no GPU. `reason` is for people."""

    def __init__(self, engine: EventSink, reason: str, mps: MpsWatch | None = None) -> None:
        self._engine = engine
        self._reason = reason
        self._mps = MpsWatch(wanted=False) if mps is None else mps
        self._opened = False

    def open(self) -> None:
        """Say that there is nothing."""
        if not self._opened:
            self._opened = True
            self._engine.submit(DevicesLost(self._reason))

    def close(self) -> None:
        """Have nothing to let go of."""
        self._opened = False

    def take_reading(self) -> None:
        """Have nothing to read."""

    def telemetry(self) -> Mapping[DeviceUuid, Telemetry]:
        """Give none."""
        return {}

    def status(self) -> DeviceStatus:
        """Say why there is no GPU."""
        return _status(self._mps, self._reason)

    def checks(self) -> DeviceChecks:
        """Say that nothing is missing: it is meant so."""
        return DeviceChecks(False, True, self._reason)

    def call_stats(self) -> Mapping[str, CallHistogram]:
        """Give none: no driver is called."""
        return {}

    async def stop(self) -> None:
        """Hold nothing that has to be given back."""
        self._opened = False


def _status(mps_watch: MpsWatch, message: str | None) -> DeviceStatus:
    mps = mps_watch.look()
    return DeviceStatus(
        nvml_supported=False,
        nvml_enriched=False,
        nvml_init_error=None,
        sampled_ns=None,
        mps_enabled=mps.enabled,
        mps_pipe_dir=mps.pipe_dir,
        mps_control_process=mps.control_process,
        message=message,
    )
