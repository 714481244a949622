"""User names as uids, from whatever this host asks for them.

A look-up may ask a directory on the network and take long: `resolve_users` blocks, for the start,
and `UserNames` does it beside the loop while the daemon serves.
"""

from __future__ import annotations

import asyncio
import pwd
import threading
from collections.abc import Iterable, Mapping


def resolve_users(names: Iterable[str]) -> dict[str, int]:
    """Look up user names; those that do not exist, or cannot, are left out."""
    uids: dict[str, int] = {}
    for name in names:
        try:
            uids[name] = pwd.getpwnam(name).pw_uid
        except (KeyError, ValueError):
            # ValueError: no name at all, such as one with a NUL in it.
            continue
    return uids


class UserNames:
    """Look-ups that keep nobody waiting but who asked. Call it on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    async def resolve(self, names: Iterable[str]) -> Mapping[str, int]:
        """Look up names in a thread of their own, which ends by itself.

        Where the caller gives up, or the loop ends before it, nothing comes of it.
        """
        found: asyncio.Future[Mapping[str, int]] = self._loop.create_future()
        wanted = tuple(names)

        def settle(uids: Mapping[str, int]) -> None:
            if not found.done():
                found.set_result(uids)

        def look_up() -> None:
            uids = resolve_users(wanted)
            try:
                self._loop.call_soon_threadsafe(settle, uids)
            except RuntimeError:
                # The loop is closed: the daemon has ended, and did not wait for a slow directory.
                return

        threading.Thread(target=look_up, name="users", daemon=True).start()
        return await found
