"""The client as agents get it: the built wheel, with msgpack and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from libclient.cli import exits
from libclient.version import VERSION
from tests.support.daemon_process import running_daemon
from tests.support.wheel import InstalledWheel, build_and_install

# Prints what a program that uses every part of the client has loaded, and from where.
LOADED = """
import json, sys
import libclient
for name in libclient.__all__:
    getattr(libclient, name)
# What has no file is made by the interpreter or by a compiled module for itself.
loaded = [name for name, module in sys.modules.items() if getattr(module, "__file__", None)]
tops = {name.partition(".")[0] for name in loaded}
print(json.dumps(sorted(tops - sys.stdlib_module_names - {"__main__"})))
"""

# What a user may write; checked against the installed types alone.
USE = """
import libclient

with libclient.connect() as client:
    lease: libclient.Lease = client.lease("analyst", "2GiB", wait_s=1.5)
    with lease:
        device: str = lease.device
        granted: bool = lease.granted
"""
MISUSE = USE + "    wrong: int = lease.device\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> InstalledWheel:
    return build_and_install(tmp_path_factory.mktemp("wheel"))


def test_the_plain_install_requires_msgpack_alone(installed: InstalledWheel) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    required = metadata.get_all("Requires-Dist", [])
    plain = [entry for entry in required if "extra ==" not in entry]
    assert [entry.partition(">")[0].strip() for entry in plain] == ["msgpack"]
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == {"cli", "daemon", "dev"}


def test_the_wheel_carries_licence_and_types_and_no_tests(installed: InstalledWheel) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = wheel.namelist()
    assert "libclient/py.typed" in names
    assert "gpuorchd/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gpuorchd", "libclient"}


def test_the_client_loads_msgpack_and_nothing_of_the_daemon(installed: InstalledWheel) -> None:
    done = installed.run("python", "-I", "-c", LOADED)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["libclient", "msgpack"]


def test_plain_commands_work_without_extras(installed: InstalledWheel, tmp_path: Path) -> None:
    shown = installed.run("gpuorch", "--help")
    assert shown.returncode == exits.OK, shown.stderr
    assert "status" in shown.stdout
    missing = installed.run("gpuorch", "status", GPUORCH_SOCKET=str(tmp_path / "none"))
    assert missing.returncode == exits.UNAVAILABLE, missing.stderr
    assert str(tmp_path / "none") in missing.stderr


def test_the_installed_client_leases_from_a_daemon(
    installed: InstalledWheel, tmp_path: Path
) -> None:
    program = (
        "import libclient\n"
        "with libclient.lease('analyst', '2GiB') as lease:\n"
        "    print(lease.granted, lease.device)\n"
    )
    with running_daemon(tmp_path, "--simulate", "1x24576") as daemon:
        socket = str(daemon.socket)
        done = installed.run("python", "-I", "-c", program, GPUORCH_SOCKET=socket)
        status = installed.run("gpuorch", "status", GPUORCH_SOCKET=socket)
    assert done.stdout.split() == ["True", "cuda:0"], done.stderr
    assert status.returncode == exits.OK, status.stderr
    assert "24" in status.stdout


@pytest.mark.parametrize(("source", "code"), [(USE, 0), (MISUSE, 1)], ids=["use", "misuse"])
def test_public_types_hold_outside_the_project(
    installed: InstalledWheel, tmp_path: Path, source: str, code: int
) -> None:
    path = tmp_path / "agent.py"
    path.write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.python, path],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
