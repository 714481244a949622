"""The command line, its help and docs/cli.md say the same."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import pytest

from libclient.cli import exits, grammar
from libclient.cli.completion import levels
from libclient.cli.main import main
from libclient.errors import RequestError
from libclient.wire import vocabulary
from tests.support.sources import ROOT

DOCS = (ROOT / "docs" / "cli.md").read_text()
SECTIONS = {
    match[1]: match[2]
    for match in re.finditer(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", DOCS, re.MULTILINE | re.DOTALL)
}
EXAMPLES = [
    line
    for block in re.findall(r"^```\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
HELP_EXAMPLES = [line for command in grammar.COMMANDS for line, _ in command.examples]


def words_of(line: str) -> list[str]:
    """The arguments of an example; what the shell does with its output is left out."""
    words = shlex.split(line)
    end = next((n for n, word in enumerate(words) if word in {">", "&&", "|"}), len(words))
    assert words[0] == "gpuorch", line
    return words[1:end]


@pytest.mark.parametrize("line", [*EXAMPLES, *HELP_EXAMPLES])
def test_an_example_is_understood(line: str) -> None:
    assert grammar.read(words_of(line)).command == words_of(line)[0]


def test_every_command_has_a_section_and_every_section_a_command() -> None:
    assert set(SECTIONS) == {command.name for command in grammar.COMMANDS}


@pytest.mark.parametrize("level", [entry for entry in levels() if entry.path], ids=lambda e: e.key)
def test_every_flag_of_a_command_is_in_its_section(level: object) -> None:
    assert hasattr(level, "path")
    assert hasattr(level, "flags")
    known = {*grammar.COMMON_FLAGS, "-h", "--help"}
    names = {name for flag in level.flags for name in flag.names} - known
    section = SECTIONS[level.path[0]]
    assert [name for name in sorted(names) if f"`{name}" not in section] == []


def test_the_docs_name_no_flag_that_is_not_there() -> None:
    flags = {name for level in levels() for flag in level.flags for name in flag.names}
    named = set(re.findall(r"`(--?[a-z][a-z-]*)", DOCS))
    assert named - flags == set()
    assert set(grammar.COMMON_FLAGS) <= named


def test_the_exit_codes_are_one_table() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", DOCS, re.MULTILINE)
    assert rows == [(str(row.code), row.meaning) for row in exits.TABLE]
    listed = {row.code for row in exits.TABLE}
    named = [value for name, value in vars(exits).items() if name.isupper()]
    assert listed == {value for value in named if isinstance(value, int)}


def test_every_error_code_of_the_contract_has_an_exit_code() -> None:
    codes = {
        name: exits.of_refusal(RequestError(getattr(vocabulary, name), ""))
        for name in ("FORBIDDEN", "LIMIT", "CONFLICT", "SHUTTING_DOWN", "INTERNAL", "NOT_FOUND")
    }
    assert codes == {
        "FORBIDDEN": 77,
        "LIMIT": 75,
        "CONFLICT": 75,
        "SHUTTING_DOWN": 75,
        "INTERNAL": 70,
        "NOT_FOUND": 65,
    }


@pytest.mark.parametrize("command", grammar.COMMANDS, ids=lambda command: command.name)
def test_every_command_is_there_and_has_help(
    command: grammar.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, function = command.handler.partition(":")
    assert callable(getattr(import_module(f"libclient.cli.{module}"), function))
    with pytest.raises(SystemExit) as ended:
        grammar.read([command.name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert all(line in shown for line, _ in command.examples)


def test_flags_of_every_command_stand_before_or_after_it() -> None:
    for line in (
        "--json --socket /s status",
        "status --json --socket /s",
        "--json status --socket /s",
    ):
        args = grammar.read(line.split())
        assert (args.json, args.socket, args.timeout) == (True, "/s", grammar.TIMEOUT_S)
    assert grammar.read(["--timeout", "250ms", "policy", "get"]).timeout == 0.25
    assert grammar.read(["policy", "get", "--timeout", "1m"]).timeout == 60


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run --mem 4GiB -- python x.py --mem 1 --json", "python x.py --mem 1 --json"),
        ("run -- sh -c x -- y", "sh -c x -- y"),
        ("run --mem 4GiB python x.py --flag", "python x.py --flag"),
        ("run python -- --flag", "python -- --flag"),
        ("--json run --wait 5m -- run", "run"),
        ("run", ""),
        ("explain -- cmd -h", "cmd -h"),
    ],
)
def test_the_command_to_run_is_left_as_it_is(line: str, words: str) -> None:
    assert grammar.read(line.split()).words == words.split()


def test_a_line_of_run_can_be_explained() -> None:
    line = "--mem 4GiB --wait 5m --fallback cpu --signal TERM -q -- python x.py"
    run = grammar.read(["run", *line.split()])
    explain = grammar.read(["explain", *line.split()])
    assert (run.mem, run.wait, run.words) == (explain.mem, explain.wait, explain.words)


@pytest.mark.parametrize(
    "line",
    [
        "stat", "status extra", "run --mem lots -- x", "run --mem -1 -- x", "run --gpus 0 -- x",
        "run --gpus 65 -- x", "run --wait 8d -- x", "run --wait soon -- x",
        "run --priority vip -- x",
        "run --fallback maybe -- x", "run --signal KILL -- x", "run --me 4GiB -- x", "cordon",
        "revoke", "revoke x --grace 2d", "policy", "policy set", "policy set a=1 --if-revision x",
        "events --topic news", "events --for 0s", "events --for 9999999999999",
        "run --expected 366d -- x", "cordon 9999999999999999999999",
        "run --device 9999999999999999999999 -- x",
        "completion tcsh", "--timeout 2d health",
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused_in_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == exits.USAGE
    said = capsys.readouterr().err
    assert said.startswith("gpuorch")
    assert said.count("\n") == 1
    assert "--help)" in said
