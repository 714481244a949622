"""The latest events, gathered by a thread while a live screen is drawn.

A descriptor becomes readable when there is news, so that one `select` waits for keys and news.
"""

from __future__ import annotations

import os
from collections import deque
from threading import Event as Flag
from threading import Thread

from libclient.blocking import Client, connect
from libclient.decision import Event
from libclient.errors import RequestError, Unavailable

# More than a screen shows.
KEPT = 100
# A daemon that restarts is back within tenths of a second.
RETRY_S = 0.5


class Newsreel:
    """A subscription to everything, kept up as the daemon comes and goes. Close it at the end."""

    def __init__(self, socket: str | None) -> None:
        self._socket = socket
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._stop = Flag()
        self._client: Client | None = None
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = Thread(target=self._gather, name="gpuorch-news", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Return a descriptor that is readable while there is news."""
        return self._reader

    def seen(self) -> None:
        """Take note of the news: from now on the descriptor waits for more."""
        try:
            os.read(self._reader, 65_536)
        except BlockingIOError:
            # Somebody looked for another reason.
            pass

    def latest(self) -> list[Event]:
        """Return the events that are kept, the newest last."""
        return list(self._events)

    def close(self) -> None:
        """End the subscription and the thread."""
        self._stop.set()
        if self._client is not None:
            self._client.close()
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _gather(self) -> None:
        while not self._stop.is_set():
            try:
                with connect(self._socket) as client:
                    self._client = client
                    stream = client.events()
                    while not self._stop.is_set():
                        self._events.append(next(stream))
                        self._tell()
            except (Unavailable, RequestError):
                self._tell()
                self._stop.wait(RETRY_S)

    def _tell(self) -> None:
        try:
            os.write(self._writer, b".")
        except BlockingIOError:
            # Full of news already.
            pass
