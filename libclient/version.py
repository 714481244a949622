"""The version of the whole distribution, read by packaging, client and daemon alike."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
