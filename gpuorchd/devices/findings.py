"""What is known of the real GPUs at the moment, and how it is put to those who ask.

`NvmlDevices` fills it in from the probe's answers; a fresh one is the state in which looking
begins. Unknown is None or missing, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpuorchd.core.model import DeviceFacts, DeviceUuid
from gpuorchd.devices.mps import MpsStatus
from gpuorchd.devices.telemetry import DeviceChecks, DeviceStatus, Telemetry

PROBING = "the first probe of the GPUs is still running"


@dataclass(slots=True, eq=False)
class Findings:
    """Everything that one spell of looking for GPUs has found."""

    # Looking at all: SAFE_MODE is off.
    opened: bool = False
    # Until the first probe has ended, in whatever way.
    probing: bool = False
    gpus: dict[DeviceUuid, DeviceFacts] = field(default_factory=dict)
    telemetry: dict[DeviceUuid, Telemetry] = field(default_factory=dict)
    # When the newest telemetry and the newest good reading were asked for.
    telemetry_ns: int | None = None
    sampled_ns: int | None = None
    # NVML has started and shown what it has.
    supported: bool = False
    init_error: str | None = None
    # Why there is no GPU, as the core was told.
    lost: str | None = None
    # Why the newest sample as a whole failed, None where it did not.
    fault: str | None = None

    def status(self, enriched: bool, mps: MpsStatus) -> DeviceStatus:
        """Say how the devices are being read; `enriched` is whether telemetry is wanted."""
        message = self.lost
        if not self.opened:
            message = "no GPU is looked for"
        elif self.probing:
            message = PROBING
        return DeviceStatus(
            nvml_supported=self.supported,
            nvml_enriched=self.supported and enriched,
            nvml_init_error=self.init_error,
            sampled_ns=self.sampled_ns,
            mps_enabled=mps.enabled,
            mps_pipe_dir=mps.pipe_dir,
            mps_control_process=mps.control_process,
            message=message,
        )

    def checks(self) -> DeviceChecks:
        """Say what readiness needs."""
        if not self.opened:
            return DeviceChecks(False, True, "closed: no GPU is touched")
        if self.probing:
            return DeviceChecks(True, True, PROBING)
        if self.fault is not None:
            return DeviceChecks(False, False, self.fault)
        return DeviceChecks(False, True, self.lost or f"{len(self.gpus)} GPUs answer")
