"""Text on a terminal: harmless, measured, cut to fit, and coloured where that is wanted.

What other users wrote (agents, purposes, reasons) can hold anything. `safe` makes it show as what
it is: no control character, no right-to-left override, no line break reaches the terminal.
"""

from __future__ import annotations

from collections.abc import Callable

# SGR numbers of ECMA-48. Eight colours: every terminal has them, in a shade its user chose.
_STYLES = {
    "bold": "1",
    "dim": "2",
    "reverse": "7",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}

Paint = Callable[[str, str], str]


def plain(text: str, style: str) -> str:
    """Return the text as it is: a `Paint` for files, pipes and NO_COLOR."""
    del style
    return text


def coloured(text: str, style: str) -> str:
    """Return the text in a style such as `bold red`; an empty style changes nothing."""
    if not style or not text:
        return text
    codes = ";".join(_STYLES[word] for word in style.split())
    return f"\x1b[{codes}m{text}\x1b[0m"


def safe(value: object) -> str:
    """Return a value as text of one line in which nothing can steer a terminal."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def cells(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(
        0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text
    )


def cut(text: str, width: int, ellipsis: str = "…") -> str:
    """Return a text of at most `width` columns; what is cut off ends in an ellipsis."""
    if cells(text) <= width:
        return text
    kept, room = [], width - cells(ellipsis)
    for char in text:
        room -= cells(char)
        if room < 0:
            break
        kept.append(char)
    return "".join(kept) + ellipsis if width >= cells(ellipsis) else ""


def counted(number: int, noun: str) -> str:
    """Return `1 GPU`, `2 GPUs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
