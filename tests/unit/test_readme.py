"""The README's examples do what they say, and its picture shows what the demo shows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from libclient.demo.show import COLUMNS
from tests.support.sources import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_picture_of_the_demo_has_its_columns() -> None:
    (titles,) = (line.split() for line in README.splitlines() if line.startswith("AGENT"))
    assert titles == [column.title for column in COLUMNS]


def test_the_example_puts_its_lease_in_force_before_it_loads_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = blocks("python")
    monkeypatch.setenv("GPUORCH_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    loaded = []

    def load(device: str) -> None:
        loaded.append((device, os.environ["CUDA_VISIBLE_DEVICES"]))

    exec(example, {"load": load})
    assert loaded == [("cpu", "")]


def test_every_line_of_the_shell_speaks_to_the_daemon_that_it_started() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    (named,) = (n for n, line in enumerate(lines) if line.startswith("export GPUORCH_SOCKET="))
    (started,) = (n for n, line in enumerate(lines) if line.startswith("gpuorchd"))
    assert named < started
    assert "--socket" not in lines[started]
    assert not [line for line in lines[started:] if "/run/justnews" in line]
