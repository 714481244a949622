"""The words of the wire contract: ops, codes, notes, states, event names and field bounds.

One place for both sides. Nothing here has behaviour.
"""

from __future__ import annotations

from typing import Final

PROTOCOL: Final = 1
DEFAULT_SOCKET: Final = "/run/justnews/gpuorch.sock"
SOCKET_VARIABLE: Final = "GPUORCH_SOCKET"

# Error codes.
BAD_FRAME: Final = "bad_frame"
FRAME_TOO_LARGE: Final = "frame_too_large"
BAD_REQUEST: Final = "bad_request"
UNKNOWN_OP: Final = "unknown_op"
UNKNOWN_TOKEN: Final = "unknown_token"
UNKNOWN_REQUEST: Final = "unknown_request"
NOT_OWNER: Final = "not_owner"
NOT_FOUND: Final = "not_found"
FORBIDDEN: Final = "forbidden"
CONFLICT: Final = "conflict"
LIMIT: Final = "limit"
SHUTTING_DOWN: Final = "shutting_down"
INTERNAL: Final = "internal"

# Codes after which asking again, unchanged, may succeed.
RETRYABLE: Final = frozenset({LIMIT, SHUTTING_DOWN, CONFLICT})
# Codes after which the daemon closes the connection.
CLOSING: Final = frozenset({BAD_FRAME, FRAME_TOO_LARGE})

# Why a lease was not granted, in the order in which the first that applies is named.
NOTES: Final = (
    "SAFE_MODE",
    "NO_GPU",
    "POLICY",
    "QUOTA",
    "CORDONED",
    "UNHEALTHY",
    "RESERVED",
    "INSUFFICIENT_MEMORY",
)
# How a wait can end without a grant, besides the notes above.
WAIT_NOTES: Final = ("TIMEOUT", "CANCELLED")

PRIORITIES: Final = ("critical", "normal", "background")
ENFORCEMENTS: Final = ("driver", "mps", "advisory")
LEASE_STATES: Final = ("active", "revoking", "draining", "detached")
DEVICE_STATES: Final = ("ok", "cordoned", "unhealthy", "unknown")
SEAL_SIGNALS: Final = ("TERM", "INT", "HUP", "USR1", "USR2")

OPEN_OPS: Final = (
    "hello",
    "health",
    "ready",
    "gpu_info",
    "policy_get",
    "lease",
    "release",
    "renew",
    "cancel",
    "reattach",
    "seal",
    "allocations",
    "queue",
    "explain",
    "subscribe",
    "unsubscribe",
    "metrics",
    "whoami",
)
ADMIN_OPS: Final = ("policy_set", "cordon", "uncordon", "revoke")

EVENTS: Final = (
    "lease.queued",
    "lease.granted",
    "lease.denied",
    "lease.released",
    "lease.revoking",
    "lease.revoked",
    "lease.expired",
    "lease.draining",
    "lease.drained",
    "lease.withheld",
    "lease.over_limit",
    "gpu.appeared",
    "gpu.vanished",
    "gpu.cordoned",
    "gpu.uncordoned",
    "gpu.unhealthy",
    "gpu.recovered",
    "gpu.unleased",
    "policy.changed",
    "daemon.started",
    "daemon.resumed",
    "daemon.stopping",
    "daemon.safe_mode",
)
EVENTS_LOST: Final = "events.lost"
TOPICS: Final = ("lease", "gpu", "policy", "daemon")

# Bounds of request fields.
REQUEST_ID_MAX: Final = 2**63 - 1
REQUEST_ID_CHARS: Final = 64
AGENT_CHARS: Final = 128
MEMORY_MB_MAX: Final = 16_777_216
GPUS_MAX: Final = 64
DEVICES_MAX: Final = 64
SHARE_PCT_MAX: Final = 100
WAIT_S_MAX: Final = 604_800
PURPOSE_CHARS: Final = 256
LABELS_MAX: Final = 16
LABEL_NAME_CHARS: Final = 64
LABEL_VALUE_CHARS: Final = 256
GRACE_S_MAX: Final = 86_400
PAGE_MAX: Final = 1_000
