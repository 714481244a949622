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


def test_a_name_keeps_its_place_and_a_flood_shares_the_rest() -> None:
    names = BoundedNames(2)
    assert names.assign(["a", "b", "c"]) == {"a": "a", "b": "b", "c": "other"}
    assert names.assign([f"flood{n}" for n in range(1_000)] + ["b", "a"])["a"] == "a"
    assert len(names) == 2


def test_a_place_goes_to_a_new_name_only_when_its_own_is_no_longer_live() -> None:
    names = BoundedNames(2)
    names.assign(["a", "b"])
    names.assign(["b"])
    assert names.names() == ["a", "b"], "an idle name keeps its place while nobody wants it"
    assert names.assign(["b", "c"]) == {"b": "b", "c": "c"}
    assert names.assign(["a", "b", "c"])["a"] == "other"


def test_the_place_that_was_idle_longest_goes_first() -> None:
    names = BoundedNames(3)
    names.assign(["a", "b", "c"])
    names.assign(["a", "c"])
    names.assign(["c"])
    assert names.assign(["c", "d"])["d"] == "d"
    assert names.names() == ["a", "c", "d"]


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
