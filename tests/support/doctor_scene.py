"""A host of a test's own for the doctor: files below a folder, units and answers as wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from libclient.cli.doctor.case import Case
from libclient.cli.doctor.findings import FAIL, LEVELS, Finding
from libclient.cli.doctor.host import Host

Check = Callable[[Case], Any]
LOADED = {"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled"}
ANSWERS: dict[str, dict[str, Any]] = {
    "hello": {"version": "0.0.0"},
    "health": {"status": "ok", "safe_mode": False},
    "ready": {"ready": True, "checks": {"devices": {"ok": True, "detail": "1 found"}}},
    "gpu_info": {"gpus": [], "nvml_supported": True, "sampled_s": 0.2, "mps": {"enabled": False}},
    "whoami": {"admin": True},
}


class Shown(Host):
    """A host of a test's own: files below a folder, and units as given."""

    def __init__(self, root: Path, units: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__(root)
        self.shown = units

    @property
    def systemd_runs(self) -> bool:
        return bool(self.shown)

    def unit(self, name: str) -> Mapping[str, str]:
        return self.shown.get(name, {})


class Scene:
    """A host and a daemon as a test wants them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.units: dict[str, dict[str, str]] = {}
        self.more: dict[str, Any] = {}

    def write(self, name: str, text: str = "") -> None:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def unit(self, name: str, **properties: str) -> None:
        self.units[name] = {**LOADED, **properties}

    def answers(self, **changes: Mapping[str, Any]) -> None:
        merged = {op: {**reply, **changes.get(op, {})} for op, reply in ANSWERS.items()}
        self.more["answers"] = merged

    def case(self) -> Case:
        settings = {"socket_path": str(self.root / "s"), **self.more}
        return Case(host=Shown(self.root, self.units), **settings)

    def found(self, check: Check) -> list[Finding]:
        return list(check(self.case()))

    def one(self, check: Check) -> Finding:
        """The only finding of a check, or the worst of several."""
        return max(self.found(check), key=lambda finding: LEVELS.index(finding.level))


def assert_finds(finding: Finding, level: str, said: str, mend: str = "") -> None:
    assert finding.level == level, finding
    assert said in finding.found, finding
    assert mend in "\n".join(finding.mend), finding
    assert "\n" not in finding.found
    if level == FAIL:
        assert finding.mend, f"nothing to do about it: {finding}"
