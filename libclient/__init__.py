"""Ask gpuorchd for GPU memory, and go on with the CPU where there is none.

    import libclient

    with libclient.lease("analyst", "2GiB") as lease:
        libclient.env.apply(lease.env)      # before CUDA starts
        model = load(device=lease.device)   # "cuda:0" or "cpu"

Importing this is cheap: what it offers is loaded when it is first used, and nothing here imports a
framework or touches CUDA. `libclient.aio` has the same names for asyncio.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from libclient.version import VERSION

if TYPE_CHECKING:
    from libclient import aio, env, errors, sizes
    from libclient.blocking import Client, EventStream, Lease, connect, get_policy, gpu_info, lease
    from libclient.errors import (
        CudaAlreadyStarted,
        ForkedClient,
        GpuOrchError,
        NotGranted,
        RequestError,
        RequestRefused,
        Unavailable,
    )

__version__ = VERSION

__all__ = [
    "Client",
    "CudaAlreadyStarted",
    "EventStream",
    "ForkedClient",
    "GpuOrchError",
    "Lease",
    "NotGranted",
    "RequestError",
    "RequestRefused",
    "Unavailable",
    "__version__",
    "aio",
    "connect",
    "env",
    "errors",
    "get_policy",
    "gpu_info",
    "lease",
    "sizes",
]

_BLOCKING = {"Client", "EventStream", "Lease", "connect", "get_policy", "gpu_info", "lease"}
_MODULES = {"aio", "env", "errors", "sizes"}

if not TYPE_CHECKING:
    # Hidden from type checkers, which would otherwise believe in any name.
    def __getattr__(name):
        """Load a public name when it is first asked for."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _MODULES:
            value = import_module(f"libclient.{name}")
        else:
            room = "blocking" if name in _BLOCKING else "errors"
            value = getattr(import_module(f"libclient.{room}"), name)
        globals()[name] = value
        return value

    def __dir__():
        """List the public names, loaded or not."""
        return sorted(__all__)
