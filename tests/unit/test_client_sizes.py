"""Sizes and durations as people write and read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libclient.sizes import format_duration, format_memory, parse_duration, parse_memory


@pytest.mark.parametrize(
    ("text", "memory_mb"),
    [
        ("4GiB", 4_096),
        ("4G", 4_096),
        ("4 gib", 4_096),
        ("2.5GiB", 2_560),
        ("512MiB", 512),
        ("512m", 512),
        ("4096", 4_096),
        (" 4096 ", 4_096),
        (4_096, 4_096),
        (0, 0),
        ("1TiB", 1_048_576),
        ("4GB", 3_815),
        ("1MB", 1),
        ("1048576B", 1),
        ("1KiB", 1),
        (0.5, 1),
        (2_048.0, 2_048),
    ],
)
def test_sizes_are_read_as_people_write_them_and_rounded_up(
    text: str | float, memory_mb: int
) -> None:
    assert parse_memory(text) == memory_mb


@pytest.mark.parametrize(
    "text", ["", "GiB", "4XB", "-1", "4 4", "1e3", "nan", "4GiBs", "٤", -1, -0.5 - 1, math.nan]
)
def test_what_is_not_a_size_is_refused_by_name(text: str | float) -> None:
    with pytest.raises(ValueError, match="memory"):
        parse_memory(text)


def test_a_size_beyond_the_contract_names_its_limit() -> None:
    with pytest.raises(ValueError, match="at most 16777216"):
        parse_memory("17TiB")
    with pytest.raises(ValueError, match="not a finite"):
        parse_memory(math.inf)


@pytest.mark.parametrize(
    "value",
    ["9" * 5_000, "9" * 400 + "GiB", 10**5_000, -(10**5_000)],
    ids=["number", "unit", "int", "negative"],
)
def test_a_size_of_endless_digits_is_refused_like_any_other(value: str | int) -> None:
    with pytest.raises(ValueError, match="memory") as refused:
        parse_memory(value)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize(
    "value",
    ["9" * 400, "9" * 5_000 + "s", "9" * 400 + "d", 10**5_000],
    ids=["number", "unit", "days", "int"],
)
def test_a_duration_of_endless_digits_is_refused_like_any_other(value: str | int) -> None:
    with pytest.raises(ValueError, match="duration") as refused:
        parse_duration(value)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("value", [True, None, b"4GiB", [4]])
def test_what_is_no_size_at_all_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="memory has to be"):
        parse_memory(value)  # type: ignore[arg-type]  # what is refused here


@pytest.mark.parametrize(
    ("memory_mb", "text"),
    [(0, "0 MiB"), (512, "512 MiB"), (24_576, "24 GiB"), (24_064, "23.5 GiB"), (None, "?")],
)
def test_sizes_are_written_as_people_read_them(memory_mb: int | None, text: str) -> None:
    assert format_memory(memory_mb) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("5m", 300),
        ("1h30m", 5_400),
        ("1h 30m 5s", 5_405),
        ("2d", 172_800),
        ("250ms", 0.25),
        ("1s250ms", 1.25),
        ("1.5h", 5_400),
        ("10", 10),
        ("0", 0),
        (0, 0),
        (2.5, 2.5),
    ],
)
def test_durations_are_read_as_people_write_them(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", " ", "m", "5x", "-5s", "5m1h", "1e3", -1, math.inf, math.nan])
def test_what_is_not_a_duration_is_refused_by_name(text: str | float) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_a_truth_value_is_no_duration() -> None:
    with pytest.raises(TypeError, match="duration"):
        parse_duration(True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (4.23, "4.2s"),
        (59.96, "1m"),
        (60, "1m"),
        (5_400, "1h30m"),
        (3_605, "1h"),
        (172_800 + 10_800, "2d3h"),
        (None, "?"),
        (-5, "-5s"),
    ],
)
def test_durations_are_written_as_people_read_them(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(0, 1e7))
def test_a_written_duration_can_be_read_and_is_near_what_it_was(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=0.05, abs=0.06)
