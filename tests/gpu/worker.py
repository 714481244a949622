"""A process that leases and uses GPU memory as it is told, one JSON line at a time.

Commands come on standard input, answers go to standard output, each with the time at which the
command was done. It is killed by the tests, so it tidies up nothing. Run as
`python -m tests.gpu.worker SOCKET`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import libclient
from libclient.errors import RequestError
from tests.gpu.cuda import Cuda, OutOfMemory


class Worker:
    """One process's connection, leases and CUDA memory."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._client = libclient.connect(socket)
        self._tokens: list[str] = []
        self._cuda: Cuda | None = None
        self._children: list[subprocess.Popen[str]] = []

    def start_cuda(self) -> dict[str, Any]:
        self._cuda = self._cuda or Cuda()
        return {}

    def lease(self, memory_mb: int, wait_s: float = 0, **fields: Any) -> dict[str, Any]:
        try:
            reply = self._client.call(
                "lease",
                agent=fields.pop("agent", "worker"),
                min_memory_mb=memory_mb,
                wait_s=wait_s,
                **fields,
            )
        except RequestError as error:
            return {"error": str(error)}
        if reply["granted"]:
            self._tokens.append(reply.pop("token"))
        return reply

    def lease_and_take(self, memory_mb: int, wait_s: float, take_mb: int) -> dict[str, Any]:
        """Allocate in the moment of the grant."""
        reply = self.lease(memory_mb, wait_s)
        granted = time.time()
        taken = self.take(take_mb) if reply.get("granted") else {}
        return {**reply, **taken, "granted_time": granted}

    def release(self) -> dict[str, Any]:
        return self._client.call("release", token=self._tokens.pop())

    def take(self, memory_mb: int) -> dict[str, Any]:
        self.start_cuda()
        assert self._cuda is not None
        try:
            self._cuda.take(memory_mb)
        except OutOfMemory:
            return {"out_of_memory": True}
        return {"out_of_memory": False}

    def give_back(self) -> dict[str, Any]:
        assert self._cuda is not None
        self._cuda.give_back()
        return {}

    def child_takes(self, memory_mb: int) -> dict[str, Any]:
        """Start a child that takes memory and lives on."""
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.worker", self._socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children.append(child)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps({"do": "take", "memory_mb": memory_mb}) + "\n")
        child.stdin.flush()
        return {"child": child.pid, "answer": json.loads(child.stdout.readline())}

    def orphan_takes(self, memory_mb: int, go: str) -> dict[str, Any]:
        """Double-fork a process that takes memory once the file `go` is there, on its own."""
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.setsid()
            orphan = os.fork()
            if orphan:
                os.write(writing, str(orphan).encode())
                os._exit(0)
            os.close(0)
            devnull = os.open(os.devnull, os.O_RDWR)
            os.dup2(devnull, 1)
            cuda = Cuda()
            os.write(writing, b"")
            while not os.path.exists(go):
                time.sleep(0.001)
            cuda.take(memory_mb)
            time.sleep(600)
            os._exit(0)
        os.wait()
        return {"orphan": int(os.read(reading, 32))}


def main(socket: str) -> None:
    """Do what the lines on standard input say until they end."""
    worker = Worker(socket)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(worker, command.pop("do"))(**command)
        print(json.dumps({**answer, "done": time.time()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
