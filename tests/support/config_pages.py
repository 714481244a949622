"""The pages about settings, made from the table that the daemon reads.

`python -m tests.support.config_pages` writes the table of docs/configuration.md and the example env
file anew; the tests fail while either differs from what this makes.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from gpuorchd.config import TABLE
from gpuorchd.reloading import TAKEN

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "configuration.md"
EXAMPLE = ROOT / "systemd" / "gpu_orchestrator.env.example"

BEGIN = "<!-- settings: made from gpuorchd/config.py -->"
END = "<!-- end of settings -->"

EXAMPLE_HEADER = """\
# Environment of gpuorchd: uncomment what differs. `make install` puts this file to
# @SYSCONFDIR@/justnews/gpu_orchestrator.env, where there is none yet.
#
# The daemon reads it at its start and at `systemctl reload gpuorchd`; what a reload is not enough
# for takes effect at a restart. The syntax is that of EnvironmentFile= of systemd, and nothing in
# it is expanded. A line that cannot be stops the start, and leaves a running daemon as it is, with
# a message that names it; see `gpuorch doctor`.
#
# Every line that is commented out shows the default; one without a value is unset by default. A
# flag on the command line goes before this file, the file before the environment; a variable that
# is set to nothing counts as unset. Agents read GPUORCH_SOCKET and GPU_ORCHESTRATOR_POLICY_TTL from
# the same names.
"""


def settings_tables() -> str:
    """Make the tables of docs/configuration.md, one for each section."""
    lines: list[str] = []
    section = ""
    for row in TABLE:
        if row.section != section:
            section = row.section
            lines += ["", f"### {section}", ""]
            lines += [
                "| variable | flag | takes | default | reload | what it is |",
                "|---|---|---|---|---|---|",
            ]
        reload = "yes" if row.name in TAKEN else "restart"
        default = f"`{row.shown_default}`" if row.shown_default else "unset"
        cells = (f"`{row.variable}`", f"`{row.flag}`", row.kind.allowed, default, reload, row.help)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).strip()


def env_example() -> str:
    """Make the whole example env file."""
    parts = [EXAMPLE_HEADER]
    section = ""
    for row in TABLE:
        if row.section != section:
            section = row.section
            parts.append(f"# --- {section} ---\n")
        text = f"{row.help[0].upper()}{row.help[1:]}. Takes {row.kind.allowed}."
        text += " A reload is enough." if row.name in TAKEN else ""
        comment = textwrap.fill(text, 96, initial_indent="# ", subsequent_indent="# ")
        # The port stands in the port map alone: `make install` writes it here.
        shown = "@PORT@" if row.name == "http_port" else row.shown_default
        parts.append(f"{comment}\n#{row.variable}={shown}\n")
    return "\n".join(parts)


def page_with_tables(page: str) -> str:
    """Put the tables between the marks of the page."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{settings_tables()}\n\n{END}{after}"


def write() -> None:
    """Write both files anew."""
    PAGE.write_text(page_with_tables(PAGE.read_text()))
    EXAMPLE.write_text(env_example())


if __name__ == "__main__":
    write()
