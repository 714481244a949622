"""Templates: text with names such as @PORT@ in it that an installation gives values.

A name that no value is known for is an error, so that none of them reaches a host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from deploy.places import InstallError, Places
from libclient.ports import Entry, daemon

NAME = re.compile(r"@([A-Z_]+)@")


def values(places: Places, entries: tuple[Entry, ...], python: Path) -> dict[str, str]:
    """Return every name that a template may use, with its value."""
    return {
        "BINDIR": str(places.bindir),
        "LIBDIR": str(places.libdir),
        "SYSCONFDIR": str(places.sysconfdir),
        "DOCDIR": str(places.docdir),
        "PYTHON": str(python),
        "PORT": str(daemon(entries).port),
    }


def render(text: str, known: Mapping[str, str], name: str) -> str:
    """Return the text with every name replaced. Raises `InstallError` for one that is unknown."""
    unknown = sorted({match[1] for match in NAME.finditer(text)} - set(known))
    if unknown:
        raise InstallError(f"{name} uses @{unknown[0]}@; known: {', '.join(sorted(known))}")
    return NAME.sub(lambda match: known[match[1]], text)
