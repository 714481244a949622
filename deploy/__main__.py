"""`python -m deploy install` and `uninstall`: called by `make`, which says what the paths are."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.host import activate, give_env_file, reload_units
from deploy.pages import write_pages
from deploy.places import InstallError, Places
from deploy.program import check_interpreter, install_program
from deploy.rendering import values
from deploy.units import ENV_FILE, install_units
from libclient import ports

LAUNCHERS = {
    "gpuorchd": "gpuorchd.__main__",
    "gpuorch": "libclient.cli.main",
    "justnews-health": "libclient.cli.roster_health",
    "justnews-enable-all": "libclient.cli.roster_start",
}
# -I: neither the folder it is started in nor variables of the environment change what is loaded.
LAUNCHER = """\
#!{python} -I
import sys

from {module} import main

sys.exit(main())
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Install or remove; return the exit code: 0, or 1 with the reason on standard error."""
    args = _parser().parse_args(argv)
    # What is installed is for everyone to read, whatever the umask of whoever installs.
    os.umask(0o022)
    try:
        places = Places(Path(args.destdir or "/"), Path(args.prefix), Path(args.sysconfdir))
        return _uninstall(places) if args.action == "uninstall" else _install(places, args)
    except (InstallError, ports.PortMapError, OSError) as error:
        sys.stderr.write(f"make {args.action}: {error}\n")
        return 1


def _install(places: Places, args: argparse.Namespace) -> int:
    text = ports.FILE.read_text(encoding="utf-8")
    if args.port is not None:
        text = ports.with_daemon_port(text, args.port)
    entries = ports.parse(text)
    port = ports.daemon(entries).port
    if args.interpreter:
        python = Path(args.interpreter)
        check_interpreter(python, port)
    else:
        python = install_program(places, text)
    for name, module in LAUNCHERS.items():
        places.write(places.bindir / name, LAUNCHER.format(python=python, module=module), 0o755)
    known = values(places, entries, python)
    install_units(places, known)
    write_pages(places, known)
    places.remember()
    if args.activate and places.destdir == Path("/"):
        activate(places)
    made = give_env_file(places, known)
    _tell(places, port, env_made=made)
    return 0


def _tell(places: Places, port: int, *, env_made: bool) -> None:
    env = places.sysconfdir / ENV_FILE
    under = "" if places.destdir == Path("/") else f" under {places.destdir}"
    print(f"gpuorchd {places.libdir}, port {port}, {len(places.written)} files{under}")
    print(f"{env}: {'written, all at defaults' if env_made else 'kept as it was'}")
    print("next: systemctl start justnews@gpu_orchestrator, then gpuorch doctor")
    print(f"runbook: {places.docdir / 'fresh-start.md'}")


def _uninstall(places: Places) -> int:
    removed = places.remove()
    if places.destdir == Path("/"):
        reload_units()
    print(f"{len(removed)} files removed")
    print(f"kept: {places.sysconfdir / ENV_FILE}, and what the daemon keeps in its state folder")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy", description=__doc__)
    parser.add_argument("action", choices=("install", "uninstall"))
    parser.add_argument("--destdir", default="", help="stage everything below this folder")
    parser.add_argument("--prefix", default="/usr/local", help="where programs go")
    parser.add_argument("--sysconfdir", default="/etc", help="where configuration goes")
    parser.add_argument("--port", type=_port, help="the daemon's port (default: the port map's)")
    parser.add_argument(
        "--interpreter", default="", help="use gpuorchd[daemon] of this Python, install none"
    )
    parser.add_argument(
        "--no-activate", dest="activate", action="store_false",
        help="make no users and folders and do not tell the service manager",
    )  # fmt: skip
    return parser


def _port(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
