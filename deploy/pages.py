"""Pages for people and shells: manual pages, the runbook, completion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deploy.man_pages import man_page
from deploy.places import Places
from gpuorchd.command_line import parser as daemon_parser
from libclient.cli import completion, grammar, roster_health, roster_start
from libclient.ports import daemon_port
from libclient.version import VERSION

DOCS: Final = Path(__file__).parent.parent / "docs"
RUNBOOK: Final = "fresh-start.md"


def write_pages(places: Places, known: Mapping[str, str]) -> None:
    """Write them all."""
    share = places.prefix / "share"
    for name, text in _manual().items():
        # The parsers show this checkout's default; the page is for what is installed.
        text = text.replace(str(daemon_port()), known["PORT"])
        places.write(share / "man" / f"man{name[-1]}" / name, text)
    places.write(share / "bash-completion" / "completions" / "gpuorch", completion.bash() + "\n")
    places.write(share / "zsh" / "site-functions" / "_gpuorch", completion.zsh() + "\n")
    places.write(share / "fish" / "vendor_completions.d" / "gpuorch.fish", completion.fish() + "\n")
    places.write(places.docdir / RUNBOOK, _runbook(places))


def _runbook(places: Places) -> str:
    """Return the runbook, which is written for the usual paths, with those of this installation."""
    text = (DOCS / RUNBOOK).read_text(encoding="utf-8")
    usual = Places(places.destdir, Path("/usr/local"), Path("/etc"))
    for written, real in (
        (usual.docdir, places.docdir),
        (usual.sysconfdir / "justnews", places.sysconfdir / "justnews"),
    ):
        text = text.replace(str(written), str(real))
    return text


def _manual() -> dict[str, str]:
    others = "gpuorchd(8), gpuorch(1), justnews-health(8), justnews-enable-all(8)"
    return {
        "gpuorchd.8": man_page(
            daemon_parser(VERSION), 8, "lease GPU memory to local processes", others
        ),
        "gpuorch.1": man_page(grammar.parser(), 1, "lease GPU memory, and see who has it", others),
        "justnews-health.8": man_page(
            roster_health.parser(), 8, "check every port of the port map", others
        ),
        "justnews-enable-all.8": man_page(
            roster_start.parser(), 8, "start the daemon, then the agents behind its gate", others
        ),
    }
