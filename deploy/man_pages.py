"""Manual pages, made from the parsers that read the command lines: they cannot disagree."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterator

from libclient.version import VERSION


def man_page(parser: ArgumentParser, section: int, summary: str, see_also: str) -> str:
    """Return the page of one command, in the macros of man(7)."""
    name = parser.prog
    lines = [
        f'.TH {_text(name.upper())} {section} "" "gpuorchd {VERSION}" "gpuorchd"',
        ".SH NAME",
        rf"{_text(name)} \- {_text(summary)}",
        ".SH SYNOPSIS",
        _text(" ".join(parser.format_usage().split()).removeprefix("usage: ")),
    ]
    if parser.description:
        lines += [".SH DESCRIPTION", _text(parser.description)]
    lines += _options(parser)
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            lines += _commands(action)
    if parser.epilog:
        lines += [".SH NOTES", ".nf", _text(parser.epilog.strip()), ".fi"]
    lines += [".SH SEE ALSO", _text(see_also)]
    return "\n".join(lines) + "\n"


def _options(parser: ArgumentParser) -> Iterator[str]:
    yield ".SH OPTIONS"
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if _is_shown(action)]
        if not shown:
            continue
        if group.title and group.title not in ("options", "positional arguments"):
            yield f".SS {_text(group.title)}"
        for action in shown:
            yield from _option(action)


def _is_shown(action: Action) -> bool:
    return action.help != SUPPRESS and not isinstance(action, _SubParsersAction)


def _option(action: Action) -> Iterator[str]:
    yield ".TP"
    value = ""
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices)) if action.choices else ""
        value = str(action.metavar or choices or action.dest.upper())
    names = ", ".join(action.option_strings) or value
    yield rf"\fB{_text(names)}\fR" + (
        rf" \fI{_text(value)}\fR" if action.option_strings and value else ""
    )
    yield _text((action.help or "").replace("%%", "%"))


def _commands(action: _SubParsersAction[ArgumentParser]) -> Iterator[str]:
    yield ".SH COMMANDS"
    summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
    for name, part in action.choices.items():
        yield f".SS {_text(name)}"
        yield _text(part.description or summaries.get(name, ""))
        for option in part._actions:
            # The flags of every command are described once, above.
            common = {"-h", "--json", "--socket", "--timeout"} & set(option.option_strings)
            if _is_shown(option) and not common:
                yield from _option(option)
        if part.epilog:
            yield from (".PP", ".nf", _text(part.epilog), ".fi")


def _text(text: str) -> str:
    """Write text so that no line of it is taken for a macro and every hyphen stays one."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)
