"""The port map: one file, read strictly, and nowhere else a copy of its numbers."""

from __future__ import annotations

import re
import subprocess

import pytest

from gpuorchd.config import Config
from libclient import ports
from tests.support.sources import ROOT

SMALL = "bus 8000 service the bus\ngpu_orchestrator 9014 daemon leases\n"


def test_every_entry_has_a_name_a_port_and_a_kind_of_its_own() -> None:
    entries = ports.port_map()
    assert len({entry.name for entry in entries}) == len(entries)
    assert len({entry.port for entry in entries}) == len(entries)
    assert {entry.kind for entry in entries} == set(ports.KINDS)


def test_the_daemon_listens_by_default_where_the_map_says() -> None:
    (entry,) = (entry for entry in ports.port_map() if entry.kind == ports.DAEMON)
    assert Config().http_port == ports.daemon_port() == entry.port


def test_the_port_of_the_daemon_stands_in_no_other_source_file() -> None:
    number = re.compile(rf"\b{ports.daemon_port()}\b")
    listed = subprocess.run(
        ["git", "ls-files", "gpuorchd", "libclient", "systemd", "deploy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    having = [name for name in listed if number.search((ROOT / name).read_text())]
    assert having == [str(ports.FILE.relative_to(ROOT))]


def test_another_port_for_the_daemon_changes_its_line_alone() -> None:
    changed = ports.parse(ports.with_daemon_port(SMALL, 18014))
    assert [(entry.name, entry.port) for entry in changed] == [
        ("bus", 8000),
        ("gpu_orchestrator", 18014),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bus 8000 service\n", "line 1"),
        (f"{SMALL}Bus 1 service x\n", "name 'Bus'"),
        (f"{SMALL}web 0 service x\n", "port '0'"),
        (f"{SMALL}web 65536 service x\n", "port '65536'"),
        (f"{SMALL}web 80 server x\n", "kind 'server'"),
        (f"{SMALL}bus 80 service x\n", "name bus stands"),
        (f"{SMALL}web 8000 service x\n", "port 8000 stands"),
        (f"{SMALL}other 80 daemon x\n", "2 entries of kind daemon"),
        ("bus 8000 service the bus\n", "0 entries of kind daemon"),
    ],
)
def test_a_map_that_cannot_be_is_refused_naming_the_reason(text: str, said: str) -> None:
    with pytest.raises(ports.PortMapError, match=said):
        ports.parse(text)


@pytest.mark.parametrize("port", [8000, 0, 70000])
def test_the_daemon_takes_no_port_of_another_and_none_that_is_none(port: int) -> None:
    with pytest.raises(ports.PortMapError):
        ports.with_daemon_port(SMALL, port)
