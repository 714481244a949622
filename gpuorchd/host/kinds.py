"""The kinds of values that a setting can have: how one is read from text, and what is allowed.

A kind reads text that a person wrote in an env file or on a command line and gives the value, or
raises `ValueError`; what it allows is a phrase that is shown with every refusal, in `--help` and in
the docs. Nothing here knows which settings exist.
"""

from __future__ import annotations

import grp
import math
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Enum)

GID_MAX = 2**32 - 2
MODE_MIN = 0o600
MODE_MAX = 0o777
CARDS_MAX = 64
CARD_MB_MAX = 16_777_216

TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off"})


class Kind(NamedTuple, Generic[T]):
    """One kind of value. `show` writes a value the way `parse` reads it."""

    parse: Callable[[str], T]
    allowed: str
    metavar: str
    show: Callable[[T], str] = str


class SimulatedCards(NamedTuple):
    """Cards to be simulated: how many, and the memory of each in MiB."""

    cards: int
    memory_mb: int

    def __str__(self) -> str:
        return f"{self.cards}x{self.memory_mb}"


class LogLevel(Enum):
    """The least severe level that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(Enum):
    """How log lines are written.

    `auto` is `journal` under the journal, `console` on a terminal, else `json`.
    """

    AUTO = "auto"
    CONSOLE = "console"
    JSON = "json"
    JOURNAL = "journal"


def _flag(text: str) -> bool:
    word = text.lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError


def _digits(text: str) -> int:
    # int() alone would also take "1_000", "+5" and digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError
    return int(text)


def whole(low: int, high: int, *, meaning: str = "") -> Kind[int]:
    """A whole number from `low` to `high`. `meaning` explains a special value."""

    def parse(text: str) -> int:
        value = _digits(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return Kind(parse, f"a whole number from {low} to {high}{meaning}", "N")


def seconds(low: float, high: float, *, meaning: str = "") -> Kind[float]:
    """Seconds from `low` to `high`, fractions allowed."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text):
            raise ValueError
        value = float(text)
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError
        return value

    allowed = f"seconds from {low:.15g} to {high:.15g}{meaning}"
    return Kind(parse, allowed, "SECONDS", lambda value: f"{value:.15g}")


def choice(words: type[E]) -> Kind[E]:
    """One of the values of an enumeration of words, in any case."""
    by_word = {member.value: member for member in words}

    def parse(text: str) -> E:
        try:
            return by_word[text.lower()]
        except KeyError:
            raise ValueError from None

    return Kind(parse, f"one of {', '.join(by_word)}", "WORD", lambda member: str(member.value))


def _path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ValueError
    return path


def _mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ValueError
    mode = int(text, 8)
    if mode & MODE_MIN != MODE_MIN:
        raise ValueError
    return mode


def _group(text: str) -> int:
    if text.isdecimal():
        gid = _digits(text)
        if gid > GID_MAX:
            raise ValueError
        return gid
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError from None


def _cards(text: str) -> SimulatedCards:
    match = re.fullmatch(r"([0-9]{1,2})x([0-9]{1,8})", text.lower())
    if match is None:
        raise ValueError
    simulated = SimulatedCards(int(match[1]), int(match[2]))
    if not 1 <= simulated.cards <= CARDS_MAX or not 1 <= simulated.memory_mb <= CARD_MB_MAX:
        raise ValueError
    return simulated


FLAG = Kind(_flag, "true or false (1/0, yes/no, on/off)", "BOOL", lambda flag: str(flag).lower())
PATH = Kind(_path, "an absolute path", "PATH")
MODE = Kind(
    _mode,
    "an octal mode from 0600 to 0777 that lets the owner read and write",
    "MODE",
    lambda mode: f"{mode:04o}",
)
GROUP = Kind(_group, "the name of a group of this host, or a gid", "GROUP")
CARDS = Kind(
    _cards,
    f"COUNTxMIB, 1 to {CARDS_MAX} cards of 1 to {CARD_MB_MAX} MiB, such as 2x81920",
    "COUNTxMIB",
)
LOG_LEVEL = choice(LogLevel)
LOG_FORMAT = choice(LogFormat)
