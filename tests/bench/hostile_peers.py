"""Peers that mean no good, in a process of their own: `python -m tests.bench.hostile_peers SOCKET`.

Garbage, frames that never end, one byte a second, requests whose answers are never read. Says
`ready` when all of them are at it, and goes on until its input ends.
"""

from __future__ import annotations

import asyncio
import struct
import sys

import msgpack

from libclient.wire.framing import frame

# Of each kind. Together they stay below the connections that one user may have.
HALF_FRAMES = 50
DRIPPERS = 50
NEVER_READING = 20
# New connections a second that send garbage and are closed.
GARBAGE_PER_S = 50
GARBAGE = b"\x00\x00\x01\x00" + bytes(range(256))
REQUEST = frame(msgpack.packb({"id": 1, "op": "gpu_info"}))


async def half_frame(path: str) -> None:
    """Announce a frame, send half of it, and stay."""
    await _rest(path, struct.pack(">I", 60_000) + b"\x81" * 30_000)


async def drip(path: str) -> None:
    """Send a frame of the largest size, one byte a second."""
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(struct.pack(">I", 65_536))
    while True:
        writer.write(b"\x81")
        await asyncio.sleep(1)


async def never_read(path: str) -> None:
    """Send requests as fast as the daemon takes them, and read no answer."""
    reader, writer = await asyncio.open_unix_connection(path, limit=1)
    # Nothing is taken out of the kernel's buffer.
    reader._transport.pause_reading()  # type: ignore[attr-defined]  # streams offer no other way
    while True:
        writer.write(REQUEST * 32)
        await writer.drain()


async def garbage(path: str) -> None:
    """Connect, send what is no message, and be closed; again and again."""
    while True:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(GARBAGE)
        try:
            await reader.read()
        except ConnectionResetError:
            # Closed with our garbage unread: as good an end.
            pass
        writer.close()
        await asyncio.sleep(1 / GARBAGE_PER_S)


async def _rest(path: str, sent: bytes) -> None:
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(sent)
    await asyncio.Event().wait()


async def main() -> None:
    """Start all and stay until the input ends."""
    path = sys.argv[1]
    crowd = [(half_frame, HALF_FRAMES), (drip, DRIPPERS), (never_read, NEVER_READING), (garbage, 1)]
    tasks = [asyncio.create_task(kind(path)) for kind, count in crowd for _ in range(count)]
    # All have connected and sent what they send at first.
    await asyncio.sleep(1)
    failed = [task for task in tasks if task.done()]
    if failed:
        await asyncio.gather(*failed)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
