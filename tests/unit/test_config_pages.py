"""The pages about settings say what the daemon does."""

from __future__ import annotations

import re

from gpuorchd.config import TABLE
from gpuorchd.config_reading import read_config
from libclient.ports import daemon_port
from tests.support.config_pages import EXAMPLE, PAGE, env_example, page_with_tables

AGAIN = "run: python -m tests.support.config_pages"


def test_the_page_lists_every_setting_as_the_daemon_has_it() -> None:
    page = PAGE.read_text()
    assert page == page_with_tables(page), AGAIN
    for row in TABLE:
        assert f"| `{row.variable}` | `{row.flag}` |" in page


def test_the_example_env_file_explains_every_variable() -> None:
    example = EXAMPLE.read_text()
    assert example == env_example(), AGAIN
    for row in TABLE:
        assert re.search(rf"^# .*\n#{row.variable}=", example, re.MULTILINE), row.variable


def test_the_example_env_file_changes_nothing_when_all_of_it_is_uncommented() -> None:
    rendered = EXAMPLE.read_text().replace("@PORT@", str(daemon_port()))
    lines = re.findall(r"^#([A-Z_]+)=(.*)$", rendered, re.MULTILINE)
    assert len(lines) == len(TABLE)
    assert read_config({}, dict(lines)).config == read_config({}, {}).config
    assert not read_config({}, dict(lines)).warnings


def test_no_two_settings_share_a_variable_or_a_flag() -> None:
    assert len({row.variable for row in TABLE}) == len(TABLE)
    assert len({row.flag for row in TABLE}) == len(TABLE)
