"""Processes as things to wait for: who a peer is, and the moment at which a process ends.

Owns one pidfd for each process that the core depends on, however many connections it has. The
core says when it no longer does (`ForgetProcess`); a process that ends is told once
(`ProcessEnded`) and is forgotten by that.

Who calls what: the server calls `look` for a peer that will hold nothing (`explain`), and
`identify` right before it submits `ClientArrived`, in the same turn: from then on the process is
watched. Where no `ClientArrived` follows after all, it calls `release_unused`. The core's effects
do the rest.

A number is never trusted: what /proc says of a pid is believed only where a pidfd, taken before, is
still alive after the reading.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import struct

from gpuorchd.core.effects import ForgetProcess, WatchProcess
from gpuorchd.core.events import ProcessEnded
from gpuorchd.core.model import Peer, ProcessKey
from gpuorchd.devices.proc_facts import read_stat, read_uid, read_unit
from gpuorchd.devices.telemetry import EffectRegistry, EventSink

# Of SOL_SOCKET, Linux 6.5 and later; the socket module does not name it yet.
SO_PEERPIDFD = 77
CREDENTIALS = struct.Struct("=iII")
# What the kernel answers for a peer that has been reaped, by its version.
DEAD_ERRORS = (errno.ESRCH, errno.EINVAL, errno.ENODATA)
NO_SUCH_OPTION_ERRORS = (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
# After this the watching of a process is tried again for which no descriptor was left.
RETRY_S = 1.0


class ProcessWatch:
    """Identify peers, and tell the engine when a process that it depends on has ended.

    `peer_pidfd_option` None makes it do without `SO_PEERPIDFD`, as on an older kernel.
    """

    def __init__(
        self,
        engine: EventSink,
        loop: asyncio.AbstractEventLoop,
        peer_pidfd_option: int | None = SO_PEERPIDFD,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._option = peer_pidfd_option
        # The descriptor of each watched process.
        self._pidfds: dict[ProcessKey, int] = {}
        self._by_pid: dict[int, ProcessKey] = {}
        # Whose the identified peers among them are, and how many each user has.
        self._uids: dict[ProcessKey, int] = {}
        self._by_uid: dict[int, int] = {}
        # Processes that are to be watched once there is a descriptor again.
        self._retries: dict[ProcessKey, asyncio.TimerHandle] = {}

    @property
    def count(self) -> int:
        """How many pidfds are held."""
        return len(self._pidfds)

    def count_of(self, uid: int) -> int:
        """How many of the watched processes are peers of this user."""
        return self._by_uid.get(uid, 0)

    def attach(self, engine: EffectRegistry) -> None:
        """Carry out the core's effects about processes."""
        engine.on(WatchProcess, self.watch)
        engine.on(ForgetProcess, self.forget)

    def look(self, fd: int) -> Peer:
        """Say who is at the other end, and keep nothing. For the rest see `identify`."""
        peer, pidfd = self._examine(fd)
        if pidfd is not None:
            os.close(pidfd)
        return peer

    def identify(self, fd: int) -> Peer:
        """Say who is at the other end of a connected Unix socket, and watch it from now on.

        A peer that is dead already has `alive` False and is not watched. Raises OSError where the
        kernel does not say (no descriptor left, a /proc that hides the peer): nothing is watched
        then, and the connection had better end. `fd` stays the caller's.
        """
        peer, pidfd = self._examine(fd)
        if pidfd is not None:
            if peer.process in self._pidfds:
                os.close(pidfd)
            else:
                self._keep(peer.process, pidfd)
            if peer.process not in self._uids:
                self._uids[peer.process] = peer.uid
                self._by_uid[peer.uid] = self._by_uid.get(peer.uid, 0) + 1
        return peer

    def watch(self, wish: WatchProcess) -> None:
        """Watch a process; where it is gone already, say so at once."""
        key = wish.process
        if key in self._pidfds:
            return
        try:
            pidfd = _open_process(key)
        except OSError:
            # No descriptor is left. To say nothing for a while only delays; to say it ended, lies.
            self._drop_retry(key)
            self._retries[key] = self._loop.call_later(RETRY_S, self._watch_again, wish)
            return
        if pidfd is None:
            self._engine.submit(ProcessEnded(key))
        else:
            self._keep(key, pidfd)

    def forget(self, wish: ForgetProcess) -> None:
        """Watch a process no longer."""
        self.release_unused(wish.process)

    def release_unused(self, process: ProcessKey) -> None:
        """Watch a process no longer that was identified and has come to hold nothing."""
        self._drop_retry(process)
        pidfd = self._pidfds.pop(process, None)
        if pidfd is not None:
            if self._by_pid.get(process.pid) == process:
                del self._by_pid[process.pid]
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        uid = self._uids.pop(process, None)
        if uid is not None:
            self._by_uid[uid] -= 1
            if not self._by_uid[uid]:
                del self._by_uid[uid]

    def signal(self, process: ProcessKey, uid: int, signal_name: str) -> bool:
        """Send TERM, INT, HUP, USR1 or USR2 to a watched process that still has this real uid.

        False where it is not watched, is gone, has another uid by now, or may not be signalled.
        """
        pidfd = self._pidfds.get(process)
        if pidfd is None or read_uid(process.pid) != uid or not _lives(pidfd):
            return False
        try:
            signal.pidfd_send_signal(pidfd, signal.Signals[f"SIG{signal_name}"])
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def close(self) -> None:
        """Give every descriptor back; nothing is told afterwards."""
        for process in [*self._pidfds, *self._retries]:
            self.release_unused(process)

    def _keep(self, key: ProcessKey, pidfd: int) -> None:
        self._pidfds[key] = pidfd
        self._by_pid[key.pid] = key
        self._loop.add_reader(pidfd, self._on_end, key)

    def _on_end(self, key: ProcessKey) -> None:
        self.release_unused(key)
        self._engine.submit(ProcessEnded(key))

    def _watch_again(self, wish: WatchProcess) -> None:
        self._retries.pop(wish.process, None)
        self.watch(wish)

    def _drop_retry(self, process: ProcessKey) -> None:
        timer = self._retries.pop(process, None)
        if timer is not None:
            timer.cancel()

    def _examine(self, fd: int) -> tuple[Peer, int | None]:
        """Say who is there, with a pidfd that the caller has to close where it lives."""
        pid, uid, gid = _credentials(fd)
        # What /proc shows under a dead peer's number may be another process's.
        dead = Peer(ProcessKey(pid, 0), uid, gid, None, alive=False)
        pidfd = self._peer_pidfd(fd, pid)
        if pidfd is None:
            return dead, None
        try:
            start_ticks = self._start_ticks(pid)
            unit = read_unit(pid)
            lives = _lives(pidfd)
            if lives and start_ticks is None:
                raise PermissionError(
                    errno.EACCES, f"pid {pid} lives, but /proc does not show it (hidepid?)"
                )
        except BaseException:
            os.close(pidfd)
            raise
        if not lives or start_ticks is None:
            os.close(pidfd)
            return dead, None
        return Peer(ProcessKey(pid, start_ticks), uid, gid, unit), pidfd

    def _start_ticks(self, pid: int) -> int | None:
        known = self._by_pid.get(pid)
        if known is not None and _lives(self._pidfds[known]):
            # A number is not given anew while its process lives.
            return known.start_ticks
        facts = read_stat(pid)
        return None if facts is None else facts.start_ticks

    def _peer_pidfd(self, fd: int, pid: int) -> int | None:
        """Open the peer's pidfd; None where the peer is dead."""
        if pid <= 0:
            # Of another pid namespace: nothing can be known of it, so nothing is held for it.
            return None
        if self._option is not None:
            try:
                return _socket_option(fd, self._option)
            except OSError as error:
                if error.errno in DEAD_ERRORS:
                    return None
                if error.errno not in NO_SUCH_OPTION_ERRORS:
                    raise
                # An older kernel: it will not have learnt it by the next time.
                self._option = None
        facts = read_stat(pid)
        return None if facts is None else _open_process(ProcessKey(pid, facts.start_ticks))


def _credentials(fd: int) -> tuple[int, int, int]:
    """Read the pid, uid and gid of who connected; pid 0: not visible from here."""
    borrowed = _borrow(fd)
    try:
        packed = borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    finally:
        borrowed.detach()
    pid, uid, gid = CREDENTIALS.unpack(packed)
    return pid, uid, gid


def _socket_option(fd: int, option: int) -> int:
    borrowed = _borrow(fd)
    try:
        return borrowed.getsockopt(socket.SOL_SOCKET, option)
    finally:
        borrowed.detach()


def _borrow(fd: int) -> socket.socket:
    # With its kind given, Python asks the kernel nothing. Detached by the caller: the descriptor is
    # somebody else's.
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)


def _open_process(key: ProcessKey) -> int | None:
    """Open a pidfd of just this process; None where it has ended.

    Raises OSError where no descriptor is left.
    """
    if key.pid <= 0 or key.start_ticks <= 0:
        return None
    try:
        pidfd = os.pidfd_open(key.pid)
    except OSError as error:
        if error.errno in DEAD_ERRORS:
            return None
        raise
    facts = read_stat(key.pid)
    # Alive after the reading: the number was this process's while it was read.
    if facts is not None and facts.start_ticks == key.start_ticks and _lives(pidfd):
        return pidfd
    os.close(pidfd)
    return None


def _lives(pidfd: int) -> bool:
    """Say whether a process still runs: its pidfd is readable from its end on, reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)
