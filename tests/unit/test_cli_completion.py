"""Completion scripts: right for their shells, and complete."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from libclient.cli.completion import bash, fish, levels, zsh

SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_command_and_flag_is_in_the_script(shell: str) -> None:
    script = SCRIPTS[shell]()
    for level in levels():
        for word, _ in level.words:
            assert word in script
        for flag in level.flags:
            for name in flag.names:
                assert (name if shell != "fish" else name.lstrip("-")) in script


def test_the_bash_script_is_valid() -> None:
    subprocess.run(["bash", "-n"], input=bash(), text=True, check=True)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_scripts_are_valid_where_their_shells_are(shell: str) -> None:
    if shutil.which(shell) is None:
        # No shell of this kind: what can be said without one is that quotes are closed.
        script = SCRIPTS[shell]().replace("\\'", "")
        assert script.count("'") % 2 == 0
        return
    subprocess.run([shell, "-n", "/dev/stdin"], input=SCRIPTS[shell](), text=True, check=True)


def completions(line: str) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    asked = " ".join(f"'{word}'" for word in words)
    program = (
        f"{bash()}\nCOMP_WORDS=({asked})\nCOMP_CWORD={len(words) - 1}\n_gpuorch\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return sorted(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gpuorch re", ["ready", "revoke"]),
        ("gpuorch --json qu", ["queue"]),
        ("gpuorch --socket /s qu", ["queue"]),
        ("gpuorch policy ", ["get", "set"]),
        ("gpuorch policy set --if", ["--if-revision"]),
        ("gpuorch run --pr", ["--priority"]),
        ("gpuorch run --priority ", ["background", "critical", "normal"]),
        ("gpuorch run --priority c", ["critical"]),
        ("gpuorch run --mem ", []),
        ("gpuorch run --mem 4GiB ", ["--"]),
        ("gpuorch run -- bas", ["bash", "bashbug"]),
        ("gpuorch completion z", ["zsh"]),
        ("gpuorch status --j", ["--json"]),
        ("gpuorch nothing x", []),
    ],
)
def test_bash_completes(line: str, offered: list[str]) -> None:
    found = completions(line)
    if line.endswith("bas"):
        # What is installed beside it differs.
        assert "bash" in found
        return
    assert found == offered
