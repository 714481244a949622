"""Every event that the code names is in the catalogue, with the fields that it is given."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from gpuorchd.observe.events import CATALOGUE
from libclient.wire.vocabulary import EVENTS
from tests.support.sources import ROOT, python_files, tree_of

NAME = re.compile(r"[a-z]+\.[a-z_]+")
# What is called with the name of an event first.
TELLERS = {"report", "_report", "event", "Announce"}


class Told(NamedTuple):
    """One place where an event is told. `fields` is None where they cannot be read off."""

    where: str
    name: str
    fields: frozenset[str] | None


def _told() -> Iterator[Told]:
    for path in python_files("gpuorchd"):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func
            teller = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            first = node.args[0]
            if teller not in TELLERS or not isinstance(first, ast.Constant):
                continue
            if not isinstance(first.value, str) or not NAME.fullmatch(first.value):
                continue
            words = [word.arg for word in node.keywords]
            fields: frozenset[str] | None = frozenset(word for word in words if word)
            if teller == "Announce" or None in words:
                fields = None
            yield Told(f"{path.relative_to(ROOT)}:{node.lineno}", first.value, fields)


def test_every_event_that_is_told_is_declared() -> None:
    told = list(_told())
    assert len(told) > 20, "the search found too little to be believed"
    assert not [entry for entry in told if entry.name not in CATALOGUE]


def test_every_field_that_is_told_is_declared() -> None:
    wrong = [
        (entry.where, sorted(entry.fields - set(CATALOGUE[entry.name].fields)))
        for entry in _told()
        if entry.fields is not None and entry.name in CATALOGUE
    ]
    assert not [entry for entry in wrong if entry[1]]


def test_every_event_of_the_wire_can_be_logged() -> None:
    assert set(EVENTS) <= set(CATALOGUE)


def test_names_say_area_and_what_happened_and_fields_end_in_their_unit() -> None:
    units = {"seconds": "_s", "MiB": "_mb", "bytes": "_bytes"}
    for name, kind in CATALOGUE.items():
        assert NAME.fullmatch(name)
        assert kind.meaning
        for field, holds in kind.fields.items():
            assert field.endswith(units.get(holds, "")), f"{name}: {field} holds {holds}"
