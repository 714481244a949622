"""Counting: buckets, names that stay few, and how late the loop is."""

from __future__ import annotations

import asyncio
import time

from gpuorchd.observe.loop_lag import LoopLag
from gpuorchd.observe.readiness import loop_check
from gpuorchd.observe.tally import BoundedNames, Histogram
from tests.support.observed import until

MS = 1_000_000


def test_a_duration_counts_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram((0.001, 0.01))
    for duration_ns in (0, -5, 1 * MS, 1 * MS + 1, 10 * MS, 11 * MS):
        histogram.add(duration_ns)
    assert histogram.counts == [3, 2, 1]
    assert histogram.sum_ns == 23 * MS + 1


IDLE_NS = 3_600_000 * MS


def test_a_name_keeps_its_place_and_a_flood_shares_the_rest() -> None:
    names = BoundedNames(2, IDLE_NS)
    assert names.assign(["a", "b", "c"], 0) == {"a": "a", "b": "b", "c": "other"}
    assert names.assign([f"flood{n}" for n in range(1_000)] + ["b", "a"], 1)["a"] == "a"
    assert len(names) == 2


def test_a_place_is_free_again_only_when_its_name_has_long_been_idle() -> None:
    names = BoundedNames(2, IDLE_NS)
    names.assign(["a", "b"], 0)
    assert names.assign(["b", "c"], IDLE_NS) == {"b": "b", "c": "other"}
    assert names.names() == ["a", "b"]
    assert names.assign(["b"], IDLE_NS + 1) == {"b": "b"}
    assert names.names() == ["b"], "a name that is idle for long is shown no more"
    assert names.assign(["b", "c"], IDLE_NS + 2) == {"b": "b", "c": "c"}


def test_names_that_come_and_go_stay_few_over_time() -> None:
    names = BoundedNames(64, IDLE_NS)
    seen = set()
    for minute in range(24 * 60):
        names.assign([f"made-up-{minute}"], minute * 60_000 * MS)
        seen |= set(names.names())
    # A place is given away once an hour at most.
    assert len(seen) <= 64 * 25


async def test_the_probe_sees_a_loop_that_was_held_up() -> None:
    histogram = Histogram((0.01, 0.05))
    lag = LoopLag(histogram, period_s=0.001)
    lag.start(asyncio.get_running_loop())
    await until(lambda: lag.probes)
    # Holding up the loop is what is to be seen.
    time.sleep(0.06)  # noqa: ASYNC251  # see above
    assert lag.worst_recent_ns > 50 * MS, "an overdue probe tells before it has run"
    before = histogram.counts[-1]
    await until(lambda: histogram.counts[-1] > before)
    lag.stop()
    assert lag.worst_recent_ns > 50 * MS


async def test_a_loop_that_hangs_is_not_ready() -> None:
    lag = LoopLag(Histogram((1.0,)), period_s=0.001)
    check = loop_check(lag)
    assert check()[0]
    lag._recent_ns.append(1_500 * MS)
    ok, detail = check()
    assert not ok
    assert "1500.0 ms" in detail
    assert "1000 ms allowed" in detail
