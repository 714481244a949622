"""What a caller holds: a decision, and with it the connection that carries it.

The conversation knows the decision and not this, so that nothing goes round in a circle: with the
last reference to a lease of its own connection the connection is closed, and the daemon gives the
memory to the next one.
"""

from __future__ import annotations

from typing import Any

from libclient.decision import Decision


class Held:
    """GPU or CPU, and why; the fields are those of `Decision`, as they are now."""

    __slots__ = ("__weakref__", "_decision")

    def __init__(self, decision: Decision) -> None:
        self._decision = decision

    @property
    def granted(self) -> bool:
        """Whether GPU memory is (or was) held."""
        return self._decision.granted

    @property
    def device(self) -> str:
        """`cuda:0` for a grant whose `env` is applied before CUDA starts, else `cpu`."""
        return self._decision.device

    @property
    def reason(self) -> str:
        """Empty when granted, else one word for counting."""
        return self._decision.reason

    @property
    def detail(self) -> str:
        """The reason, for people."""
        return self._decision.detail

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """Why each GPU did not serve the request: `gpu`, `reason`, `detail`."""
        return self._decision.reasons

    @property
    def eta_s(self) -> float | None:
        """In how many seconds it might be granted, where the daemon knows."""
        return self._decision.eta_s

    @property
    def lease_id(self) -> str | None:
        """The lease's name, None without a grant."""
        return self._decision.lease_id

    @property
    def token(self) -> str | None:
        """What releases it: a secret. None without a grant."""
        return self._decision.token

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """What is held, by GPU: `index`, `uuid`, `memory_mb`."""
        return self._decision.gpus

    @property
    def memory_mb(self) -> int:
        """MiB that may be used on each GPU; 0 without a grant."""
        return self._decision.memory_mb

    @property
    def env(self) -> dict[str, str]:
        """What the process must set before CUDA starts; on the CPU, what hides the GPUs."""
        return self._decision.env

    @property
    def enforcement(self) -> str | None:
        """How the bytes are enforced: `driver`, `mps` or `advisory`."""
        return self._decision.enforcement

    @property
    def expires_at(self) -> float | None:
        """Unix seconds at which it ends unless it is renewed; None where it has no time limit."""
        return self._decision.expires_at

    @property
    def waited_s(self) -> float:
        """How long the request waited, as the daemon says."""
        return self._decision.waited_s

    @property
    def revoking(self) -> bool:
        """Whether the daemon wants it back, by `deadline`."""
        return self._decision.revoking

    @property
    def deadline(self) -> float | None:
        """Unix seconds by which the daemon wants it back, None where it does not or did not say."""
        return self._decision.deadline

    @property
    def ended(self) -> str | None:
        """None while the lease lives, else why it does not."""
        return self._decision.ended

    @property
    def detached(self) -> bool:
        """Whether its connection was lost, and the library is on its way back to the daemon."""
        return self._decision.detached

    @property
    def live(self) -> bool:
        """Whether the lease is held now, as far as this process has heard."""
        return self._decision.live

    def __repr__(self) -> str:
        """Say all but the token: it is a secret, and this ends up in logs."""
        return self._decision.told_as(type(self).__name__)
