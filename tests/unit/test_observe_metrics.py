"""Metrics: what is counted, what is shown, how much of it there may be, and whom it may delay."""

from __future__ import annotations

import asyncio
import importlib
import re
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpuorchd.core.events import ReadingsTaken, StopAsked
from gpuorchd.core.model import DeviceUuid, Reading
from gpuorchd.observe.metric_table import TABLE
from gpuorchd.observe.metrics import Metrics
from gpuorchd.observe.sources import Sources
from gpuorchd.observe.survey import take_survey
from libclient.wire.vocabulary import ADMIN_OPS, OPEN_OPS
from tests.support.metric_page import PAGE, page_with_table
from tests.support.observed import SECRET, ObservedEngine

MIB = 1_048_576
P = "gpu_orchestrator_"
Labels = frozenset[tuple[str, str]]


@dataclass
class Calls:
    """Driver calls as a source of devices counts them."""

    counts: tuple[int, ...]
    sum_ns: int
    failures: int


@dataclass
class Status:
    """What a source of devices says of itself."""

    nvml_supported: bool = False
    nvml_init_error: str | None = 'ERROR "no\ndriver"'
    mps_enabled: bool = True
    mps_control_process: bool = True
    mps_pipe_dir: str = "/tmp/nvidia-mps"


@dataclass
class Telemetry:
    """Readings of one GPU for people."""

    utilization_gpu_pct: float | None = 50.0
    memory_utilization_pct: float | None = None
    temperature_c: float | None = 40.0
    power_draw_w: float | None = 120.5


def full_sources() -> Sources:
    return Sources(
        request_counts=lambda: {("lease", "ok"): 3, ("release", "ok"): 2, ("nonsense", "x"): 1},
        connections_open=lambda: 4,
        unsent_bytes=lambda: 5,
        accept_failures=lambda: 1,
        subscribers=lambda: 6,
        events_lost=lambda: 7,
        limits_reached=lambda: {"leases_per_uid": 8},
        settings_damaged=lambda: False,
        driver_status=Status,
        telemetry=lambda: {"GPU-0": Telemetry()},
        driver_calls=lambda: {"nvmlInit": Calls((1, 2, 3), 9_000_000, 2)},
        driver_call_buckets_s=(0.001, 0.01),
        log_suppressed=lambda: 10,
        log_lost=lambda: 11,
    )


async def samples(metrics: Metrics) -> dict[str, dict[Labels, float]]:
    """Every sample of a scrape by name and labels; a repeated one is an error."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(await metrics.render_text()):
        for sample in family.samples:
            series = found.setdefault(sample.name.removeprefix(P), {})
            labels = frozenset(sample.labels.items())
            assert labels not in series, f"{sample.name} {sample.labels} comes twice"
            series[labels] = sample.value
    return found


def of(**labels: str) -> Labels:
    return frozenset(labels.items())


async def test_the_names_of_the_original_are_kept() -> None:
    found = await samples(Metrics(ObservedEngine(), full_sources()))
    for name in (
        "uptime_seconds", "active_leases", "requests_total", "lease_requests_total",
        "release_requests_total", "lease_expired_total", "nvml_supported", "nvml_error_info",
        "mps_enabled",
    ):  # fmt: skip
        assert name in found, name


async def test_every_metric_of_the_table_is_exported_with_its_type_and_labels() -> None:
    engine = ObservedEngine()
    metrics = Metrics(engine, full_sources())
    engine.ask()
    # One GPU more of each reading than the full sources have, so that no metric is left out.
    metrics.sources.telemetry = lambda: {"GPU-0": Telemetry(memory_utilization_pct=1.0)}
    text = await metrics.render_text()
    exported = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exported[name] = (family.type, labels, family.documentation)
    assert exported == {
        spec.name: (spec.kind, set(spec.labels), spec.meaning) for spec in TABLE.values()
    }
    headers = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(headers) == len(set(headers)), "a header comes once, however many slices there are"


def test_the_page_lists_every_metric_as_the_daemon_has_it() -> None:
    page = PAGE.read_text()
    assert page == page_with_table(page), "run: python -m tests.support.metric_page"
    for name in re.findall(r"`(?:\w+\()*(gpu_orchestrator_\w+)", page):
        assert re.sub(r"_(bucket|sum|count)$", "", name) in TABLE, name


async def test_a_lease_shows_in_every_figure_while_it_lives_and_drains() -> None:
    engine = ObservedEngine()
    metrics = Metrics(engine, Sources())
    conn = engine.ask("scout", 1_000)
    found = await samples(metrics)
    gpu = of(index="0", uuid="GPU-0")
    assert found["active_leases"][of()] == 1
    assert found["leases"][of(state="active")] == 1
    assert found["agent_leased_bytes"] == {of(agent="scout"): 1_000 * MIB}
    assert found["gpu_memory_leased_bytes"][gpu] == 1_000 * MIB
    assert found["gpu_memory_used_bytes"][gpu] == 1_000 * MIB
    assert found["lease_requests_total"][of(outcome="granted")] == 1
    assert found["lease_wait_seconds_count"][of()] == 1
    assert found["lease_grant_seconds_count"][of()] == 1
    engine.release(conn)
    found = await samples(metrics)
    assert found["active_leases"][of()] == 0
    assert found["leases"][of(state="draining")] == 1
    assert found["agent_leased_bytes"] == {of(agent="scout"): 0}
    assert found["gpu_memory_leased_bytes"][gpu] == 0
    assert found["gpu_memory_draining_bytes"][gpu] == 1_000 * MIB
    engine.pass_s(0.12)
    found = await samples(metrics)
    assert found["gpu_memory_draining_bytes"][gpu] == 0
    assert found["lease_drain_seconds_count"][of()] == 1
    assert found["lease_drain_seconds_bucket"][of(le="0.1")] == 0
    assert found["lease_drain_seconds_bucket"][of(le="0.15")] == 1
    assert found["events_total"][of(event="lease.drained")] == 1


async def test_waits_and_denials_are_counted_by_how_they_ended() -> None:
    engine = ObservedEngine(cards=1, total_mb=1_000)
    metrics = Metrics(engine, Sources())
    holder = engine.ask("first", 1_000)
    engine.ask("denied", 500)
    engine.ask("impatient", 500, wait_s=2)
    patient = engine.ask("patient", 500, wait_s=60)
    assert (await samples(metrics))["queue_depth"][of(priority="normal")] == 2
    engine.pass_s(3)
    engine.release(holder)
    engine.pass_s(1)
    found = await samples(metrics)
    assert found["lease_requests_total"] == {
        of(outcome="granted"): 2,
        of(outcome="denied"): 1,
        of(outcome="timeout"): 1,
        of(outcome="cancelled"): 0,
    }
    assert found["lease_denials_total"][of(note="INSUFFICIENT_MEMORY")] == 1
    assert found["lease_denials_total"][of(note="TIMEOUT")] == 1
    assert found["lease_wait_seconds_bucket"][of(le="0.001")] == 1
    assert found["lease_wait_seconds_bucket"][of(le="5")] == 2
    assert found["lease_wait_seconds_sum"][of()] == 4
    engine.leave(patient)


async def test_what_could_not_be_read_has_no_sample_and_is_never_zero() -> None:
    engine = ObservedEngine(cards=1, simulated=False)
    metrics = Metrics(engine, Sources())
    found = await samples(metrics)
    assert "gpu_memory_used_bytes" not in found
    assert "gpu_memory_unleased_bytes" not in found
    assert "nvml_supported" not in found
    reading = Reading(DeviceUuid("GPU-0"), free_mb=80_920, used_mb=1_000)
    engine.submit(ReadingsTaken(engine.now_ns(), (reading,)))
    gpu = of(index="0", uuid="GPU-0")
    found = await samples(metrics)
    assert found["gpu_memory_used_bytes"][gpu] == 1_000 * MIB
    assert found["gpu_memory_unleased_bytes"][gpu] == 1_000 * MIB
    engine.pass_s(60)
    assert "gpu_memory_used_bytes" not in await samples(metrics), "a stale reading is unknown"


async def test_figures_of_other_rooms_are_shown_as_they_are() -> None:
    found = await samples(Metrics(ObservedEngine(), full_sources()))
    assert found["requests_total"][of(op="lease", outcome="ok")] == 3
    assert found["requests_total"][of(op="unknown", outcome="x")] == 1
    assert found["release_requests_total"] == {of(outcome="ok"): 2}
    assert found["nvml_error_info"] == {of(error='ERROR "no\ndriver"'): 1}
    assert found["nvml_supported"][of()] == 0
    assert found["mps_enabled"][of()] == 1
    calls = found["nvml_call_duration_seconds_bucket"]
    assert [calls[of(function="nvmlInit", le=le)] for le in ("0.001", "0.01", "+Inf")] == [1, 3, 6]
    assert found["nvml_call_duration_seconds_sum"][of(function="nvmlInit")] == 0.009
    assert found["nvml_call_failures_total"][of(function="nvmlInit")] == 2
    assert found["limits_reached_total"] == {of(bound="leases_per_uid"): 8}
    assert found["gpu_utilization_ratio"] == {of(index="0", uuid="GPU-0"): 0.5}
    assert "gpu_memory_utilization_ratio" not in found, "a reading that is missing is not zero"


async def test_a_thousand_hostile_agent_names_are_65_series_and_change_no_other() -> None:
    engine = ObservedEngine()
    metrics = Metrics(engine, Sources())
    engine.ask("roster", 1)
    evil = ['"} 1\nforged 2', "\\", "other", "a" * 128, "\u202e", "{}", "# TYPE x counter"]
    for number in range(1_000):
        engine.ask(f"{evil[number % len(evil)]}{number if number >= len(evil) else ''}", 1)
    for _ in range(3):
        found = await samples(metrics)
        agents = found["agent_leased_bytes"]
        assert len(agents) <= 65
        assert agents[of(agent="roster")] == MIB
        assert sum(agents.values()) == 1_001 * MIB, "what has no series of its own is in other"
        assert "forged" not in found
    assert len(metrics.counts.agents) == 64


async def test_agents_that_come_and_go_do_not_make_ever_more_series() -> None:
    engine = ObservedEngine()
    metrics = Metrics(engine, Sources())
    seen: set[Labels] = set()
    for number in range(150):
        engine.release(engine.ask(f"passing{number}", 1))
        conn = engine.ask(f"staying{number}", 1)
        seen |= set((await samples(metrics))["agent_leased_bytes"])
        engine.release(conn)
    assert len(seen) <= 65


async def test_a_roster_keeps_its_series_through_a_flood_of_other_names() -> None:
    engine = ObservedEngine()
    metrics = Metrics(engine, Sources())
    roster = [engine.ask(f"agent{n}", 1) for n in range(12)]
    await metrics.render()
    engine.release(roster[0])
    for number in range(300):
        engine.ask(f"flood{number}", 1)
    agents = (await samples(metrics))["agent_leased_bytes"]
    for number in range(1, 12):
        assert of(agent=f"agent{number}") in agents


async def test_no_slice_of_a_large_page_keeps_the_loop_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = [f"outcome{n}" for n in range(100)]
    counts = {(op, outcome): 1 for op in (*OPEN_OPS, *ADMIN_OPS) for outcome in outcomes}
    assert len(counts) > 2_000
    engine = ObservedEngine(cards=8)
    metrics = Metrics(engine, full_sources())
    metrics.sources.request_counts = lambda: counts
    for number in range(600):
        engine.ask(f"agent{number}", 1)
    await metrics.render()
    # From here on: which samples are rendered between two turns of somebody else's callback.
    turns = 0
    rendered: dict[int, int] = {}
    exposition: Any = importlib.import_module("gpuorchd.observe.exposition")
    expose = exposition.expose

    def counting(spec: object, rows: list[object], *, with_header: bool) -> bytes:
        rendered[turns] = rendered.get(turns, 0) + len(rows)
        page: bytes = expose(spec, rows, with_header=with_header)
        return page

    monkeypatch.setattr(exposition, "expose", counting)
    loop = asyncio.get_running_loop()
    running = True

    def tick() -> None:
        nonlocal turns
        turns += 1
        if running:
            loop.call_soon(tick)

    loop.call_soon(tick)
    text = await metrics.render_text()
    running = False
    assert sum(rendered.values()) > 2_000
    assert max(rendered.values()) <= 200
    assert len(rendered) >= 2_000 / 200
    assert turns > len(rendered), "leases were looked at in slices too"
    assert len(list(text_string_to_metric_families(text))) == text.count("# TYPE")


async def test_leases_are_looked_at_in_slices_and_one_that_ends_meanwhile_is_left_out() -> None:
    engine = ObservedEngine()
    conns = [engine.ask(f"agent{number}", 1) for number in range(1_000)]
    surveying = asyncio.create_task(take_survey(engine.state, engine.now_ns()))
    turns = 0
    while not surveying.done():
        await asyncio.sleep(0)
        turns += 1
        if turns == 2:
            engine.release(conns[-1])
            engine.pass_s(1)
    assert turns > 1_000 / 250
    survey = surveying.result()
    assert survey.by_state == {"active": 999, "revoking": 0, "detached": 0, "draining": 0}


async def test_what_is_told_to_owners_alone_is_not_counted_again() -> None:
    engine = ObservedEngine()
    metrics = Metrics(engine, Sources())
    for _ in range(3):
        engine.ask()
    engine.submit(StopAsked())
    found = await samples(metrics)
    assert found["events_total"][of(event="daemon.stopping")] == 1


async def test_scrapes_at_the_same_time_share_one_rendering() -> None:
    metrics = Metrics(ObservedEngine(), full_sources())
    scrapes = 0

    def counted() -> int:
        nonlocal scrapes
        scrapes += 1
        return 0

    metrics.sources.subscribers = counted
    pages = await asyncio.gather(*(metrics.render() for _ in range(20)))
    assert scrapes == 1
    assert len(set(pages)) == 1
    await metrics.render()
    assert scrapes == 2, "a later scrape is fresh"


async def test_a_scraper_that_goes_away_takes_no_page_from_the_others() -> None:
    metrics = Metrics(ObservedEngine(), full_sources())
    gone = asyncio.create_task(metrics.render())
    stays = asyncio.create_task(metrics.render())
    await asyncio.sleep(0)
    gone.cancel()
    assert b"uptime_seconds" in await stays
    assert gone.cancelled()


async def test_stopping_ends_a_rendering_that_is_under_way() -> None:
    metrics = Metrics(ObservedEngine(), full_sources())
    metrics.start(asyncio.get_running_loop())
    scrape = asyncio.create_task(metrics.render())
    await asyncio.sleep(0)
    await metrics.stop()
    with pytest.raises(asyncio.CancelledError):
        await scrape


async def test_no_token_is_in_a_page() -> None:
    engine = ObservedEngine()
    metrics = Metrics(engine, full_sources())
    for _ in range(5):
        engine.ask()
    engine.release(engine.ask())
    assert SECRET not in await metrics.render_text()
