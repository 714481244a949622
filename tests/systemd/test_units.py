"""The installed units: what systemd itself says of them, and how they hang together."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.daemon_process import wait_until
from tests.systemd.rig import DAEMON, ROOT, SOCKETS, Rig

pytestmark = [pytest.mark.serial, pytest.mark.slow]

SECURITY_MAX = 0.9
PAGE = ROOT / "docs" / "systemd.md"
SECTION = re.compile(r"^## Confinement\n(.*?)^## ", re.MULTILINE | re.DOTALL)
UNITS = (
    *SOCKETS,
    DAEMON,
    "gpuorchd-driver.service",
    "nvidia-mps.service",
    "justnews@analyst.service",
    "justnews@gpu_orchestrator.service",
)
LEADER = "justnews@gpu_orchestrator.service"


def test_systemd_finds_nothing_wrong_with_any_unit(rig: Rig) -> None:
    done = rig.run("systemd-analyze", "verify", "--man=no", *UNITS, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_daemon_is_as_confined_as_promised(rig: Rig) -> None:
    text = rig.run("systemd-analyze", "security", "--no-pager", DAEMON).stdout
    line = next(line for line in text.splitlines() if "Overall exposure level" in line)
    assert float(line.split(": ")[1].split()[0]) <= SECURITY_MAX, line


def test_every_line_that_is_looser_than_it_could_be_is_explained(rig: Rig) -> None:
    entries = json.loads(rig.run("systemd-analyze", "security", "--json=short", DAEMON).stdout)
    loose = {entry["name"] for entry in entries if entry["exposure"] is not None}
    section = SECTION.search(PAGE.read_text())
    assert section is not None
    explained = set(re.findall(r"^\| `(.*?)` \|", section[1], re.MULTILINE))
    assert loose == explained


def test_it_runs_confined_and_still_sees_what_it_has_to(rig: Rig) -> None:
    rig.gpuorch("health")
    pid = rig.show(DAEMON, "MainPID")
    status = dict(
        line.split(":", 1) for line in rig.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    )
    cap_kill = f"{1 << 5:016x}"
    assert status["CapEff"].strip() == status["CapBnd"].strip() == cap_kill
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"
    # A network of its own, and the processes of other users in sight.
    assert rig.run("readlink", f"/proc/{pid}/ns/net").stdout != (
        rig.run("readlink", "/proc/1/ns/net").stdout
    )
    code = "import libclient\nwith libclient.connect() as client: print(client.call('whoami'))"
    who = rig.python(code)
    assert f"'uid': {rig.run('id', '-u', 'justnews').stdout.strip()}" in who


def test_the_limits_fit_each_other_and_the_daemon_s_bounds(rig: Rig) -> None:
    shown = rig.run("gpuorchd", "--check-config").stdout
    config = json.loads(shown)
    store = int(rig.show(DAEMON, "FileDescriptorStoreMax"))
    environ = rig.show(DAEMON, "Environment").split()
    assert f"GPUORCH_DESCRIPTOR_STORE={store}" in environ
    # Every connection that is admitted as a holder finds room, and some that have held.
    assert store > config["max_holders"]
    needed = config["max_connections"] + config["max_processes"] + store
    assert int(rig.show(DAEMON, "LimitNOFILE")) >= needed
    # All names travel in one string of at most 131,071 bytes.
    assert store * len("12345678:") < 131_071


def test_nothing_lowers_the_daemon_s_own_bounds(rig: Rig) -> None:
    place = rig.cursor()
    rig.gpuorch("health")
    wait_until(lambda: log_events(rig, place) != [], "the daemon's own log")
    assert "host.bounds_lowered" not in log_events(rig, place)


def log_events(rig: Rig, place: str) -> list[str]:
    return [
        line.split()[0] for line in rig.messages(DAEMON, place) if line.split()[0].count(".") == 1
    ]


def test_a_minute_of_crashes_does_not_reach_the_start_limit(rig: Rig) -> None:
    # 30 ms from one start to the next is faster than this program can end.
    assert int(rig.show(DAEMON, "StartLimitBurst")) > 60 / 0.03
    assert rig.show(DAEMON, "RestartUSec") == "0"
    for unit in SOCKETS:
        assert rig.show(unit, "TriggerLimitIntervalUSec") == "0"


def test_starting_the_leader_makes_health_answer(rig: Rig) -> None:
    rig.systemctl("stop", *SOCKETS)
    rig.systemctl("start", LEADER)
    assert rig.http("/health")[0] == 200
    assert [rig.is_active(unit) for unit in (LEADER, DAEMON, *SOCKETS)] == [True] * 4


def test_a_leader_whose_daemon_does_not_come_up_says_so(rig: Rig) -> None:
    place = rig.cursor()
    rig.configure(GPUORCH_SIMULATE="none")
    rig.systemctl("start", LEADER, check=False)
    assert rig.show(LEADER, "ActiveState") == "failed"
    lines = rig.messages(DAEMON, place)
    assert any("GPUORCH_SIMULATE" in line and "'none'" in line for line in lines)


def test_a_value_that_cannot_be_fails_the_start_at_once_and_is_not_tried_again(rig: Rig) -> None:
    rig.configure(GPUORCH_SIMULATE="none")
    done = rig.run("systemctl", "start", DAEMON, check=False)
    assert done.returncode == 1
    assert rig.show(DAEMON, "ExecMainStatus") == "2"
    assert rig.show(DAEMON, "NRestarts") == "0"
    assert rig.is_active("gpuorchd.socket")
    rig.configure(GPUORCH_SIMULATE="2x81920")
    assert rig.gpuorch("health").stdout.strip() == "ok"


def test_restarting_or_stopping_the_leader_does_so_to_the_daemon(rig: Rig) -> None:
    rig.systemctl("start", LEADER)
    pid = rig.main_pid()
    rig.systemctl("restart", LEADER)
    assert rig.main_pid() not in {0, pid}
    assert rig.is_active(LEADER)
    rig.systemctl("stop", LEADER)
    assert not rig.is_active(DAEMON)
    # The Unix socket stays, and starts it again.
    assert rig.gpuorch("health").stdout.strip() == "ok"


def test_restarting_the_daemon_leaves_the_leader_as_it_is(rig: Rig) -> None:
    rig.systemctl("start", LEADER)
    before = rig.show(LEADER, "ActiveEnterTimestampMonotonic")
    rig.systemctl("restart", DAEMON)
    assert rig.is_active(LEADER)
    assert rig.show(LEADER, "ActiveEnterTimestampMonotonic") == before


def test_its_folders_are_its_own_and_stay(rig: Rig) -> None:
    rig.gpuorch("health")
    for folder in ("/run/gpuorchd", "/var/lib/gpuorchd"):
        found = rig.run("stat", "-c", "%U %a", folder).stdout.strip()
        assert found == "gpuorchd 700", folder
    assert rig.run("stat", "-c", "%U %a", "/run/justnews").stdout.strip() == "root 755"
    (rig.path("/run/gpuorchd") / "kept").touch()
    rig.systemctl("stop", DAEMON)
    assert (rig.path("/run/gpuorchd") / "kept").exists()


def test_mps_is_off_unless_the_env_file_turns_it_on(rig: Rig) -> None:
    rig.systemctl("start", "nvidia-mps.service")
    assert rig.show("nvidia-mps.service", "Result") == "exec-condition"
    assert any("ENABLE_MPS is not true" in line for line in rig.messages("nvidia-mps.service"))


def test_mps_runs_where_it_is_wanted_and_the_daemon_sees_it_come_go_and_come(rig: Rig) -> None:
    # Writes its pid where the real one does, under the real one's name.
    rig.write("/usr/bin/nvidia-cuda-mps-control", MPS_CONTROL, 0o755)
    rig.configure(GPUORCH_SIMULATE="2x81920", ENABLE_MPS="true")
    folder = rig.path("/tmp/nvidia-mps")
    before = folder.stat().st_ino
    rig.gpuorch("health")
    assert not mps_runs(rig)
    for _ in range(2):
        rig.systemctl("start", "nvidia-mps.service")
        wait_until(lambda: mps_runs(rig), "MPS seen by the daemon")
        rig.systemctl("stop", "nvidia-mps.service")
        wait_until(lambda: not mps_runs(rig), "the end of MPS seen by the daemon")
    assert folder.stat().st_ino == before
    rig.path("/usr/bin/nvidia-cuda-mps-control").unlink()


MPS_CONTROL = """\
#!/bin/bash
file=$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid
if [ "$1" != -f ]; then read -r word; kill "$(cat "$file")"; exit; fi
echo $$ >"$file"
trap 'rm -f "$file"; exit 0' TERM
while :; do sleep 600 & wait $!; done
"""


def mps_runs(rig: Rig) -> bool:
    code = "import libclient; print(libclient.gpu_info()['mps_enabled'])"
    return rig.python(code).strip() == "True"


def test_cleaning_leaves_the_pipe_directory_of_mps(rig: Rig) -> None:
    before = rig.path("/tmp/nvidia-mps").stat().st_ino
    (rig.path("/tmp/nvidia-mps") / "control").touch()
    rig.write("/etc/tmpfiles.d/tmp.conf", "q /tmp 1777 root root 0\n")
    rig.run("touch", "/tmp/old")
    rig.run("systemd-tmpfiles", "--clean")
    assert not rig.path("/tmp/old").exists()
    assert (rig.path("/tmp/nvidia-mps") / "control").exists()
    assert rig.path("/tmp/nvidia-mps").stat().st_ino == before
    rig.path("/etc/tmpfiles.d/tmp.conf").unlink()
    (rig.path("/tmp/nvidia-mps") / "control").unlink()


def test_a_host_without_a_card_has_nothing_to_do_for_the_driver(rig: Rig) -> None:
    rig.gpuorch("health")
    assert rig.is_active("gpuorchd-driver.service")


def test_the_env_file_is_for_root_and_the_daemon_alone(rig: Rig) -> None:
    found = rig.run("stat", "-c", "%U:%G %a", "/etc/justnews/gpu_orchestrator.env").stdout
    assert found.strip() == "root:gpuorchd 640"
