"""What `run` settles before it asks for anything: the command and the name."""

from __future__ import annotations

from pathlib import Path

import pytest

from libclient.cli.faults import CannotRun
from libclient.cli.naming import agent_name, service_name
from libclient.cli.progress import describe
from libclient.cli.running import environment, find


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        ("0::/system.slice/analyst.service", "analyst"),
        ("0::/system.slice/analyst.service/worker.service", "analyst"),
        ("0::/news.slice/news-gpu.slice/scout.service", "scout"),
        ("0::/system.slice/system-justnews.slice/justnews@scout.service", "justnews@scout"),
        ("0::/system.slice/_memory.service", "memory"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.service", None),
        ("0::/user.slice/user-1000.slice/session-3.scope", None),
        ("0::/", None),
        ("", None),
        ("12:pids:/a.service\n1:name=systemd:/system.slice/b.service\n0::/", "b"),
    ],
)
def test_the_name_is_that_of_the_system_service(cgroup: str, name: str | None) -> None:
    assert service_name(cgroup) == name


def test_a_name_that_was_given_goes_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUORCH_AGENT", "from-variable")
    assert agent_name("given", ["/usr/bin/python"]) == "given"
    assert agent_name(None, ["/usr/bin/python"]) == "from-variable"


def test_without_a_service_the_command_gives_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUORCH_AGENT", raising=False)
    monkeypatch.setattr("libclient.cli.naming._own_cgroup", lambda: "0::/")
    assert agent_name(None, ["/usr/bin/python", "x.py"]) == "python"
    assert agent_name(None, []) == "gpuorch"


def test_a_command_is_found_as_a_shell_finds_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    tool = second / "tool"
    tool.write_text("#!/bin/sh\n")
    search = f"{first}:{second}"
    with pytest.raises(CannotRun, match="permission denied") as refused:
        find("tool", search)
    assert refused.value.code == 126
    tool.chmod(0o755)
    # A file that cannot be executed does not hide one further on.
    (first / "tool").write_text("")
    assert find("tool", search) == str(tool)
    assert find(str(tool), None) == str(tool)
    with pytest.raises(CannotRun, match="not found") as missing:
        find("tool", str(first / "nowhere"))
    assert missing.value.code == 127
    with pytest.raises(CannotRun, match="is a directory"):
        find(str(first), None)
    with pytest.raises(CannotRun, match="empty"):
        find("", search)


def test_the_command_gets_our_environment_and_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUORCH_LEASE_ID", "of a run around this one")
    monkeypatch.setenv("KEPT", "yes")
    result = environment({"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert result["KEPT"] == "yes"
    assert result["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert "GPUORCH_LEASE_ID" not in result


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"agent": "a", "min_memory_mb": 4096}, "4 GiB as a"),
        ({"agent": "a", "min_memory_mb": 512, "gpus": 2}, "512 MiB on each of 2 GPUs as a"),
        ({"agent": "a", "exclusive": True, "gpus": 2}, "2 whole GPUs as a"),
        ({"agent": "a"}, "GPU memory as a"),
    ],
)
def test_a_request_is_told_in_words(fields: dict[str, object], words: str) -> None:
    assert describe(fields) == words
