"""Clients of the kill tests, one role a process: `clients_inside.py ROLE [NUMBER ...]`.

Run inside the rig by the installed Python, with the installed library. Each prints one line of JSON
when it is ready, then does what the lines of its input say and prints one line for each. What is
checked here is what a caller of the library sees; `looks` alone goes around the library.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import libclient

SOCKET = "/run/justnews/gpuorch.sock"
PATIENCE_S = 110.0
HOLDERS_CARD, ASKERS_CARD, WAITERS_CARD = 0, 1, 2
ASKER_MB, WAITER_MB = 30_000, 60_000
# How many askers' leases fit on their card at once, and how many waiters' on theirs.
ASKERS_AT_ONCE = 2
# 256 characters of three bytes: rows of about a kilobyte.
PR_SET_PDEATHSIG = 1
PURPOSE = "☃" * 256


def say(found: object) -> None:
    """Print one answer."""
    print(json.dumps(found), flush=True)


def reported(leases: list[libclient.Lease]) -> list[list[object]]:
    """What the library says of leases: id, token, and how each ended (null: it lives)."""
    return [
        [one.lease_id, one.token, None if one.live else one.ended or one.reason] for one in leases
    ]


def holds(first: str, count: str, memory_mb: str) -> None:
    """Hold that many leases, each on its own connection."""
    leases = [
        libclient.lease(f"holds{number}", int(memory_mb), devices=[HOLDERS_CARD], wait_s=PATIENCE_S)
        for number in range(int(first), int(first) + int(count))
    ]
    say(reported(leases))
    for line in sys.stdin:
        if line == "release\n":
            for lease in leases:
                lease.release()
        say(reported(leases))


def asks(count: str) -> None:
    """Ask and release without a pause, in that many threads."""
    over = threading.Event()
    lock = threading.Lock()
    bad: list[str] = []
    ids: list[str] = []
    counts: list[int] = []
    held = [0]

    def work(client: libclient.Client) -> None:
        done = 0
        while not over.is_set():
            lease = client.lease("asks", ASKER_MB, devices=[ASKERS_CARD], wait_s=PATIENCE_S)
            if not lease.live:
                bad.append(f"not granted: {lease.reason} {lease.detail} {lease.ended}")
                break
            with lock:
                ids.append(str(lease.lease_id))
                held[0] += 1
                if held[0] > ASKERS_AT_ONCE:
                    bad.append(f"{held[0]} leases are held at once, {ASKERS_AT_ONCE} fit")
            client.call("health", timeout_s=PATIENCE_S)
            with lock:
                held[0] -= 1
            lease.release()
            if lease.ended != "released":
                bad.append(f"not released: {lease.ended}")
            done += 1
        counts.append(done)

    clients = [libclient.connect() for _ in range(int(count))]
    threads = [threading.Thread(target=work, args=(one,)) for one in clients]
    for thread in threads:
        thread.start()
    say([])
    sys.stdin.readline()
    over.set()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    if len(set(ids)) != len(ids):
        bad.append("one lease id was granted twice")
    say({"bad": bad, "counts": counts})


def waits(count: str) -> None:
    """Queue up behind a lease that is held here; give way to them at the end, and say who came."""
    order: list[int] = []
    bad: list[str] = []
    before = libclient.lease("before", WAITER_MB, devices=[WAITERS_CARD], wait_s=PATIENCE_S)
    over = threading.Event()

    def wait(number: int, queued: threading.Event) -> None:
        def hear(event: dict[str, Any]) -> None:
            if event["event"] == "lease.queued":
                queued.set()

        client = libclient.connect()
        lease = client.lease(
            f"waits{number}", WAITER_MB, devices=[WAITERS_CARD], wait_s=86_400.0, on_event=hear
        )
        if lease.live:
            order.append(number)
            if not over.is_set():
                bad.append(f"{number} was granted while another held it")
            lease.release()
        else:
            bad.append(f"{number}: {lease.reason} {lease.detail}")
        client.close()

    threads = []
    for number in range(int(count)):
        queued = threading.Event()
        thread = threading.Thread(target=wait, args=(number, queued))
        thread.start()
        threads.append(thread)
        if not queued.wait(PATIENCE_S):
            bad.append(f"{number} is not queued")
    say(reported([before]))
    for line in sys.stdin:
        if line == "release\n":
            over.set()
            before.release()
            for thread in threads:
                thread.join(PATIENCE_S)
            say({"bad": bad, "order": order})
        else:
            say(reported([before]))


def reads_slowly(count: str) -> None:
    """Hold many leases on one connection, and ask for all of them; be stopped most of the time."""
    # What is stopped is a child: what started this process would take its stop for its own.
    worker = os.fork()
    if worker:
        slow_down(worker)
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    client = libclient.connect()
    leases = [
        client.lease("reads", 1, devices=[HOLDERS_CARD], wait_s=PATIENCE_S, purpose=PURPOSE)
        for _ in range(int(count))
    ]
    over = threading.Event()
    ids = {one.lease_id for one in leases}
    bad: list[str] = []
    sizes: list[int] = []

    def read() -> None:
        while not over.is_set():
            rows = client.call("allocations", timeout_s=PATIENCE_S)["allocations"]
            if not ids <= {row["lease_id"] for row in rows}:
                bad.append("a lease is missing in a reply")
            sizes.append(len(rows))

    thread = threading.Thread(target=read)
    thread.start()
    say(reported(leases))
    for line in sys.stdin:
        if line == "over\n":
            over.set()
            thread.join(PATIENCE_S)
            say({"bad": bad, "replies": len(sizes)})
            client.close()
        else:
            say(reported(leases))


def slow_down(pid: int) -> None:
    """Let a child run a third of the time, until it has ended."""
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.02)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.04)
        os.kill(pid, signal.SIGCONT)


def changes() -> None:
    """Change the policy again and again: each change is done once, whatever happens."""
    client = libclient.connect()
    lease = client.lease("changes", 1, devices=[HOLDERS_CARD], wait_s=PATIENCE_S)
    over = threading.Event()
    bad: list[str] = []
    done: list[int] = []

    def change() -> None:
        revision = client.call("policy_get", timeout_s=PATIENCE_S)["revision"]
        while not over.wait(0.01):
            wanted = {"default_memory_mb": 2_048 + len(done) % 2 + 1}
            reply = client.call("policy_set", changes=wanted, timeout_s=PATIENCE_S)
            revision += 1
            done.append(revision)
            if reply["revision"] != revision:
                bad.append(f"revision {reply['revision']} after {revision - 1}")
                revision = reply["revision"]

    thread = threading.Thread(target=change)
    thread.start()
    say(reported([lease]))
    for line in sys.stdin:
        if line == "over\n":
            over.set()
            thread.join(PATIENCE_S)
            client.close()
            say({"bad": bad, "changes": len(done)})
        else:
            say(reported([lease]))


def looks() -> None:
    """Look at all leases by the text mode: the right ones, each once, never too much memory.

    Its input is a line of JSON: the ids that have to be there from now on.
    """
    wanted: set[str] = set()
    bad: list[str] = []
    counts = {"looks": 0}
    over = threading.Event()
    totals_mb = {gpu["index"]: gpu["memory_total_mb"] for gpu in ask("gpu_info")["gpus"]}

    def look() -> None:
        while not over.wait(0.05):
            expected = set(wanted)
            reply = ask("allocations")
            rows = reply["allocations"]
            states = {row["lease_id"]: row["state"] for row in rows}
            if len(states) != len(rows) or reply["next"] is not None:
                bad.append("one lease id is there twice, or there are too many to be seen at once")
            gone = [one for one in expected if states.get(one) not in {"active", "detached"}]
            if gone:
                bad.append(f"{len(gone)} leases are gone, {gone[0]} is {states.get(gone[0])}")
            used_mb = dict.fromkeys(totals_mb, 0)
            for row in rows:
                for gpu in row["gpus"]:
                    used_mb[gpu["index"]] += gpu["memory_mb"]
            bad.extend(
                f"GPU {index}: {mb} MiB of {totals_mb[index]}"
                for index, mb in used_mb.items()
                if mb > totals_mb[index]
            )
            counts["looks"] += 1

    thread = threading.Thread(target=look)
    thread.start()
    say(totals_mb)
    for line in sys.stdin:
        wanted = set(json.loads(line))
        if not wanted:
            over.set()
            thread.join(PATIENCE_S)
        say({"bad": bad[:10], **counts})


def ask(op: str) -> dict[str, Any]:
    """Ask one question by a connection of its own, again while nobody answers."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE_S)
            try:
                sock.connect(SOCKET)
                sock.sendall(op.encode() + b"\n")
                line = sock.makefile("rb").readline()
            except (ConnectionError, FileNotFoundError, PermissionError):
                # A new socket file is root's for a moment, before its group is set.
                time.sleep(0.01)
                continue
            if line.endswith(b"\n"):
                found: dict[str, Any] = json.loads(line)
                return found
    raise TimeoutError(f"nobody answers {op}")


ROLES: dict[str, Callable[..., None]] = {
    "holds": holds,
    "asks": asks,
    "waits": waits,
    "reads_slowly": reads_slowly,
    "changes": changes,
    "looks": looks,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
