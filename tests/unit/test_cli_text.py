"""What the command line prints: harmless, fitted to its width, honest about what is unknown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libclient.cli.lists import (
    LEASE_COLUMNS,
    gpu_rows,
    lease_rows,
    memory_bar,
    memory_parts,
)
from libclient.cli.looking import daemon_lines
from libclient.cli.screen import Screen
from libclient.cli.tables import Cell, Column, bar_lengths, flow, table
from libclient.cli.text import cells, coloured, cut, plain, safe

HOSTILE = "evil\x1b[2J\x07\r\n\u202etxt\x9b"


def test_text_of_others_cannot_steer_a_terminal() -> None:
    shown = safe(HOSTILE)
    assert shown.isprintable()
    assert shown == r"evil\x1b[2J\x07\r\n\u202etxt\x9b"


@given(st.text())
def test_any_text_becomes_one_harmless_line(text: str) -> None:
    assert safe(text).isprintable()


def test_a_lease_of_a_hostile_name_is_listed_harmlessly() -> None:
    lease = {"agent": HOSTILE, "purpose": HOSTILE, "state": HOSTILE, "priority": HOSTILE}
    row = lease_rows([{**lease, "lease_id": HOSTILE, "pid": HOSTILE, "gpus": []}])[0]
    assert all(cell.text.isprintable() for cell in row)


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [("analyst", 7, "analyst"), ("analyst", 4, "ana…"), ("世界世界", 5, "世界…"), ("abc", 0, "")],
)
def test_a_cut_text_fits_and_shows_that_it_was_cut(text: str, width: int, shown: str) -> None:
    assert cut(text, width) == shown
    assert cells(shown) <= width


def test_colours_do_not_change_the_width_of_a_table() -> None:
    columns = (Column("A"), Column("B", right=True))
    rows = [[Cell("x", "bold red"), Cell("1")], [Cell("yyy"), Cell("22", "green")]]
    without = table(columns, rows, None, plain)
    assert without == ["A     B", "x     1", "yyy  22"]
    assert table(columns, rows, None, coloured) != without


def test_a_narrow_table_cuts_names_first_then_leaves_columns_out() -> None:
    columns = (Column("NAME", least=4), Column("SIZE"), Column("EXTRA", rank=1))
    rows = [[Cell("a-very-long-name"), Cell("10GiB"), Cell("more")]]
    assert table(columns, rows, None, plain)[1] == "a-very-long-name  10GiB  more"
    assert table(columns, rows, 22, plain)[1] == "a-very-…  10GiB  more"
    assert table(columns, rows, 15, plain)[1] == "a-very-…  10GiB"


def test_what_only_goes_with_a_row_is_left_out_before_a_name_is_cut() -> None:
    lease = {"agent": "a-name-of-30-characters-exactly", "gpus": [{"index": 0, "memory_mb": 4096}],
             "used_mb": 2048, "state": "active", "priority": "normal", "pid": 1, "uid": 0,
             "lease_id": "0123abcd-1", "purpose": "the nightly run of all articles"}  # fmt: skip
    rows = lease_rows([lease])
    whole = table(LEASE_COLUMNS, rows, None, plain)
    width = cells(whole[1])
    seen = set()
    for narrower in range(width - 1, 60, -1):
        titles, row = table(LEASE_COLUMNS, rows, narrower, plain)
        assert cells(row) <= narrower
        extra = {"USER", "LEASE", "PURPOSE"} & set(titles.split())
        seen.add(len(extra))
        assert row.startswith("a-name-of-30-characters-exactly") or not extra
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("width", [20, 40, 60, 80, None])
def test_the_head_of_status_fits_the_terminal(width: int | None) -> None:
    seen = {
        "daemon": {"version": "1.2.3", "socket": "/run/justnews/" + "x" * 40, "safe_mode": True},
        "ready": {"ready": False, "checks": {"nvml": {"ok": False, "detail": "why " * 20}}},
        "gpu_info": {"gpus": [{}, {}], "mps_enabled": True, "sampled_s": 0.4},
    }
    lines = daemon_lines(Screen(), seen, width)
    assert width is None or max(map(cells, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "gpuorchd 1.2.3 not ready" in text
    assert "2 GPUs MPS read 400ms ago" in text
    assert ("nvml: " + "why " * 20).strip() in text
    assert text.startswith("SAFE_MODE is on")


@given(st.lists(st.text("aé世 ", max_size=12), max_size=8), st.integers(3, 30))
def test_what_flows_over_lines_fits_each_of_them(texts: list[str], width: int) -> None:
    lines = flow([Cell(text) for text in texts], width, plain)
    assert all(cells(line) <= width for line in lines)


@given(st.lists(st.integers(0, 100_000), max_size=6), st.integers(6, 80))
def test_a_bar_is_as_wide_as_asked_and_hides_nothing(amounts: list[int], width: int) -> None:
    lengths = bar_lengths(amounts, width)
    assert sum(lengths) == (width if any(amounts) else 0)
    assert all((n > 0) == (amount > 0) for n, amount in zip(lengths, amounts, strict=True))


GPU = {
    "index": 0,
    "name": "card",
    "state": "ok",
    "memory_total_mb": 1_000,
    "memory_leased_mb": 500,
    "memory_draining_mb": 250,
    "memory_unleased_mb": 0,
    "utilization_gpu_pct": None,
    "temperature_c": None,
}


def test_what_leases_could_have_is_what_nobody_is_promised() -> None:
    assert memory_parts(GPU) == {"leased": 500, "draining": 250, "unleased": 0, "free": 250}
    assert memory_bar(GPU, 8, plain, unicode=False).text == "####==.."
    assert memory_bar(GPU, 8, plain, unicode=True).text == "████▓▓··"


def test_what_could_not_be_read_is_a_question_mark_and_never_nothing() -> None:
    unknown = {**GPU, "memory_unleased_mb": None}
    assert memory_parts(unknown) is None
    texts = [cell.text for cell in gpu_rows([unknown], Screen())[0]]
    assert texts[3:8] == ["???", "?", "?", "?", "?"]
    assert texts[-2:] == ["?", "?"]
    assert "0%" not in texts
