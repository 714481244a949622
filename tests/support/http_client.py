"""A plain HTTP/1.1 client on the loop, with nothing between it and the wire."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def request_bytes(
    path: str, method: str = "GET", host: str | None = "localhost", *more: str, body: bytes = b""
) -> bytes:
    """Make a request; `more` are further header lines."""
    lines = [f"{method} {path} HTTP/1.1", *([] if host is None else [f"Host: {host}"]), *more]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode() + body


async def fetch(
    address: tuple[str, int],
    path: str,
    method: str = "GET",
    host: str | None = "localhost",
    *more: str,
    body: bytes = b"",
) -> Answer:
    """Ask on a connection of its own."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(request_bytes(path, method, host, *more, body=body))
            return await read_answer(reader, has_body=method != "HEAD")
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except OSError:
                # The other side may have ended it already.
                pass


async def read_answer(reader: asyncio.StreamReader, *, has_body: bool = True) -> Answer:
    """Read one answer of a connection that may go on."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {}
    for line in head[1:-2]:
        name, _, value = line.partition(":")
        assert name.lower() not in headers, f"{name} comes twice"
        headers[name.lower()] = value.strip()
    length = int(headers.get("content-length", "0")) if has_body else 0
    return Answer(int(head[0].split()[1]), headers, await reader.readexactly(length))
