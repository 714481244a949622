"""Make a small host of this one and become its systemd: runs as PID 1 of fresh namespaces.

    python boot.py FOLDER CHECKOUT

The root is an overlay of `/` whose changes lie on a tmpfs, so that everything is gone with the
namespaces. `/dev` has a handful of nodes, `/proc/sys` and `/sys` are read-only, and the
capabilities that could change the machine itself (clock, modules, reboot) are dropped: what runs
here is systemd as it is, on a host that it cannot hurt. The checkout is at /checkout, read-only.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
NODES = ("null", "zero", "full", "random", "urandom", "tty")
LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
# Folders that begin empty: what is enabled on this machine, and its logs, are not the rig's.
EMPTY = {
    "run": "mode=755",
    "tmp": "mode=1777",
    "var/log": "mode=755",
    "etc/systemd/system": "mode=755",
    "etc/tmpfiles.d": "mode=755",
}
# Units of the boot that take time and that no test looks at.
MASKED = (
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "ldconfig.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-machine-id-commit.service",
    "systemd-random-seed.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
)
# Enough of a boot: sockets, users, folders, the journal. No login, no timers, no network.
TARGET = """\
[Unit]
Description=Everything that the tests need
Requires=sysinit.target sockets.target
After=sysinit.target sockets.target
AllowIsolate=yes
"""
PR_CAPBSET_DROP = 24
CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_BOOT, CAP_SYS_TIME = 16, 17, 22, 25
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
IFREQ = struct.Struct("16sH14x")


def main() -> None:
    """Build the root, move into it, and execute systemd."""
    folder, checkout = Path(sys.argv[1]), Path(sys.argv[2])
    mount("-t", "tmpfs", "-o", "mode=755", "rig", folder)
    for name in ("upper", "work", "root"):
        (folder / name).mkdir()
    root = folder / "root"
    layers = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
    mount("-t", "overlay", "-o", layers, "rig", root)
    fill(root, checkout)
    raise_loopback()
    drop_capabilities()
    enter(root)
    systemd = next(path for path in SYSTEMD if os.path.exists(path))
    environ = {"container": "gpuorchd-rig", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "dumb"}
    os.execve(systemd, [systemd, "--system", "--unit=rig.target"], environ)


def fill(root: Path, checkout: Path) -> None:
    """Mount what a host has besides its files."""
    for name, options in EMPTY.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        mount("-t", "tmpfs", "-o", options, "rig", root / name)
    mount("-t", "proc", "proc", root / "proc")
    mount("--bind", root / "proc/sys", root / "proc/sys")
    mount("-o", "remount,bind,ro", root / "proc/sys")
    mount("-t", "sysfs", "-o", "ro", "sysfs", root / "sys")
    mount("-t", "cgroup2", "cgroup2", root / "sys/fs/cgroup")
    make_devices(root / "dev")
    (root / "checkout").mkdir(exist_ok=True)
    mount("--bind", checkout, root / "checkout")
    mount("-o", "remount,bind,ro", root / "checkout")
    units = root / "etc/systemd/system"
    (units / "rig.target").write_text(TARGET)
    for name in MASKED:
        (units / name).symlink_to("/dev/null")


def make_devices(dev: Path) -> None:
    """Fill `/dev` with nodes of the machine that hurt nobody."""
    mount("-t", "tmpfs", "-o", "mode=755", "rig", dev)
    for name in NODES:
        (dev / name).touch()
        mount("--bind", Path("/dev", name), dev / name)
    (dev / "console").touch()
    mount("--bind", "/dev/null", dev / "console")
    for name, target in LINKS.items():
        (dev / name).symlink_to(target)
    for name in ("shm", "pts"):
        (dev / name).mkdir()
    mount("-t", "tmpfs", "-o", "mode=1777", "rig", dev / "shm")
    mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620", "devpts", dev / "pts")
    (dev / "ptmx").symlink_to("pts/ptmx")


def raise_loopback() -> None:
    """Bring `lo` up: a network of one's own begins without it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = IFREQ.unpack(fcntl.ioctl(sock, SIOCGIFFLAGS, IFREQ.pack(b"lo", 0)))[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, IFREQ.pack(b"lo", flags | IFF_UP))


def drop_capabilities() -> None:
    """Give up for good what reaches beyond the namespaces."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_BOOT, CAP_SYS_TIME):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"cannot drop capability {capability}")


def enter(root: Path) -> None:
    """Make the overlay the root, and let go of the old one."""
    old = root / "mnt"
    os.chdir(root)
    subprocess.run(["pivot_root", ".", old], check=True)
    os.chdir("/")
    subprocess.run(["umount", "--lazy", "/mnt"], check=True)


def mount(*words: object) -> None:
    """Mount, or end with what mount says."""
    subprocess.run(["mount", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
