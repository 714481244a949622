"""Bytes become the same requests in whatever pieces they come, at a cost like their length."""

from __future__ import annotations

import time

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuorchd.server.faults import Fault
from gpuorchd.server.intake import Intake
from gpuorchd.server.lines import LineSplitter, LineTooLong
from libclient.wire.framing import (
    MAX_REQUEST_BYTES,
    EmptyFrame,
    FrameSplitter,
    FrameTooLarge,
    frame,
)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut data at these places."""
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), st.lists(st.integers(0)))
def test_frames_come_out_as_they_went_in(payloads: list[bytes], cuts: list[int]) -> None:
    splitter = FrameSplitter(MAX_REQUEST_BYTES)
    found = []
    for piece in pieces_of(b"".join(map(frame, payloads)), cuts):
        splitter.feed(piece)
        while (payload := splitter.next_frame()) is not None:
            assert type(payload) is bytes
            found.append(payload)
    assert found == payloads
    assert splitter.pending_bytes == 0


@given(
    st.lists(st.binary(max_size=60).filter(lambda line: b"\n" not in line), max_size=20),
    st.lists(st.integers(0)),
    st.booleans(),
)
def test_lines_come_out_as_they_went_in(lines: list[bytes], cuts: list[int], crlf: bool) -> None:
    lines = [line.rstrip(b"\r") for line in lines]
    data = (b"\r\n" if crlf else b"\n").join(lines)
    splitter = LineSplitter()
    found = []
    for piece in pieces_of(data, cuts):
        splitter.feed(piece)
        while (line := splitter.next_line()) is not None:
            found.append(line)
    splitter.end()
    while (line := splitter.next_line()) is not None:
        found.append(line)
    # What follows the last end of line is a line only where there is something.
    assert found == (lines if lines and lines[-1] else lines[:-1])


@pytest.mark.parametrize("kind", ["frame", "line"])
def test_a_byte_at_a_time_costs_no_more_than_the_length(kind: str) -> None:
    def cost_s(size: int) -> float:
        splitter = FrameSplitter(MAX_REQUEST_BYTES) if kind == "frame" else LineSplitter()
        take = splitter.next_frame if isinstance(splitter, FrameSplitter) else splitter.next_line
        data = frame(b"x" * size) if kind == "frame" else b"x" * size + b"\n"
        began = time.process_time()
        for at in range(len(data) - 1):
            splitter.feed(data[at : at + 1])
            assert take() is None
        splitter.feed(data[-1:])
        assert take() == b"x" * size
        return time.process_time() - began

    small_s = min(cost_s(8_000) for _ in range(3))
    # Eight times the bytes: eight times the work, where copying each time would take 64 times.
    assert cost_s(64_000) < 30 * small_s


@given(st.integers(MAX_REQUEST_BYTES + 1, 2**32 - 1))
def test_a_frame_over_the_limit_is_known_by_its_length_alone(announced: int) -> None:
    splitter = FrameSplitter(MAX_REQUEST_BYTES)
    splitter.feed(announced.to_bytes(4, "big"))
    with pytest.raises(FrameTooLarge) as caught:
        splitter.next_frame()
    assert (caught.value.announced, caught.value.limit) == (announced, MAX_REQUEST_BYTES)


def test_an_empty_frame_is_no_message() -> None:
    splitter = FrameSplitter(10)
    splitter.feed(bytes(4))
    with pytest.raises(EmptyFrame):
        splitter.next_frame()


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_line_may_be_as_long_as_the_limit_without_its_end(end: bytes) -> None:
    splitter = LineSplitter()
    splitter.feed(b"x" * MAX_REQUEST_BYTES + end)
    splitter.end()
    assert splitter.next_line() == b"x" * MAX_REQUEST_BYTES
    splitter = LineSplitter()
    splitter.feed(b"x" * (MAX_REQUEST_BYTES + 1) + end)
    with pytest.raises(LineTooLong):
        splitter.next_line()


def test_the_first_byte_decides_for_good() -> None:
    text = Intake()
    assert (text.is_text, text.next()) == (False, None)
    text.feed(b"h")
    assert (text.is_text, text.is_between_frames) == (True, False)
    frames = Intake()
    frames.feed(frame(msgpack.packb({"id": 1, "op": "health"})))
    request = frames.next()
    assert request is not None
    assert not isinstance(request, Fault)
    assert (frames.is_text, frames.is_between_frames) == (False, True)


def test_what_cannot_be_followed_is_a_fault() -> None:
    for data, code in (
        (bytes(4), "bad_frame"),
        (b"\xff" * 4, "frame_too_large"),
        (b"x" * 70_000, "frame_too_large"),
    ):
        intake = Intake()
        intake.feed(data)
        fault = intake.next()
        assert isinstance(fault, Fault)
        assert (fault.code, fault.request_id) == (code, None)
