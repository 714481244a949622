"""`completion`: a script with which a shell completes the command line, made from the parser.

Commands, flags and fixed choices are written into the script, so that completing asks nothing and
starts nothing. What takes a path is left to the shell; behind `--` comes a command.
"""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from typing import NamedTuple

from libclient.cli import exits
from libclient.cli.grammar import WITH_COMMAND, parser
from libclient.cli.invocation import Invocation


class Flag(NamedTuple):
    """A flag: its spellings, what it says, whether it takes a value, and the values it knows."""

    names: tuple[str, ...]
    help: str
    takes: bool
    choices: tuple[str, ...]


class Level(NamedTuple):
    """What can follow after these commands: flags, further commands, fixed words."""

    path: tuple[str, ...]
    flags: tuple[Flag, ...]
    words: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """The commands as one word, for a case of a shell."""
        return "/".join(self.path)


def completion(invocation: Invocation) -> int:
    """Print the script of a shell."""
    script = {"bash": bash, "zsh": zsh, "fish": fish}[invocation.args.shell]()
    invocation.screen.line(script)
    return exits.OK


def levels() -> list[Level]:
    """Return every level of the command line, the whole first."""
    return list(_levels(parser(), ()))


def _levels(part: ArgumentParser, path: tuple[str, ...]) -> Iterator[Level]:
    flags, words, deeper = [], [], []
    for action in part._actions:
        if action.help == SUPPRESS:
            continue
        if isinstance(action, _SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            words += [(name, helps.get(name, "")) for name in action.choices]
            deeper += list(action.choices.items())
        elif action.option_strings:
            flags.append(_flag(action))
        else:
            words += [(str(choice), "") for choice in action.choices or ()]
    yield Level(path, tuple(flags), tuple(words))
    for name, inner in deeper:
        yield from _levels(inner, (*path, name))


def _flag(action: Action) -> Flag:
    text = (action.help or "").replace("%%", "%")
    choices = tuple(str(choice) for choice in action.choices or ())
    return Flag(tuple(action.option_strings), text, action.nargs != 0, choices)


def _names(level: Level) -> str:
    return " ".join(name for flag in level.flags for name in flag.names)


def _nested() -> str:
    """The commands that have commands of their own, for a case of a shell."""
    return "|".join(level.key for level in levels() if level.path and _has_deeper(level))


def _has_deeper(level: Level) -> bool:
    return any(other.path[:-1] == level.path for other in levels() if other.path)


def _with_value() -> list[str]:
    """Every spelling of a flag that takes a value."""
    spellings = {n for level in levels() for flag in level.flags if flag.takes for n in flag.names}
    return sorted(spellings)


def bash() -> str:
    """Return the script for bash."""
    cases, values = [], {}
    for level in levels():
        words = " ".join(word for word, _ in level.words)
        cases.append(f'    "{level.key}") words="{words}" flags="{_names(level)}" ;;')
        for flag in level.flags:
            for name in flag.names:
                if flag.takes:
                    values[f"{level.key}:{name}"] = " ".join(flag.choices)
    chosen = [
        f'    "{key}") COMPREPLY=($(compgen -W "{words}" -- "$cur")); return ;;'
        for key, words in values.items()
        if words
    ]
    return _BASH.format(
        cases="\n".join(cases),
        chosen="\n".join(chosen),
        with_value="|".join(_with_value()),
        with_command="|".join(WITH_COMMAND),
        nested=_nested(),
    )


_BASH = """\
# bash completion for gpuorch; printed by `gpuorch completion bash`
_gpuorch() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="" path="" words="" flags="" i word skip=""
  ((COMP_CWORD > 0)) && prev="${{COMP_WORDS[COMP_CWORD - 1]}}"
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${{COMP_WORDS[i]}}"
    if [[ -n $skip ]]; then skip=""; continue; fi
    case "$word" in
    --)
      # Behind it comes another command, with arguments of its own.
      if ((i + 1 == COMP_CWORD)); then
        COMPREPLY=($(compgen -c -- "$cur"))
      elif declare -F _command_offset >/dev/null; then
        _command_offset $((i + 1))
      else
        COMPREPLY=($(compgen -f -- "$cur"))
      fi
      return ;;
    {with_value}) skip=1 ;;
    -*) ;;
    *)
      case "$path" in
      "") path="$word" ;;
      {nested}) path="$path/$word" ;;
      esac ;;
    esac
  done
  case "$path:$prev" in
{chosen}
    *:--socket) COMPREPLY=($(compgen -f -- "$cur")); return ;;
  esac
  case "$prev" in
    {with_value}) return ;;
  esac
  case "$path" in
{cases}
  esac
  if [[ $cur == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$cur"))
    return
  fi
  case "$path" in
    {with_command}) words="--" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -F _gpuorch gpuorch"""


def zsh() -> str:
    """Return the script for zsh."""
    functions = []
    for level in levels():
        lines = [_zsh_flag(flag) for flag in level.flags]
        if level.words and _has_deeper(level):
            described = " ".join(_zsh_quoted(f"{w}:{_colons(h)}") for w, h in level.words)
            lines += ["'1:command:->command'", "'*::argument:->argument'"]
            body = _ZSH_DEEPER.format(
                described=described,
                cases="\n".join(
                    f"      {word}) {_zsh_name((*level.path, word))} ;;" for word, _ in level.words
                ),
            )
        else:
            body = ""
            if level.path and level.path[0] in WITH_COMMAND:
                lines.append("'*::command: _normal'")
            elif level.words:
                lines.append(_zsh_quoted(f"1:value:({' '.join(w for w, _ in level.words)})"))
        arguments = " \\\n    ".join(lines)
        functions.append(
            f"{_zsh_name(level.path)}() {{\n  local curcontext=$curcontext state line\n"
            f"  _arguments -C -S \\\n    {arguments}\n{body}}}"
        )
    head = "#compdef gpuorch\n# zsh completion for gpuorch; printed by `gpuorch completion zsh`\n"
    return head + "\n\n".join(functions) + '\n\n_gpuorch "$@"'


_ZSH_DEEPER = """\
  case $state in
    command) local -a commands=({described}); _describe command commands ;;
    argument)
      case $line[1] in
{cases}
      esac ;;
  esac
"""


def _zsh_name(path: tuple[str, ...]) -> str:
    return "_" + "_".join(("gpuorch", *path))


def _zsh_flag(flag: Flag) -> str:
    text = flag.help.replace("[", "(").replace("]", ")")
    value = ""
    if flag.takes:
        value = ":value:" + (f"({' '.join(flag.choices)})" if flag.choices else _zsh_value(flag))
    specs = [_zsh_quoted(f"{name}[{_colons(text)}]{value}") for name in flag.names]
    return " ".join(specs)


def _zsh_value(flag: Flag) -> str:
    return "_files" if "--socket" in flag.names else " "


def _colons(text: str) -> str:
    return text.replace(":", "\\:")


def _zsh_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def fish() -> str:
    """Return the script for fish."""
    lines = [
        "# fish completion for gpuorch; printed by `gpuorch completion fish`",
        "complete -c gpuorch -f",
    ]
    for level in levels():
        when = _fish_condition(level)
        for word, text in level.words:
            lines.append(f"complete -c gpuorch {when} -a {_fish_quoted(word)}{_fish_help(text)}")
        for flag in level.flags:
            spelt = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in flag.names
            )
            value = " -x" if flag.takes else ""
            if flag.choices:
                value += f" -a {_fish_quoted(' '.join(flag.choices))}"
            elif "--socket" in flag.names:
                value = " -r -F"
            lines.append(f"complete -c gpuorch {when} {spelt}{value}{_fish_help(flag.help)}")
    for name in WITH_COMMAND:
        lines.append(
            f"complete -c gpuorch -n '__fish_seen_subcommand_from {name}' "
            "-a '(__fish_complete_subcommand)'"
        )
    return "\n".join(lines)


def _fish_condition(level: Level) -> str:
    if not level.path:
        return "-n __fish_use_subcommand"
    seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in level.path)
    if _has_deeper(level):
        seen += f"; and not __fish_seen_subcommand_from {' '.join(w for w, _ in level.words)}"
    return f"-n '{seen}'"


def _fish_help(text: str) -> str:
    return f" -d {_fish_quoted(text)}" if text else ""


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
