"""The frames between the daemon and its probe, and the names both know the driver's calls by.

A frame is a 4-byte big-endian length and that many bytes of JSON. The daemon sends
`{"n": number, "telemetry": bool}` and gets one answer with the same number; never two at a time.
An answer holds raw bytes and driver units as the driver gave them: rounding and judging are the
daemon's. Shared by both sides, so it imports the standard library's smallest part only.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct(">I")
REQUEST_MAX_BYTES = 1_024
# 64 GPUs with a few hundred processes each and their ancestors stay below this.
ANSWER_MAX_BYTES = 4 * 1024 * 1024

# The driver calls that are timed, by the short name that metrics use. Bounded: a label's values.
CALLS = frozenset(
    {
        "init",
        "count",
        "handle",
        "uuid",
        "name",
        "memory",
        "compute_processes",
        "graphics_processes",
        "mps_processes",
        "utilization",
        "temperature",
        "power",
    }
)
# A whole sample as the daemon sees it, the pipe included; a missed deadline counts as its failure.
SAMPLE = "sample"


def frame(payload: bytes) -> bytes:
    """Put the length before a payload."""
    return HEADER.pack(len(payload)) + payload
