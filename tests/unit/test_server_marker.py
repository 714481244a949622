"""The marker: whatever came before it is thrown away, whatever comes behind it is kept."""

from __future__ import annotations

import random

import pytest

from gpuorchd.server.marker import FIRST, NONCE_BYTES, MarkerWait

REST = b"\x00\x00\x00\x01what is meant for this daemon"


def fed(wait: MarkerWait, *pieces: bytes) -> bytes | None:
    """What is behind the marker, once it has come; everything before it has to give None."""
    for place, piece in enumerate(pieces):
        rest = wait.feed(piece)
        if rest is not None:
            return rest + b"".join(pieces[place + 1 :])
    return None


def marker_of(wait: MarkerWait) -> bytes:
    return FIRST + wait.nonce


def test_every_nonce_is_another() -> None:
    nonces = {MarkerWait().nonce for _ in range(100)}
    assert len(nonces) == 100
    assert {len(nonce) for nonce in nonces} == {NONCE_BYTES}


def test_it_is_found_across_any_two_splits() -> None:
    before = b"half a requ"
    size = len(before) + len(FIRST) + NONCE_BYTES + len(REST)
    for first in range(size + 1):
        for second in range(first, size + 1):
            wait = MarkerWait()
            whole = before + marker_of(wait) + REST
            pieces = (whole[:first], whole[first:second], whole[second:])
            assert fed(wait, *pieces) == REST, (first, second)


def test_it_is_found_byte_by_byte() -> None:
    wait = MarkerWait()
    whole = b"\xff\xff\xff" + marker_of(wait)
    for byte in whole[:-1]:
        assert wait.feed(bytes([byte])) is None
    assert wait.feed(whole[-1:]) == b""


@pytest.mark.parametrize(
    "before",
    [
        b"",
        b"\xff",
        FIRST,
        FIRST + b"\xff",
        FIRST * 5,
        FIRST + bytes(NONCE_BYTES),
        bytes(100_000),
    ],
    ids=lambda before: f"{len(before)} bytes of {before[:4].hex()}",
)
def test_what_looks_like_its_beginning_does_not_hide_it(before: bytes) -> None:
    wait = MarkerWait()
    assert fed(wait, before, marker_of(wait)[:9], marker_of(wait)[9:], REST) == REST
    wait = MarkerWait()
    # As much of the true one as can be, and then the true one.
    assert fed(wait, before + marker_of(wait)[:-1] + marker_of(wait) + REST) == REST


def test_the_marker_of_another_daemon_is_none() -> None:
    wait, other = MarkerWait(), MarkerWait()
    assert fed(wait, marker_of(other), b"requests") is None
    assert wait.feed(marker_of(wait) + REST) == REST


def test_what_it_keeps_meanwhile_is_bounded() -> None:
    wait = MarkerWait()
    chance = random.Random(1)
    for _ in range(100):
        assert wait.feed(chance.randbytes(10_000)) is None
        assert len(wait._tail) < len(marker_of(wait))
