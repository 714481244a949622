"""The side port's connections: aiohttp's protocol on a given socket, within bounds.

At most so many connections; one more is told so and closed. A connection that has begun no new
request for a while is ended whatever it does: one that sends its header a byte at a time, one
that does not read its answer, one that only sits there. Nothing of this waits for a client, so no
lease does either. Importing this file imports aiohttp, which is slow.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gpuorchd.observe.http import Pages, Report
from gpuorchd.observe.http_pages import Answers, Asked, Page, error_page

# Seconds that a connection may take for one request, from its first byte to the last of the answer.
# Prometheus gives up after 10.
REQUEST_S = 30.0
# And until its first request is whole: a peer on this host sends that in one piece.
HEADER_S = 5.0
# How often that is looked at.
SWEEP_S = 1.0
# Seconds between two requests of a connection: a scraper that comes every 15 s stays connected.
KEEPALIVE_S = 20.0
# Bytes of the request line and of all that is in one header; a scraper needs a few hundred.
LINE_BYTES = 4_096
HEADERS_MAX = 32
# A body is nobody's business here: it is not read, and the connection ends.
LINGER_S = 0.0
# Until a refused connection is told about in the log again.
TOLD_AGAIN_S = 60.0
STOP_S = 0.5

# What aiohttp says of broken requests is of no use to an operator; bugs are reported by the pages.
SILENT = logging.getLogger("gpuorchd.observe.http_server")
SILENT.addHandler(logging.NullHandler())
SILENT.propagate = False


class HttpServer:
    """Serve one listening socket, which stays the caller's."""

    def __init__(self, pages: Pages, report: Report, connections_max: int) -> None:
        self._answers = Answers(pages, report)
        self._report = report
        self._connections_max = connections_max
        self._loop = asyncio.get_running_loop()
        self._told_s = -TOLD_AGAIN_S
        # When each connection began what it is doing now.
        self._begun_s: dict[RequestHandler, float] = {}
        # Those that have not asked anything yet, in the order in which they came.
        self._unasked: dict[RequestHandler, None] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._listener: asyncio.Server | None = None
        self._http = web.Server(
            self._handle,
            access_log=None,
            logger=SILENT,
            keepalive_timeout=KEEPALIVE_S,
            max_line_size=LINE_BYTES,
            max_field_size=LINE_BYTES,
            max_headers=HEADERS_MAX,
            lingering_time=LINGER_S,
            auto_decompress=False,
        )

    async def start(self, sock: socket.socket) -> None:
        """Begin to accept. The caller closes `sock` after `stop`."""
        own = sock.dup()
        try:
            self._listener = await self._loop.create_server(self._accept, sock=own)
        except BaseException:
            own.close()
            raise
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    async def stop(self) -> None:
        """Stop accepting and end every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._listener is not None:
            self._listener.close()
        for connection in self._http.connections:
            self._abort(connection)
        await self._http.shutdown(STOP_S)
        if self._listener is not None:
            await self._listener.wait_closed()

    def _accept(self) -> asyncio.Protocol:
        if len(self._http.connections) >= self._connections_max and not self._make_room():
            self._tell_refused()
            return _Refusal(self._connections_max)
        connection = self._http()
        self._begun_s[connection] = self._loop.time()
        self._unasked[connection] = None
        return connection

    def _make_room(self) -> bool:
        """End the connection that has asked nothing for longest: silence keeps nobody out."""
        live = set(self._http.connections)
        connection = next((each for each in self._unasked if each in live), None)
        if connection is None:
            return False
        del self._unasked[connection]
        self._abort(connection)
        return True

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._begun_s[request.protocol] = self._loop.time()
        self._unasked.pop(request.protocol, None)
        asked = Asked(
            request.method,
            request.path,
            request.query,
            tuple(request.headers.getall("Host", ())),
        )
        page = await self._answers.answer(asked)
        response = web.Response(status=page.status, body=page.body, headers=_headers(page))
        if request.body_exists:
            response.force_close()
        return response

    def _sweep(self) -> None:
        """End what has taken too long, and forget what has ended."""
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        now_s = self._loop.time()
        live = set(self._http.connections)
        for connection, begun_s in list(self._begun_s.items()):
            bound_s = HEADER_S if connection in self._unasked else REQUEST_S
            overdue = now_s - begun_s > bound_s
            if overdue and connection in live:
                self._abort(connection)
            if overdue or connection not in live:
                del self._begun_s[connection]
                self._unasked.pop(connection, None)

    def _abort(self, connection: RequestHandler) -> None:
        transport = connection.transport
        if transport is not None:
            # Not `close`: that would wait until the client has read what it does not read.
            transport.abort()

    def _tell_refused(self) -> None:
        now_s = self._loop.time()
        if now_s - self._told_s >= TOLD_AGAIN_S:
            self._told_s = now_s
            self._report("http.connection_refused", limit=self._connections_max)


class _Refusal(asyncio.Protocol):
    """One connection too many: an answer and the end."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are transports by their methods, not by their class.
        stream = cast("asyncio.Transport", transport)
        page = error_page(503, "limit", f"{self._limit} connections are open; no more are allowed")
        stream.write(
            b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nCache-Control: no-store\r\n"
            b"Content-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (page.content_type.encode(), len(page.body), page.body)
        )
        stream.close()


def _headers(page: Page) -> dict[str, str]:
    return {
        "Content-Type": page.content_type,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        # Not the library's name and version, which are of use to nobody honest.
        "Server": "gpuorchd",
        **page.headers,
    }
