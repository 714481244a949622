"""The page about the protocol names everything that the wire has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpuorchd.server.requests import BY_OP
from gpuorchd.server.services import Options
from libclient.wire import vocabulary as words

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
# Fences are three of the marks that names stand between.
PROSE = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
NAMED = {name for text in re.findall(r"`([^`]+)`", PROSE) for name in re.findall(r"[\w.]+", text)}


@pytest.mark.parametrize("op", sorted(BY_OP))
def test_every_op_has_its_heading_with_its_fields(op: str) -> None:
    headings = [line for line in PAGE.splitlines() if line.startswith("### ")]
    found = [line for line in headings if re.search(rf"\b{op}\b", line)]
    assert len(found) == 1, headings
    for field in BY_OP[op].__struct_fields__:
        if field != "id" and "{...}" not in found[0]:
            assert re.search(rf"\b{field}\b", found[0]), (field, found[0])


@pytest.mark.parametrize("field", [f for f in BY_OP["lease"].__struct_fields__ if f != "id"])
def test_every_field_of_a_lease_has_its_row(field: str) -> None:
    assert re.search(rf"^\| `{field}`", PAGE, re.MULTILINE)


CODES = (
    words.BAD_FRAME,
    words.FRAME_TOO_LARGE,
    words.BAD_REQUEST,
    words.UNKNOWN_OP,
    words.UNKNOWN_TOKEN,
    words.UNKNOWN_REQUEST,
    words.NOT_OWNER,
    words.NOT_FOUND,
    words.FORBIDDEN,
    words.CONFLICT,
    words.LIMIT,
    words.SHUTTING_DOWN,
    words.INTERNAL,
)


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_its_row(code: str) -> None:
    assert f"| `{code}` |" in PAGE


@pytest.mark.parametrize("event", [*words.EVENTS, words.EVENTS_LOST])
def test_every_event_is_named(event: str) -> None:
    assert event in NAMED


def test_the_bounds_are_those_of_the_server() -> None:
    options = Options(version="0")
    for bound in (options.connections, options.connections_per_uid, options.refused_connections):
        assert f"{bound:,}" in PAGE
    assert f"{options.unsent_bytes_per_connection // 1024} KiB" in PAGE
    assert f"{options.unsent_bytes // 1024 // 1024} MiB" in PAGE
    assert f"{options.small_reply_bytes // 1024} KiB" in PAGE
