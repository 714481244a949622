"""What the side port answers to one request: pure of sockets, so that a test can ask it directly.

Refuses, in this order: a foreign Host (a web page of somebody else's that had its name resolve to
this host), any method that is not a reading one, unknown pages, bad query fields. There is no
CORS header: a page of another origin can read nothing here.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import msgspec

from gpuorchd.observe.http import Pages, Report
from gpuorchd.observe.metrics import CONTENT_TYPE
from libclient.wire.vocabulary import BAD_REQUEST, INTERNAL, NOT_FOUND, PAGE_MAX

JSON_TYPE = "application/json; charset=utf-8"
TEXT_TYPE = "text/plain; charset=utf-8"
READING = ("GET", "HEAD")
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
# Allocations made before the loop gets its turn.
SLICE_ALLOCATIONS = 50
PAGE_DEFAULT = 100
# What may be asked behind `?`; nothing is dropped in silence.
QUERY_FIELDS: Mapping[str, tuple[str, ...]] = {"/allocations": ("after", "limit")}


class Asked(NamedTuple):
    """One request. `hosts` are all of its Host headers."""

    method: str
    path: str
    query: Mapping[str, str]
    hosts: tuple[str, ...]


class Page(NamedTuple):
    """One answer, complete."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = {}


class _Refused(Exception):
    """A request that gets an error; `page` is it."""

    def __init__(self, page: Page) -> None:
        super().__init__(page.status)
        self.page = page


class Answers:
    """Answer requests from `Pages`."""

    def __init__(self, pages: Pages, report: Report) -> None:
        self._pages = pages
        self._report = report
        self._hosts = LOCAL_HOSTS | {name.lower().rstrip(".") for name in pages.extra_hosts}
        self._routes: dict[str, Callable[[Mapping[str, str]], Awaitable[Page]]] = {
            "/": self._index,
            "/metrics": self._metrics,
            "/health": self._health,
            "/ready": self._ready,
            "/gpu/info": self._gpu_info,
            "/policy": self._policy,
            "/allocations": self._allocations,
        }

    async def answer(self, asked: Asked) -> Page:
        """Answer one request, whatever it is."""
        try:
            self._check(asked)
            return await self._routes[asked.path](asked.query)
        except _Refused as refused:
            return refused.page
        except Exception as error:
            # A bug in a page is told and answered: it must not end the leases of this host.
            text = "".join(traceback.format_exception(error))
            self._report("http.request_failed", path=asked.path[:200], error=text)
            return error_page(500, INTERNAL, "a bug; the log has it")

    def _check(self, asked: Asked) -> None:
        if len(asked.hosts) != 1 or host_name(asked.hosts[0]) not in self._hosts:
            shown = ", ".join(asked.hosts)[:100] or "missing"
            raise _Refused(
                error_page(
                    403,
                    "forbidden",
                    f"the Host header is {shown}; allowed: {', '.join(sorted(self._hosts))}",
                )
            )
        if asked.method not in READING:
            path = self._pages.socket_path
            message = (
                f"{asked.method[:20]} is not allowed: this port only shows. Changes go to the Unix "
                f"socket {path}; the command gpuorch and the client library speak to it"
            )
            raise _Refused(
                error_page(
                    405, "method_not_allowed", message, {"Allow": ", ".join(READING)}, socket=path
                )
            )
        if asked.path not in self._routes:
            message = f"no such page; there are {', '.join(self._routes)}"
            raise _Refused(error_page(404, NOT_FOUND, message))
        allowed = QUERY_FIELDS.get(asked.path, ())
        unknown = sorted(set(asked.query) - set(allowed))
        if unknown:
            message = f"unknown field {unknown[0][:100]!r}; allowed: {', '.join(allowed) or 'none'}"
            raise _Refused(error_page(400, BAD_REQUEST, message))

    async def _index(self, query: Mapping[str, str]) -> Page:
        lines = ["gpuorchd: GPU memory leases of this host, read-only", ""]
        lines += [path for path in self._routes if path != "/"]
        lines += ["", f"Leases are asked for on {self._pages.socket_path}", ""]
        return Page(200, TEXT_TYPE, "\n".join(lines).encode())

    async def _metrics(self, query: Mapping[str, str]) -> Page:
        return Page(200, CONTENT_TYPE, await self._pages.metrics())

    async def _health(self, query: Mapping[str, str]) -> Page:
        return json_page(200, self._pages.health())

    async def _ready(self, query: Mapping[str, str]) -> Page:
        report = self._pages.ready()
        return json_page(200 if report["ready"] else 503, report)

    async def _gpu_info(self, query: Mapping[str, str]) -> Page:
        return json_page(200, self._pages.gpu_info())

    async def _policy(self, query: Mapping[str, str]) -> Page:
        return json_page(200, self._pages.policy())

    async def _allocations(self, query: Mapping[str, str]) -> Page:
        left = _limit(query.get("limit"))
        after = query.get("after") or None
        parts: list[bytes] = []
        # In slices: a thousand entries made and encoded at once would be felt by leases.
        while left:
            try:
                page = self._pages.allocations(after, min(left, SLICE_ALLOCATIONS))
            except ValueError:
                message = f"after is {str(after)[:100]!r}; allowed: a lease's id"
                raise _Refused(error_page(400, BAD_REQUEST, message)) from None
            entries = page["allocations"]
            parts += [msgspec.json.encode(entry) for entry in entries]
            after = page["next"]
            left -= len(entries)
            if after is None or not entries:
                break
            await asyncio.sleep(0)
        body = b'{"allocations":[%b],"next":%b}' % (b",".join(parts), msgspec.json.encode(after))
        return Page(200, JSON_TYPE, body)


def host_name(header: str) -> str:
    """Return the name in a Host header, lower case, without its port; empty where it is none."""
    try:
        parts: SplitResult = urlsplit(f"//{header}")
        name, _ = parts.hostname, parts.port
    except ValueError:
        return ""
    if name is None or parts.netloc != header or "@" in header:
        return ""
    return name.rstrip(".")


def json_page(status: int, content: Mapping[str, Any]) -> Page:
    """Make a page of JSON."""
    return Page(status, JSON_TYPE, msgspec.json.encode(content))


def error_page(
    status: int,
    code: str,
    message: str,
    headers: Mapping[str, str] | None = None,
    **more: object,
) -> Page:
    """Make an error in the shape that the socket's errors have."""
    error = {"code": code, "message": message, "retryable": False}
    page = json_page(status, {"ok": False, "error": error, **more})
    return page._replace(headers=headers or {})


def _limit(text: str | None) -> int:
    if text is None:
        return PAGE_DEFAULT
    if text.isascii() and text.isdecimal() and len(text) <= len(str(PAGE_MAX)):
        limit = int(text)
        if 1 <= limit <= PAGE_MAX:
            return limit
    message = f"limit is {text[:20]!r}; allowed: a whole number from 1 to {PAGE_MAX}"
    raise _Refused(error_page(400, BAD_REQUEST, message))
