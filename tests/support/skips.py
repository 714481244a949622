"""The reasons for which a test may skip, and the rule that a run in CI allows only two of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# A card that is not there, and data that lies beside some checkouts: the two things that a machine
# may lack for good. Everything else that a test needs can be installed.
NO_GPU = "no GPU on this machine"
NO_SHARED_DATA = "no shared data beside the checkout"
ALLOWED = (NO_GPU, NO_SHARED_DATA)

SHARED = Path(__file__).parents[3] / "shared"


def has_gpu() -> bool:
    """Whether a driver offers a card, told from its device files: nothing is initialised."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def shared_data(name: str) -> Path:
    """Return a file of the shared data, or skip the test."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(NO_SHARED_DATA)
    return path


def in_ci() -> bool:
    """Whether this run is one in which everything that can be installed has to be there."""
    return os.environ.get("CI", "") not in {"", "0", "false"}


def unexcused(reasons: list[str]) -> list[str]:
    """Return the reasons that a run in CI does not allow."""
    return [reason for reason in reasons if not reason.startswith(ALLOWED)]
