"""A lease's environment, set before CUDA reads it.

CUDA reads `CUDA_VISIBLE_DEVICES` and the MPS limits once, when it starts in a process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from libclient.errors import CudaAlreadyStarted
from libclient.framework import cuda_framework


def apply(env: Mapping[str, str]) -> None:
    """Set `env` (that of a lease) in `os.environ`.

    Raises CudaAlreadyStarted, and sets nothing, where that would change something and a framework
    has started CUDA in this process already: the change would be without effect.
    """
    changed = [name for name, value in env.items() if os.environ.get(name) != value]
    if not changed:
        return
    if cuda_framework() is not None:
        raise CudaAlreadyStarted(
            f"{', '.join(changed)} cannot take effect: CUDA was started in this process before "
            f"the lease was applied (take the lease before the first CUDA call)"
        )
    os.environ.update(env)
