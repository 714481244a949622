"""In whose name a command asks, where it was not said."""

from __future__ import annotations

import os
from collections.abc import Sequence

# An env file of a service can name its agent once, for every line that uses it.
AGENT_VARIABLE = "GPUORCH_AGENT"
# Where nothing says better.
NOBODY = "gpuorch"


def agent_name(given: str | None, words: Sequence[str]) -> str:
    """Return the agent: as given, else the variable's, the service's, or the command's own."""
    named = given or os.environ.get(AGENT_VARIABLE)
    if named:
        return named
    service = service_name(_own_cgroup())
    if service:
        return service
    return os.path.basename(words[0]) if words and os.path.basename(words[0]) else NOBODY


def service_name(cgroup: str) -> str | None:
    """Return the system service in the text of a /proc/PID/cgroup, without `.service`.

    It is the first component below the slices: what is deeper is made by whoever owns the service.
    A session, and the services of a user's own manager, name nobody's agent.
    """
    path = ""
    for line in cgroup.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if controllers == "name=systemd":
            # Where both hierarchies are mounted, this one is systemd's.
            path = place
            break
        if not controllers:
            path = place
    for component in path.split("/"):
        # systemd writes `_` before a name that the kernel could take for one of its own files.
        unit = component.removeprefix("_")
        if not unit or unit.endswith(".slice"):
            continue
        is_service = unit.endswith(".service") and not unit.startswith("user@")
        return unit.removesuffix(".service") if is_service else None
    return None


def _own_cgroup() -> str:
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
