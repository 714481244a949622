"""The client's end of one contender of `pair`, in a process of its own.

Reads counts from its input, one a line; does that many pairs for each and prints the nanoseconds.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable

AGENT = "bench"
MEMORY_MB = 1_024


def lease_and_release(path: str) -> Callable[[], None]:
    """One lease and its release by the blocking client."""
    import libclient

    client = libclient.connect(path)

    def pair() -> None:
        lease = client.lease(AGENT, MEMORY_MB)
        if not lease.granted:
            raise RuntimeError(f"not granted: {lease.reason}")
        lease.release()

    return pair


def set_and_delete(path: str) -> Callable[[], None]:
    """One lock taken and given back as people do it with Redis: SET NX, then DEL."""
    import redis

    server = redis.Redis(unix_socket_path=path)
    token = secrets.token_hex(16)

    def pair() -> None:
        if not server.set("gpu:0", token, nx=True):
            raise RuntimeError("the key is there")
        server.delete("gpu:0")

    return pair


CONTENDERS = {"gpuorchd": lease_and_release, "redis": set_and_delete}


def main() -> None:
    """Serve counts until the end of the input."""
    pair = CONTENDERS[sys.argv[1]](sys.argv[2])
    for line in sys.stdin:
        rounds = range(int(line))
        started_ns = time.perf_counter_ns()
        for _ in rounds:
            pair()
        print(time.perf_counter_ns() - started_ns, flush=True)


if __name__ == "__main__":
    main()
