"""The runbook, as it was installed: every command of it, in order, under a real systemd."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from libclient import ports
from tests.systemd.rig import DAEMON, PYTHON, SOCKETS, Rig

pytestmark = [pytest.mark.serial, pytest.mark.slow]

RUNBOOK = "/usr/share/doc/gpuorchd/fresh-start.md"
AGENT = "/opt/justnews/bin/agent"
# Takes its lease, and answers /health where the port map says.
SERVING_AGENT = f"""\
#!{PYTHON} -I
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
import libclient
from libclient.ports import port_map

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

lease = libclient.lease(sys.argv[1], "1GiB")
port = next(entry.port for entry in port_map() if entry.name == sys.argv[1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# On simulated cards, as the page says.
REHEARSAL = "GPUORCH_SIMULATE=2x81920"


class Block:
    """One fenced block of commands, under its heading, with the lines that it is to show."""

    def __init__(self, heading: str, commands: str) -> None:
        self.heading = heading
        self.commands = commands
        self.shown: list[str] = []


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page in order."""
    found: list[Block] = []
    heading = ""
    for match in re.finditer(r"^## ([^\n]*)$|^```(sh|text)\n(.*?)^```$", page, re.M | re.S):
        if match[1]:
            heading = match[1]
        elif match[2] == "sh":
            found.append(Block(heading, match[3]))
        else:
            found[-1].shown += match[3].splitlines()
    return found


@pytest.fixture
def host(rig: Rig) -> Iterator[Rig]:
    """A host where all runs already, an old setting and old artifacts among it."""
    before = rig.path(AGENT).read_text()
    rig.write(AGENT, SERVING_AGENT, 0o755)
    rig.gpuorch("health")
    rig.run("gpuorch", "policy", "set", "max_memory_per_agent_mb=4GiB")
    rig.systemctl("start", "justnews@analyst")
    yield rig
    rig.write(AGENT, before, 0o755)


def test_the_runbook_leads_to_a_daemon_that_is_known_to_be_well(host: Rig) -> None:
    definitions, *steps = blocks(host.path(RUNBOOK).read_text())
    assert len(steps) >= 9
    prepared = definitions.commands.replace("NVML=true", "NVML=false")
    assert prepared != definitions.commands
    for step in steps:
        done = run(host, prepared + step.commands)
        assert done.returncode == 0, f"{step.heading}:\n{done.stdout}{done.stderr}"
        for line in step.shown:
            assert line in done.stdout, f"{step.heading}: {line!r} in\n{done.stdout}{done.stderr}"
        if "$EXAMPLE" in step.commands:
            run(host, f'{prepared}echo {REHEARSAL} >>"$ENV"')
    agents = {entry.name for entry in ports.port_map() if entry.kind == ports.AGENT}
    assert all(host.is_active(f"justnews@{name}.service") for name in agents)
    assert all(host.is_active(unit) for unit in (*SOCKETS, DAEMON))
    kept = {path.name for path in host.path("/var/tmp/fresh-start").iterdir()}
    assert {"settings.json", "denied.json", "granted.json", "1-before.prom"} <= kept
    # What was set at run time before has gone.
    policy = host.gpuorch("policy", "get", "max_memory_per_agent_mb").stdout
    assert policy.split()[-1] == "0", policy


def test_the_runbook_names_the_paths_of_the_installation(rig: Rig) -> None:
    page = rig.path(RUNBOOK).read_text()
    assert "/usr/share/doc/gpuorchd/gpu_orchestrator.env.example" in page
    assert "/usr/local" not in page


def run(rig: Rig, commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands as root inside, stopping at the first that fails."""
    return rig.run("bash", "-e", "-o", "pipefail", "-c", commands, check=False, timeout_s=110)
