"""Simulated cards, and no cards at all."""

from __future__ import annotations

import re

import pytest

from gpuorchd.core.events import DevicesFound, DevicesLost
from gpuorchd.devices.simulated import NoDevices, SimulatedDevices, parse_cards
from gpuorchd.devices.telemetry import attach_source
from tests.support.recording_engine import RecordingEngine


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        ("24576", (24_576,)),
        ("2x81920", (81_920, 81_920)),
        ("1x24576,2x81920", (24_576, 81_920, 81_920)),
        ("24576, 1000", (24_576, 1_000)),
        ("64x1", (1,) * 64),
    ],
)
def test_cards_are_read_as_people_write_them(text: str, cards: tuple[int, ...]) -> None:
    assert parse_cards(text) == cards


@pytest.mark.parametrize(
    "text",
    ["", "x", "0x1", "2x0", "2x", "x81920", "-1x5", "2x-5", "1_0x5", "2X5", "2x5x6", "65x1",
     "60x1,5x1", "1x16777217", "1e3", "24576,", ",", "٢x5", "2 x 5", "9" * 400],
)  # fmt: skip
def test_cards_that_cannot_be_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"^GPUORCH_SIMULATE is .*; allowed: .*64 cards") as caught:
        parse_cards(text)
    assert re.search(re.escape(repr(text)), str(caught.value))


async def test_simulated_cards_are_found_once_and_again_after_closing() -> None:
    engine = RecordingEngine()
    source = SimulatedDevices(engine, (24_576, 81_920), drain_s=0.25)
    source.open()
    source.open()
    (found,) = engine.of(DevicesFound)
    assert [(facts.index, facts.total_mb) for facts in found.devices] == [(0, 24_576), (1, 81_920)]
    assert {facts.drain_ns for facts in found.devices} == {250_000_000}
    assert found.devices[1].uuid == "GPU-51a7ed00-0000-4000-8000-000000000001"
    source.close()
    source.open()
    assert engine.of(DevicesFound) == [found, found]
    await source.stop()


async def test_what_a_simulated_card_cannot_show_is_missing_and_not_zero() -> None:
    source = SimulatedDevices(RecordingEngine(), (24_576,))
    source.open()
    assert source.telemetry() == {}
    status = source.status()
    assert (status.nvml_supported, status.sampled_ns, status.message) == (False, None, None)
    assert source.checks().answering


async def test_no_devices_says_why_and_is_not_a_failure() -> None:
    engine = RecordingEngine()
    source = NoDevices(engine, "this host is to have no GPU")
    source.open()
    assert engine.events == [DevicesLost("this host is to have no GPU")]
    assert source.status().message == "this host is to have no GPU"
    checks = source.checks()
    assert checks.answering
    assert not checks.first_probe_running


async def test_a_source_carries_out_the_effects_about_devices() -> None:
    engine = RecordingEngine()
    source = SimulatedDevices(engine, (1_000,))
    attach_source(engine, source)
    opened, closed, reading = engine.actors.values()
    opened(None)
    assert len(engine.of(DevicesFound)) == 1
    reading(None)
    closed(None)
    opened(None)
    assert len(engine.of(DevicesFound)) == 2
