r"""The env file: systemd's `EnvironmentFile=` syntax, read by the daemon itself and strictly.

The daemon reads the file, and not the service manager, so that a reload sees what was edited. What
is accepted means the same here as to systemd; what systemd would pass over in silence (a line
without `=`, a name that cannot be, a quote that never ends) is an `EnvFileError` with its line,
because a setting that was meant and has no effect is worse than none.

    name = value            blanks around both go; a name has letters, digits and _
    # or ; begins a comment, in the first column that is not blank
    a backslash             keeps the next character, or joins the next line
    'single quotes'         keep everything; several quoted pieces are joined
    "double quotes"         keep everything but \ before " \ ` $ and before a line's end

Nothing is expanded: `$NAME` stays as it is.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# A megabyte of settings is no env file, and must not take the memory of a daemon that reloads.
FILE_BYTES_MAX = 1_048_576
BLANKS = " \t"
# What a backslash inside double quotes takes its meaning from; before others it is itself.
ESCAPED_IN_QUOTES = '"\\`$'
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class EnvFileError(Exception):
    """A file that cannot be read, or a line that cannot be. `str()` is one line for a person."""

    def __init__(self, path: str, line: int | None, reason: str) -> None:
        place = path if line is None else f"{path}:{line}"
        super().__init__(f"{place}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason


@dataclass(frozen=True, slots=True)
class EnvFile:
    """What a file sets. `lines` says where each variable stands; `warnings` are for the log."""

    path: str
    variables: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_env_file(named: str) -> EnvFile:
    """Read the file that `named` names; after a leading `-` it may be missing, as in a unit.

    Raises `EnvFileError` where it cannot be read, or holds what cannot be.
    """
    path = named.removeprefix("-")
    if not Path(path).is_absolute():
        raise EnvFileError(path, None, "the path of an env file has to be absolute")
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if named.startswith("-"):
            return EnvFile(path)
        raise EnvFileError(path, None, "there is no such file") from None
    except OSError as error:
        raise EnvFileError(path, None, f"cannot be opened: {error.strerror}") from None
    try:
        mode = os.fstat(number).st_mode
        if not stat.S_ISREG(mode):
            raise EnvFileError(path, None, "is not a regular file")
        data = _read_whole(number)
    except OSError as error:
        raise EnvFileError(path, None, f"cannot be read: {error.strerror}") from None
    finally:
        os.close(number)
    if len(data) > FILE_BYTES_MAX:
        raise EnvFileError(path, None, f"has more than {FILE_BYTES_MAX} bytes")
    parsed = parse_env_file(path, data)
    warnings = (*_mode_warnings(path, mode), *parsed.warnings)
    return EnvFile(path, parsed.variables, parsed.lines, warnings)


def _read_whole(number: int) -> bytes:
    """Read the file up to one byte more than is allowed."""
    data = b""
    while len(data) <= FILE_BYTES_MAX and (part := os.read(number, FILE_BYTES_MAX + 1)):
        data += part
    return data


def parse_env_file(path: str, data: bytes) -> EnvFile:
    """Read the content of a file; `path` is for messages. Raises `EnvFileError`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise EnvFileError(path, line, "is not UTF-8") from None
    variables: dict[str, str] = {}
    lines: dict[str, int] = {}
    warnings: list[str] = []
    for line, name, value in _Reader(path, text).assignments():
        if name in variables:
            warnings.append(f"{path}:{line}: {name} is set again; line {lines[name]} has no effect")
        variables[name] = value
        lines[name] = line
    return EnvFile(path, variables, lines, tuple(warnings))


def _mode_warnings(path: str, mode: int) -> Iterator[str]:
    if mode & stat.S_IROTH:
        yield f"{path} can be read by everyone (mode {mode & 0o7777:04o}); chmod 0640 {path}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield (
            f"{path} can be changed by others than its owner (mode {mode & 0o7777:04o}); "
            f"chmod 0640 {path}"
        )


class _Reader:
    """One pass over a text, character by character, as systemd makes it."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._text = text
        self._at = 0
        self._line = 1

    def assignments(self) -> Iterator[tuple[int, str, str]]:
        """Give line, name and value of each assignment."""
        while (char := self._next()) is not None:
            if char in BLANKS or char == "\n":
                continue
            if char in "#;":
                self._skip_comment()
                continue
            line = self._line
            name = self._name(char)
            yield line, name, self._value(name)

    def _next(self) -> str | None:
        """Take the next character, None at the end."""
        if self._at == len(self._text):
            return None
        char = self._text[self._at]
        self._at += 1
        if char == "\0":
            raise self._wrong("has a NUL byte")
        if char == "\r":
            # It would end a line outside quotes and be part of the value inside.
            raise self._wrong("has a carriage return: lines end with a line feed alone")
        if char == "\n":
            self._line += 1
        return char

    def _wrong(self, reason: str, line: int | None = None) -> EnvFileError:
        return EnvFileError(self._path, line or self._line, reason)

    def _skip_comment(self) -> None:
        line = self._line
        last = ""
        while (char := self._next()) not in (None, "\n"):
            assert char is not None
            last = char
        if last == "\\":
            # Older versions of systemd take the next line for comment as well, newer ones do not.
            raise self._wrong("a comment ends in a backslash", line)

    def _name(self, first: str) -> str:
        line = self._line
        text = ""
        char: str | None = first
        while char != "=":
            if char is None or char == "\n":
                raise self._wrong(f"{_shown(text)} has no =", line)
            text += char
            char = self._next()
        name = text.rstrip(BLANKS)
        if not NAME.fullmatch(name):
            hint = "; leave `export` out" if name.startswith("export ") else ""
            allowed = "letters, digits and _, no digit first"
            raise self._wrong(f"name {_shown(name)}; allowed: {allowed}{hint}", line)
        return name

    def _value(self, name: str) -> str:
        """Read what is behind the `=`, up to the end of the line."""
        value = ""
        while (char := self._next()) not in (None, "\n"):
            assert char is not None
            if char in BLANKS:
                continue
            if char in "'\"":
                value += self._quoted(char, name)
            else:
                return value + self._bare(char)
        return value

    def _quoted(self, quote: str, name: str) -> str:
        line = self._line
        value = ""
        while (char := self._next()) != quote:
            if char is None:
                raise self._wrong(f"the {quote} in the value of {name} is never closed", line)
            if char == "\\" and quote == '"':
                char = self._after_backslash_in_quotes(name, line)
            value += char
        return value

    def _after_backslash_in_quotes(self, name: str, line: int) -> str:
        char = self._next()
        if char is None:
            raise self._wrong(f'the " in the value of {name} is never closed', line)
        if char == "\n":
            return ""
        return char if char in ESCAPED_IN_QUOTES else "\\" + char

    def _bare(self, first: str) -> str:
        """Read a value without quotes; blanks at its end go, unless a backslash keeps them."""
        value, kept = "", 0
        char: str | None = first
        while char is not None and char != "\n":
            if char == "\\":
                escaped = self._next()
                if escaped is None:
                    raise self._wrong("the file ends in a backslash")
                if escaped != "\n":
                    value += escaped
                kept = len(value)
            else:
                value += char
                if char not in BLANKS:
                    kept = len(value)
            char = self._next()
        return value[:kept]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
