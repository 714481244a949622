"""The side HTTP port: read-only pages for Prometheus, probes and dashboards, on this host alone.

`HttpSide` owns the listening socket and says whether the port could be had; a port that is taken
stops neither the daemon nor a lease, and the answer to `ready` names it. The pages are
`http_pages`' and the protocol is aiohttp's, which is loaded after the port is bound: the kernel
keeps early connections meanwhile.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from gpuorchd.observe.loading import load

if TYPE_CHECKING:
    from gpuorchd.observe.http_server import HttpServer

ADDRESS = "127.0.0.1"
# Scrapers and dashboards of one host are a handful; beyond this nobody is served, at once.
CONNECTIONS_MAX = 64
BACKLOG = 128
NOT_YET = "not served yet; leases are"


class AllocationsView(Protocol):
    """A page of allocations without tokens: `allocations` and `next`, as the wire has them.

    Raises `ValueError` for an `after` that no page ends with.
    """

    def __call__(self, after: str | None, limit: int, /) -> Mapping[str, Any]: ...


class Report(Protocol):
    """Write one log event, by its declared name and fields."""

    def __call__(self, event: str, /, **fields: object) -> None: ...


@dataclass(slots=True)
class Pages:
    """What the port shows: the same views as the socket's, without anybody's tokens.

    Each gives what JSON can hold; `metrics` gives the text of a scrape. `socket_path` is named to
    those who try to change something here.
    """

    health: Callable[[], Mapping[str, Any]]
    ready: Callable[[], Mapping[str, Any]]
    gpu_info: Callable[[], Mapping[str, Any]]
    policy: Callable[[], Mapping[str, Any]]
    allocations: AllocationsView
    metrics: Callable[[], Awaitable[bytes]]
    socket_path: str
    # Names beside localhost and its addresses under which the port may be asked for.
    extra_hosts: tuple[str, ...] = field(default=())


class HttpSide:
    """The port while the daemon runs. One `start` and one `stop`.

    Give a listening `sock` (from the service manager; it is closed by `stop`) or a `port` of
    127.0.0.1; with neither, or port 0, there is no HTTP, unless `any_port` asks the kernel for
    one.
    """

    def __init__(
        self,
        pages: Pages,
        report: Report,
        *,
        port: int = 0,
        sock: socket.socket | None = None,
        any_port: bool = False,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self._pages = pages
        self._report = report
        self._port = port
        self._sock = sock
        self._wanted = sock is not None or port != 0 or any_port
        self._connections_max = connections_max
        self._server: HttpServer | None = None
        self._stopped = False
        # Why the port cannot be had, None while it can.
        self.failure: str | None = None

    @property
    def address(self) -> tuple[str, int] | None:
        """Where the port answers, None where it does not."""
        if self._server is None or self._sock is None:
            return None
        host, port = self._sock.getsockname()[:2]
        return host, port

    def check(self) -> tuple[bool, str]:
        """Say for `ready` whether the port answers. It is told, and no reason not to be ready.

        Ready means that requests get right answers, and they are asked on the Unix socket.
        """
        if self.failure is not None:
            return True, f"not served: {self.failure}; leases are"
        if not self._wanted:
            return True, "no HTTP port is configured"
        address = self.address
        if address is None:
            return True, NOT_YET
        return True, f"{address[0]}:{address[1]}"

    async def start(self) -> None:
        """Bind and serve. A port that cannot be had is reported and kept in `failure`."""
        if not self._wanted:
            return
        if self._sock is None:
            self._sock = self._bind()
            if self._sock is None:
                return
        module = await load("gpuorchd.observe.http_server")
        if self._stopped:
            return
        server: HttpServer = module.HttpServer(self._pages, self._report, self._connections_max)
        await server.start(self._sock)
        host, port = self._sock.getsockname()[:2]
        self._server = server
        self._report("http.bound", address=f"{host}:{port}")

    async def stop(self) -> None:
        """Close the port and its connections, finished or not."""
        self._stopped = True
        server, self._server = self._server, None
        if server is not None:
            await server.stop()
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _bind(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # A restart must not wait for connections of the old daemon to time out.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((ADDRESS, self._port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            reason = os.strerror(error.errno or errno.EIO)
            self.failure = f"{ADDRESS}:{self._port} cannot be had: {reason}"
            self._report("http.bind_failed", address=f"{ADDRESS}:{self._port}", error=reason)
            return None
        return sock
