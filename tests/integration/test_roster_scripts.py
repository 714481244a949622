"""`justnews-health` and `justnews-enable-all` on ports and units of a test's own."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from libclient import ports
from libclient.cli import exits, roster_health, roster_start
from tests.support.daemon_process import running_daemon, wait_until

Answers = dict[str, tuple[int, dict[str, object]]]
WELL: Answers = {"/health": (200, {"status": "ok"})}


@contextmanager
def program(answers: Answers) -> Iterator[int]:
    """Something that speaks HTTP on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, document = answers.get(self.path, (404, {}))
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def use_map(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(*entries: ports.Entry) -> None:
        for module in (roster_health, roster_start):
            monkeypatch.setattr(module, "port_map", lambda: entries)

    return use


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def entry(name: str, port: int, kind: str = ports.AGENT) -> ports.Entry:
    return ports.Entry(name, port, kind, "")


def health(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
    """Run the command; return its code and the state of each program."""
    capsys.readouterr()
    code = roster_health.main(["--json", "--timeout", "2s", *words])
    document = json.loads(capsys.readouterr().out)
    return code, {one["name"]: one["state"] for one in document["programs"]}


def test_all_is_well_with_a_real_daemon_and_an_agent(
    tmp_path: Path, use_map: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    flags = ("--simulate", "1x1024", "--http-port", str(port))
    with running_daemon(tmp_path, *flags) as daemon, program(WELL) as agent:
        use_map(entry("gpu_orchestrator", port, ports.DAEMON), entry("analyst", agent))
        daemon.wait_for_log("http.bound")
        wait_until(lambda: health(capsys)[0] == exits.OK, "justnews-health finds all of them well")
        assert health(capsys)[1] == {"gpu_orchestrator": "ok", "analyst": "ok"}
    assert health(capsys) == (
        exits.UNAVAILABLE,
        {"gpu_orchestrator": "down", "analyst": "down"},
    )


def test_each_kind_of_failure_has_its_word(
    use_map: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    not_ready: Answers = {
        "/health": (200, {"status": "ok", "safe_mode": False}),
        "/ready": (503, {"ready": False, "checks": {"nvml": {"ok": False, "detail": "no NVML"}}}),
    }
    with ExitStack() as stack:
        mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        use_map(
            entry("gpu_orchestrator", stack.enter_context(program(not_ready)), ports.DAEMON),
            entry("analyst", stack.enter_context(program(WELL))),
            entry("scout", stack.enter_context(program({"/health": (500, {})}))),
            entry("critic", free_port()),
            entry("memory", mute.getsockname()[1]),
        )
        code, states = health(capsys, "--timeout", "200ms")
        assert states == {
            "gpu_orchestrator": "not ready",
            "analyst": "ok",
            "scout": "unwell",
            "critic": "down",
            "memory": "unwell",
        }
        assert code == exits.NO
        assert health(capsys, "analyst") == (exits.OK, {"analyst": "ok"})
        assert roster_health.main([]) == exits.NO
        assert "nvml: no NVML" in capsys.readouterr().out


def test_another_program_on_the_port_of_the_daemon_is_not_taken_for_it(
    use_map: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with program(WELL) as port:
        use_map(entry("gpu_orchestrator", port, ports.DAEMON))
        assert health(capsys) == (exits.UNAVAILABLE, {"gpu_orchestrator": "unwell"})


def test_a_name_that_is_not_in_the_map_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert roster_health.main(["analist"]) == exits.USAGE
    assert "known: " in capsys.readouterr().err
    assert roster_start.main(["analist"]) == exits.USAGE
    assert "known: " in capsys.readouterr().err


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that writes down what it is asked for; it refuses what is in `broken`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "systemctl"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >>{tmp_path}/asked\n'
        f'if grep -qsx -e "$3" {tmp_path}/broken; then echo "Job for $3 failed." >&2; exit 1; fi\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def asked(units: Path) -> list[str]:
    return [
        line.removeprefix("--no-ask-password ")
        for line in (units / "asked").read_text().splitlines()
    ]


def test_the_daemon_is_started_first_then_agents_behind_the_gate(
    units: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_daemon(units, "--simulate", "1x1024") as daemon:
        monkeypatch.setenv("GPUORCH_SOCKET", str(daemon.socket))
        assert roster_start.main(["--gate", "20s"]) == exits.OK
    agents = [one.name for one in ports.port_map() if one.kind == ports.AGENT]
    expected = ["gpu_orchestrator", *agents]
    assert asked(units) == [f"start justnews@{name}.service" for name in expected]


def test_a_gate_that_stays_closed_starts_no_agent(
    units: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUORCH_SOCKET", str(units / "nobody"))
    assert roster_start.main(["--gate", "100ms", "analyst"]) == exits.UNAVAILABLE
    assert asked(units) == ["start justnews@gpu_orchestrator.service"]
    assert "gpuorch doctor" in capsys.readouterr().err
    assert roster_start.main(["--gate", "100ms", "--without-gate", "analyst"]) == exits.OK
    assert asked(units)[-1] == "start justnews@analyst.service"


def test_an_agent_that_fails_is_named_and_the_others_are_started(
    units: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (units / "broken").write_text("justnews@analyst.service\n")
    with running_daemon(units, "--simulate", "1x1024") as daemon:
        monkeypatch.setenv("GPUORCH_SOCKET", str(daemon.socket))
        assert roster_start.main(["--boot", "analyst", "scout"]) == exits.NO
    said = capsys.readouterr().err
    assert "justnews@analyst.service: Job for" in said
    assert "journalctl -u justnews@analyst.service" in said
    assert "enable justnews@scout.service" in asked(units)


def test_a_daemon_that_does_not_start_ends_it_with_its_reason(
    units: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (units / "broken").write_text("justnews@gpu_orchestrator.service\n")
    assert roster_start.main([]) == exits.UNAVAILABLE
    assert asked(units) == ["start justnews@gpu_orchestrator.service"]
    assert "justnews@gpu_orchestrator.service" in capsys.readouterr().err
