"""One agent of the demo, a process of its own: `python -m libclient.demo.agent NAME ...`.

Asks for GPU memory, works while it holds it, goes on with the CPU while it does not, and asks
again. What happens to it goes to standard output, one JSON object a line; `at` is the monotonic
clock, which all processes of a host share. No CUDA is needed: the work is a wait. SIGUSR1 ends a
piece of work; SIGTERM ends the process, and with it the lease, like any other end.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from time import monotonic
from typing import NamedTuple

import libclient
from libclient.decision import Event

DONE = b"d"
YIELD = b"y"
LOST = b"l"
# Between two pieces of work.
REST_S = 0.7


class Ask(NamedTuple):
    """What is asked for: MiB and how long to wait for it."""

    memory_mb: int
    wait_s: float


def _ask(text: str) -> Ask:
    memory, _, wait = text.partition(":")
    return Ask(int(memory), float(wait))


class Agent:
    """The life of one agent."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._name: str = args.agent
        self._args = args
        # What the signal handler and the client's thread have to say to the one who works.
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def live(self) -> None:
        """Ask, work and ask again, until the process is ended."""
        signal.signal(signal.SIGUSR1, lambda *_: self._say_to_self(DONE))
        asks: list[Ask] = self._args.ask
        while True:
            ask = asks.pop(0) if len(asks) > 1 else asks[0]
            self._report("asking", memory_mb=ask.memory_mb, wait_s=ask.wait_s)
            with libclient.lease(
                self._name,
                ask.memory_mb,
                priority=self._args.priority,
                wait_s=ask.wait_s,
                devices=[self._args.device],
                purpose="demo",
                on_event=self._on_event,
            ) as lease:
                if lease.granted:
                    self._work(lease)
                    continue
            self._report("cpu", reason=lease.reason, detail=lease.detail)
            self._listen(self._args.cpu, heed=b"")

    def _work(self, lease: libclient.Lease) -> None:
        self._report(
            "gpu",
            lease_id=lease.lease_id,
            memory_mb=lease.memory_mb,
            gpu=lease.gpus[0]["index"],
            waited_s=lease.waited_s,
        )
        heed = LOST + DONE + (b"" if self._args.stubborn else YIELD)
        why = self._listen(None, heed)
        # Said before it is done: whoever adds up what is held never counts too much.
        self._report("lost" if why == LOST else "releasing", reason=lease.ended)
        lease.release()
        if why == DONE:
            self._listen(REST_S, heed=b"")

    def _on_event(self, event: Event) -> None:
        """Hear of the lease; called in the client's own thread."""
        match event["event"]:
            case "lease.queued":
                self._report("waiting", position=event["position"], eta_s=event.get("eta_s"))
            case "lease.revoking":
                self._report("revoking", reason=event["reason"], deadline_s=event["deadline_s"])
                self._say_to_self(YIELD)
            case "lease.revoked" | "lease.expired" | "connection.lost":
                self._say_to_self(LOST)

    def _say_to_self(self, word: bytes) -> None:
        os.write(self._writer, word)

    def _listen(self, timeout_s: float | None, heed: bytes) -> bytes:
        """Wait for a word in `heed`, or for the time; return what came, nothing at the time."""
        end_s = None if timeout_s is None else monotonic() + timeout_s
        while True:
            left_s = None if end_s is None else max(0.0, end_s - monotonic())
            if not select.select([self._reader], [], [], left_s)[0]:
                return b""
            word = os.read(self._reader, 1)
            if word in heed:
                return word

    def _report(self, kind: str, **fields: object) -> None:
        line = json.dumps({"agent": self._name, "kind": kind, "at": monotonic(), **fields})
        # One write a line: the client's thread reports as well.
        os.write(sys.stdout.fileno(), line.encode() + b"\n")


def main() -> None:
    """Read what this agent is to be, and live."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agent")
    parser.add_argument("--ask", type=_ask, action="append", required=True, metavar="MB:WAIT_S")
    parser.add_argument("--priority", required=True)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--cpu", type=float, default=1.5, help="seconds on the CPU")
    parser.add_argument("--stubborn", action="store_true", help="never yield")
    args = parser.parse_args()
    try:
        Agent(args).live()
    except BrokenPipeError:
        # Nobody listens: the demo is over.
        sys.exit(0)


if __name__ == "__main__":
    main()
