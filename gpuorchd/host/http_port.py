"""Where the side HTTP port comes from: a socket that was passed, or a number to bind.

A passed socket wins, whatever is configured. Where the service manager passes sockets at all, none
is bound here: the daemon may live in a network of its own, in which nobody would find the port.
"""

from __future__ import annotations

import socket
from typing import NamedTuple

from gpuorchd.host.inherited import METRICS_NAME

VARIABLE = "GPU_ORCHESTRATOR_PORT"


class HttpPort(NamedTuple):
    """A listening socket (the taker closes it) or a port of 127.0.0.1 to bind; 0 and None: no HTTP.

    `fault` says for readiness what is wrong with the choice, None for nothing.
    """

    sock: socket.socket | None
    port: int
    fault: str | None = None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to serve on."""
        return self.sock is not None or self.port != 0


def choose_http_port(
    configured: int, *, is_set: bool, passed: socket.socket | None, under_manager: bool
) -> HttpPort:
    """Choose. `is_set`: the port was configured and is not merely the default.

    `under_manager`: the Unix socket was passed, so this one was to be passed too.
    """
    if passed is not None:
        host, port = passed.getsockname()[:2]
        fault = _differs(configured, host, port) if is_set and configured != port else None
        return HttpPort(passed, port, fault)
    if under_manager and configured:
        return HttpPort(
            None,
            0,
            f"no socket for 127.0.0.1:{configured} was passed; systemctl status {METRICS_NAME} "
            f"says why ({VARIABLE}=0: none is wanted)",
        )
    return HttpPort(None, configured)


def _differs(configured: int, host: str, port: int) -> str:
    said = f"{VARIABLE} is {configured}, but {METRICS_NAME} listens on {host}:{port}, which is used"
    if configured == 0:
        return f"{said}; to have none: systemctl disable --now {METRICS_NAME}"
    return (
        f"{said}; to move it, write /etc/systemd/system/{METRICS_NAME}.d/port.conf with the lines "
        f"'[Socket]', 'ListenStream=' and 'ListenStream={host}:{configured}', then: systemctl "
        f"daemon-reload && systemctl restart justnews@gpu_orchestrator; to keep it, take "
        f"{VARIABLE} out"
    )
