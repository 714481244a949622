"""The answer to "GPU or CPU, and why": what a caller holds after it asked for a lease.

Owns the fields of `Lease` and `AsyncLease` alike and how a grant, a refusal and later events change
them. Has no connection: releasing is the business of those who hold it. Fails closed: a decision is
for the CPU until a whole, well-formed grant has come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from types import MappingProxyType
from typing import Any

from libclient.messages import Malformed, reasons_in_words

Event = dict[str, Any]
EventHandler = Callable[[Event], None]

CUDA_DEVICE = "cuda:0"
CPU_DEVICE = "cpu"
# However short a TTL a daemon names, renewing it is not all that a process does.
RENEW_LEAST_S = 0.05
# An agent that is told to use the CPU sets this, so that no framework starts CUDA by itself.
_HIDE_GPUS = {"CUDA_VISIBLE_DEVICES": ""}


class Decision:
    """GPU or CPU, and why.

    granted: whether GPU memory is (or was) held. device: `cuda:0` or `cpu`.
    reason: empty when granted, else a note of the wire contract, an error code in capitals, or
        NO_DAEMON, TIMEOUT, GARBAGE. detail: the same for people. reasons, eta_s: as on the wire.
    lease_id, token, gpus, memory_mb (per GPU), enforcement, expires_at (unix seconds or None): of
        the grant; None or empty without one.
    revoking: the daemon wants it back, by deadline (unix seconds).
    ended: None while the lease lives, else why it does not (`released`, `expired`, ...).
    detached: the connection that held it was lost, and the library is on its way back to the
        daemon. The lease lives on meanwhile.
    """

    # One is made for every request: what is seldom set costs nothing as a default of the class.
    granted = False
    reason = ""
    detail = ""
    lease_id: str | None = None
    token: str | None = None
    expires_at: float | None = None
    ended: str | None = None
    revoking = False
    detached = False
    deadline: float | None = None
    # When to renew, on the driver's monotonic clock, and for how long that is good.
    renew_at: float | None = None
    ttl_s = 0.0
    # Renewals that were asked for and have no answer.
    renewals = 0
    _reply: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, on_event: EventHandler | None = None) -> None:
        self.on_event = on_event

    @property
    def device(self) -> str:
        """`cuda:0` for a grant whose `env` is applied before CUDA starts, else `cpu`."""
        return CUDA_DEVICE if self.granted else CPU_DEVICE

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """What is held, by GPU: `index`, `uuid`, `memory_mb`."""
        return list(self._reply["gpus"]) if self.granted else []

    @property
    def memory_mb(self) -> int:
        """MiB that may be used on each GPU; 0 without a grant."""
        return int(self._reply["gpus"][0]["memory_mb"]) if self.granted else 0

    @property
    def env(self) -> dict[str, str]:
        """What the process must set before CUDA starts; on the CPU, what hides the GPUs."""
        return dict(self._reply["env"] if self.granted else _HIDE_GPUS)

    @property
    def enforcement(self) -> str | None:
        """How the bytes are enforced: `driver`, `mps` or `advisory`."""
        return self._reply.get("enforcement") if self.granted else None

    @property
    def waited_s(self) -> float:
        """How long the request waited, as the daemon says."""
        return float(self._reply.get("waited_s") or 0.0)

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """Why each GPU did not serve the request: `gpu`, `reason`, `detail`."""
        return list(self._reply.get("reasons") or ())

    @property
    def eta_s(self) -> float | None:
        """In how many seconds it might be granted, where the daemon knows."""
        return self._reply.get("eta_s")

    @property
    def live(self) -> bool:
        """Whether the lease is held now, as far as this process has heard."""
        return self.granted and self.ended is None

    def settle(self, reply: dict[str, Any], now_s: float) -> str | None:
        """Take the daemon's answer; return the lease's id, None where there is no lease.

        Raises `Malformed`, and changes nothing, if it is no answer.
        """
        if reply.get("granted") is not True:
            note = reply.get("note")
            if reply.get("granted") is not False or type(note) is not str:
                raise Malformed("a lease reply is neither a grant nor a refusal")
            self._reply = reply
            self.refuse(note, reasons_in_words(reply))
            return None
        lease_id, token = reply.get("lease_id"), reply.get("token")
        gpus, env = reply.get("gpus"), reply.get("env")
        if type(lease_id) is not str or type(token) is not str:
            raise Malformed("a grant has no lease_id or no token")
        if type(gpus) is not list or not gpus or type(env) is not dict:
            raise Malformed("a grant names no GPUs or no env")
        for gpu in gpus:
            if (
                type(gpu) is not dict
                or type(gpu.get("memory_mb")) is not int
                or type(gpu.get("uuid")) is not str
                or type(gpu.get("index")) is not int
            ):
                raise Malformed("a grant names a GPU without its index, uuid or memory_mb")
        for value in env.values():
            if type(value) is not str:
                raise Malformed("a grant's env holds something other than strings")
        if reply.get("expires_at") is not None:
            self._set_ttl(reply, now_s)
        self._reply = reply
        self.lease_id = lease_id
        self.token = token
        self.granted = True
        return lease_id

    def reattached(self, reply: dict[str, Any], now_s: float) -> str:
        """Take the daemon's answer to `reattach`; return the lease's id. Raises `Malformed`."""
        self.renewals = 0
        self.expires_at = self.renew_at = None
        lease_id = self.settle(reply, now_s)
        if lease_id is None:
            raise Malformed("a reattached lease is no grant")
        self.detached = False
        return lease_id

    @property
    def renew_after_s(self) -> float:
        """How long a renewal is good before the next."""
        return max(self.ttl_s / 3, RENEW_LEAST_S)

    def _set_ttl(self, reply: dict[str, Any], now_s: float) -> None:
        expires_at, timestamp = reply["expires_at"], reply.get("timestamp")
        if not isinstance(expires_at, float | int) or not isinstance(timestamp, float | int):
            raise Malformed("a grant's expires_at or timestamp is not a time")
        self.expires_at = float(expires_at)
        if not (isfinite(expires_at) and isfinite(timestamp)):
            raise Malformed("a grant's expires_at or timestamp is not a time")
        self.ttl_s = max(0.0, expires_at - timestamp)
        self.renew_at = now_s + self.renew_after_s

    def refuse(self, reason: str, detail: str) -> None:
        """Go on with the CPU, also where there was a grant that could not be kept."""
        if self.granted:
            self.granted = False
            self.lease_id = self.token = self.expires_at = self.renew_at = self.ended = None
            self._reply = MappingProxyType({})
        self.reason = reason
        self.detail = detail

    def renewed(self, expires_at: object, now_s: float) -> None:
        """Take the answer to a renewal: unix seconds, or None for no limit any more."""
        self.renewals = 0
        if type(expires_at) is float or type(expires_at) is int:
            self.expires_at = float(expires_at)
            self.renew_at = now_s + self.renew_after_s
        else:
            self.expires_at = self.renew_at = None

    def not_renewed(self, now_s: float) -> None:
        """Try again soon: the daemon could not renew it, and did not say that it is over."""
        self.renewals = 0
        self.renew_at = now_s + max(self.ttl_s / 10, RENEW_LEAST_S)

    def __repr__(self) -> str:
        """Say all but the token: it is a secret, and this ends up in logs."""
        return self.told_as(type(self).__name__)

    def told_as(self, kind: str) -> str:
        """Return what `repr` says of it, as being of some kind."""
        if not self.granted:
            return f"<{kind} device={self.device!r} reason={self.reason!r}>"
        state = self.ended or (
            "detached" if self.detached else "revoking" if self.revoking else "held"
        )
        return (
            f"<{kind} {self.lease_id} device={self.device!r} memory_mb={self.memory_mb} "
            f"gpus={[gpu['index'] for gpu in self.gpus]} {state}>"
        )
