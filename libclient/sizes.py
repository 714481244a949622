"""Sizes and durations as people write them.

Memory is counted in MiB, as nvidia-smi counts it; a need is rounded up, never down.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from libclient.wire.vocabulary import MEMORY_MB_MAX

_MIB = 2**20
# Binary for the bare letters too, as container and service managers read them; decimal with a B.
_UNIT_BYTES = {
    "": _MIB,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "kb": 10**3,
    "m": _MIB,
    "mib": _MIB,
    "mb": 10**6,
    "g": 2**30,
    "gib": 2**30,
    "gb": 10**9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_PART_S = {"d": 86_400, "h": 3_600, "m": 60, "s": 1, "ms": 0.001}
_DURATION = re.compile(
    r"\s*(?:(?P<d>\d+)\s*d)?\s*(?:(?P<h>\d+(?:\.\d+)?)\s*h)?\s*(?:(?P<m>\d+(?:\.\d+)?)\s*m(?!s))?"
    r"\s*(?:(?P<s>\d+(?:\.\d+)?)\s*s)?\s*(?:(?P<ms>\d+)\s*ms)?\s*",
    re.ASCII,
)
_NUMBER = re.compile(r"\s*\d+(?:\.\d+)?\s*", re.ASCII)
# More digits than anything that is allowed has; of thousands, Python would refuse to make a number.
_CHARS_MAX = 100


def parse_memory(text: str | float) -> int:
    """Return MiB for `4GiB`, `512MiB`, `4GB` (decimal), `4G` (binary), `4096` or 4096 (MiB).

    A part of a MiB is rounded up. Raises ValueError for anything else, a negative or too large
    value included, and TypeError for a bool or another type.
    """
    if isinstance(text, str):
        return _memory_of_text(text)
    if isinstance(text, bool) or not isinstance(text, int | float):
        raise TypeError(f"memory has to be a size such as '4GiB' or a number of MiB, not {text!r}")
    if isinstance(text, int):
        if abs(text) >= 2**63:
            # Of thousands of digits, it could not even be written out.
            bits = text.bit_length()
            raise ValueError(f"memory of {bits} bits, at most {MEMORY_MB_MAX} MiB allowed")
    elif not math.isfinite(text):
        raise ValueError(f"memory {text!r} is not a finite number of MiB")
    return _within(math.ceil(text), repr(text))


@lru_cache(maxsize=256)
def _memory_of_text(text: str) -> int:
    match = _MEMORY.fullmatch(text) if len(text) <= _CHARS_MAX else None
    unit = None if match is None else _UNIT_BYTES.get(match[2].lower())
    if match is None or unit is None:
        raise ValueError(
            f"memory {text!r:.80} is not a size: write 4GiB, 512MiB, 4GB, or a number of MiB"
        )
    whole, _, part = match[1].partition(".")
    # In whole numbers, so that 4.7GB does not gain a MiB from binary fractions.
    scale = 10 ** len(part)
    total = int(whole + part) * unit
    return _within(-(-total // (scale * _MIB)), repr(text))


def _within(memory_mb: int, written: str) -> int:
    if memory_mb < 0:
        raise ValueError(f"memory {written} is negative")
    if memory_mb > MEMORY_MB_MAX:
        raise ValueError(f"memory {written} is {memory_mb} MiB, at most {MEMORY_MB_MAX} allowed")
    return memory_mb


def format_memory(memory_mb: int | None) -> str:
    """Return `512 MiB` or `23.5 GiB`; a value that is not known is `?`, never 0."""
    if memory_mb is None:
        return "?"
    if abs(memory_mb) < 1_024:
        return f"{memory_mb} MiB"
    return f"{round(memory_mb / 1_024, 1):g} GiB"


def parse_duration(text: str | float) -> float:
    """Return seconds for `10s`, `5m`, `1h30m`, `2d`, `250ms`, `10` or 10.

    Raises ValueError for anything else, a negative value included, and TypeError for a bool or
    another type.
    """
    if isinstance(text, str):
        short = len(text) <= _CHARS_MAX
        if short and _NUMBER.fullmatch(text):
            return float(text)
        match = _DURATION.fullmatch(text) if short else None
        if match is None or not any(match.groupdict().values()):
            raise ValueError(
                f"duration {text!r:.80} is not one: write 10s, 5m, 1h30m, or a number of seconds"
            )
        return float(sum(float(n) * _PART_S[part] for part, n in match.groupdict("0").items()))
    if isinstance(text, bool) or not isinstance(text, int | float):
        raise TypeError(f"a duration is written '5m' or as a number of seconds, not {text!r}")
    try:
        seconds = float(text)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"duration {seconds!r} is not a finite number of seconds from 0 on")
    return seconds


def format_duration(seconds: float | None) -> str:
    """Return `250ms`, `4.2s`, `5m`, `1h30m` or `2d3h`; a value that is not known is `?`."""
    if seconds is None:
        return "?"
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    if 0 < seconds < 0.9995:
        return f"{round(seconds * 1_000)}ms"
    if round(seconds, 1) < 60:
        return f"{round(seconds, 1):g}s"
    whole = round(seconds)
    days, hours, minutes, rest = (
        whole // 86_400,
        whole // 3_600 % 24,
        whole // 60 % 60,
        whole % 60,
    )
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    first = next(place for place, (n, _) in enumerate(parts) if n)
    # Two units are enough to read by.
    return "".join(f"{n}{unit}" for n, unit in parts[first : first + 2] if n)
