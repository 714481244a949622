"""Cards of a driver that is not there: writes the script of the stand-in for pynvml."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.support.sources import ROOT

MIB = 1024 * 1024
FAKE_NVML = ROOT / "tests" / "support" / "fake_nvml"


def uuid_of(index: int) -> str:
    """The uuid of the fake card with this index."""
    return f"GPU-0fa4e000-0000-4000-8000-{index:012d}"


def card(index: int = 0, total_mb: int = 24_576, **more: Any) -> dict[str, Any]:
    """One idle card; `more` are further keys of the script, memory in bytes."""
    return {"uuid": uuid_of(index), "name": f"Fake {index}", "total": total_mb * MIB, **more}


class FakeCards:
    """What the fake driver shows now. `environment` makes a process use it in place of pynvml."""

    def __init__(self, folder: Path, *cards: dict[str, Any], **more: Any) -> None:
        self._path = folder / "fake_nvml.json"
        self.marker = folder / "fake_nvml.imported"
        self.show(*cards, **more)

    def show(self, *cards: dict[str, Any], **more: Any) -> None:
        """Replace the script: it holds from the next sample on."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps({"devices": list(cards), **more}))
        fresh.replace(self._path)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that is to see these cards, and nothing else of ours."""
        return {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": f"{FAKE_NVML}:{ROOT}",
            "FAKE_NVML_SCRIPT": str(self._path),
            "FAKE_NVML_MARKER": str(self.marker),
        }

    def importers(self) -> list[int]:
        """The pids of the processes that have imported the binding, in order."""
        return _pids(self.marker)

    def hanging(self) -> list[int]:
        """The pids of the processes that have begun to hang in a call."""
        return _pids(self.marker.with_suffix(".hanging"))


def _pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []
