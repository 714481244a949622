"""The clients of `restart`, inside the rig: `restart_clients.py hold COUNT` or `... ask`.

`hold` holds leases, each on a connection of its own, and prints for each line of its input when the
last of them was greeted by a daemon that went on. `ask` asks without a pause on a connection that
holds one, and prints for each line the longest answer since the line before. Times are seconds of
the monotonic clock.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import libclient

PATIENCE_S = 60.0


def hold(count: int) -> None:
    """Hold leases until the input ends."""
    last = [0.0]

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "daemon.resumed":
            last[0] = time.monotonic()

    leases = [
        libclient.lease("holds", 10, wait_s=PATIENCE_S, required=True, on_event=hear)
        for _ in range(count)
    ]
    print("ready", flush=True)
    for _ in sys.stdin:
        print(last[0], sum(lease.live for lease in leases), flush=True)


def ask() -> None:
    """Ask until the input ends."""
    over = threading.Event()
    longest = [0.0]
    with libclient.connect() as client:
        lease = client.lease("asks", 10, wait_s=PATIENCE_S, required=True)

        def go_on() -> None:
            while not over.is_set():
                began_s = time.monotonic()
                client.call("health", timeout_s=PATIENCE_S)
                longest[0] = max(longest[0], time.monotonic() - began_s)
                # Others have to run as well.
                time.sleep(0.002)

        thread = threading.Thread(target=go_on)
        thread.start()
        print("ready", flush=True)
        for _ in sys.stdin:
            print(longest[0], lease.live, flush=True)
            longest[0] = 0.0
        over.set()
        thread.join()


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(int(sys.argv[2]))
    else:
        ask()
