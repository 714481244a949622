"""The policy as it was last seen, for a while; and what to assume when nobody says.

Owns how long an answer counts. Knows no connection.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

TTL_VARIABLE = "GPU_ORCHESTRATOR_POLICY_TTL"
DEFAULT_TTL_S = 30.0
# A daemon that hangs costs its time limit at most this often; one that is back is soon noticed.
FAILURE_TTL_S = 2.0


def ttl_s() -> float:
    """Return for how many seconds a policy counts; 0 asks every time."""
    text = os.environ.get(TTL_VARIABLE)
    if not text:
        return DEFAULT_TTL_S
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if 0 <= value < float("inf"):
        return value
    warnings.warn(
        f"{TTL_VARIABLE}={text!r} is not a number of seconds from 0 on; using {DEFAULT_TTL_S:g}",
        RuntimeWarning,
        stacklevel=3,
    )
    return DEFAULT_TTL_S


def unreachable(why: str) -> dict[str, Any]:
    """Return the policy to go by while no daemon answers: as under SAFE_MODE."""
    return {
        "reachable": False,
        "revision": 0,
        "safe_mode": True,
        "safe_mode_read_only": True,
        "policy": {},
        "message": why,
    }


def no_gpu_info(fault: Exception) -> dict[str, Any]:
    """Return what `gpu_info` says when nobody could be asked."""
    return {"available": False, "gpus": [], "message": str(fault)}


class PolicyCache:
    """One policy document and until when it counts."""

    def __init__(self) -> None:
        self._document: dict[str, Any] | None = None
        self._until_s = 0.0

    def get(self, now_s: float) -> dict[str, Any] | None:
        """Return a copy of the document while it counts."""
        if self._document is None or now_s >= self._until_s:
            return None
        return copy.deepcopy(self._document)

    def put(self, reply: dict[str, Any] | str, now_s: float) -> dict[str, Any]:
        """Take the daemon's reply, or why there is none; return the document to go by."""
        if isinstance(reply, str):
            document = unreachable(reply)
            self._until_s = now_s + min(ttl_s(), FAILURE_TTL_S)
        else:
            # Unknown is not off.
            safe_mode = reply.get("safe_mode") is not False
            document = {**reply, "reachable": True, "safe_mode": safe_mode}
            document.setdefault("policy", {})
            self._until_s = now_s + ttl_s()
        self._document = document
        return copy.deepcopy(document)

    def forget(self) -> None:
        """Ask anew next time."""
        self._document = None


_BY_SOCKET: dict[str, PolicyCache] = {}


def cache_for(path: str) -> PolicyCache:
    """Return the cache of the daemon at `path`, one for the whole process."""
    return _BY_SOCKET.setdefault(path, PolicyCache())
