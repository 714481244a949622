"""One invocation of a command: what was asked for, where answers go, and the way to the daemon.

All questions of one command share one budget (`--timeout`), so that a daemon that answers slowly
cannot hold a script up for a multiple of it.
"""

from __future__ import annotations

from argparse import Namespace
from time import monotonic
from typing import TYPE_CHECKING, Any

from libclient.cli.faults import UsageError
from libclient.cli.screen import Screen

if TYPE_CHECKING:
    from libclient.blocking import Client


class Invocation:
    """The parsed arguments, the screen, and a connection that is made when it is first needed."""

    def __init__(self, args: Namespace, screen: Screen) -> None:
        self.args = args
        self.screen = screen
        self._client: Client | None = None
        self._timeout_s = float(args.timeout)
        self._deadline_s = monotonic() + self._timeout_s

    def restart_budget(self) -> None:
        """Begin the budget anew, for a command that asks again and again."""
        self._deadline_s = monotonic() + self._timeout_s

    @property
    def left_s(self) -> float:
        """What is left of the budget."""
        return max(0.0, self._deadline_s - monotonic())

    def client(self) -> Client:
        """Return the connection. Raises Unavailable."""
        if self._client is None or self._client.closed:
            from libclient.blocking import connect

            self._client = connect(self.args.socket, timeout_s=self.left_s)
        return self._client

    def call(self, op: str, **fields: object) -> dict[str, Any]:
        """Ask for an op. Raises Unavailable, RequestError, or UsageError for what cannot be said.

        The last is for what no message can hold: bytes that are no text, a number of many digits.
        """
        client = self.client()
        try:
            return client.call(op, timeout_s=self.left_s, **fields)
        except (ValueError, TypeError, OverflowError) as fault:
            raise UsageError(f"{op} cannot be asked for like that: {fault}") from None

    def pages(self, op: str, name: str) -> list[dict[str, Any]]:
        """Ask for all pages of a list. Raises Unavailable or RequestError."""
        entries: list[dict[str, Any]] = []
        after: object = None
        while True:
            reply = self.call(op, **({} if after is None else {"after": after}))
            entries += reply.get(name) or []
            after = reply.get("next")
            if after is None:
                return entries

    def close(self) -> None:
        """Close the connection, where there is one."""
        if self._client is not None:
            self._client.close()
