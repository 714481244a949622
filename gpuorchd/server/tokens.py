"""Lease tokens: 128 random bits in hex, from a pool, so that a request makes no system call."""

from __future__ import annotations

import hashlib
import os
from typing import Final

from gpuorchd.core.model import Token

TOKEN_BYTES: Final = 16
# One call to the kernel for this many tokens.
POOL_TOKENS: Final = 256
# How a digest begins; no token does.
DIGEST: Final = "sha256:"


def digest_of(token: Token) -> Token:
    """Give the name under which a token is kept where the token itself must not be."""
    return Token(DIGEST + hashlib.sha256(token.encode()).hexdigest())


class TokenPool:
    """Tokens that were never handed out before."""

    __slots__ = ("_fresh",)

    def __init__(self) -> None:
        self._fresh: list[Token] = []

    def take(self) -> Token:
        """Return a token that nobody can guess."""
        if not self._fresh:
            digits = os.urandom(TOKEN_BYTES * POOL_TOKENS).hex()
            size = 2 * TOKEN_BYTES
            self._fresh = [Token(digits[at : at + size]) for at in range(0, len(digits), size)]
        return self._fresh.pop()
