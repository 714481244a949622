"""Arguments as people write them: sizes, durations, GPUs, and the flags of a lease request."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import Any, TypeVar

from libclient import sizes
from libclient.cli.text import safe
from libclient.wire.vocabulary import GPUS_MAX, GRACE_S_MAX, PRIORITIES, WAIT_S_MAX

T = TypeVar("T")


def _kind(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a reader of text one for argparse, which otherwise hides what a ValueError says."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as fault:
            raise ArgumentTypeError(safe(fault)) from None

    return read


def _duration(most_s: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        seconds = sizes.parse_duration(text)
        if seconds > most_s:
            most = sizes.format_duration(most_s)
            raise ValueError(f"duration {text!r} is more than {most}, the most that is allowed")
        return seconds

    return _kind(parse)


def _positive(most_s: float) -> Callable[[str], float]:
    within = _duration(most_s)

    def parse(text: str) -> float:
        seconds = within(text)
        if seconds <= 0:
            raise ValueError(f"duration {text!r} is not above 0")
        return seconds

    return _kind(parse)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= GPUS_MAX:
        raise ValueError(f"{text!r} is not a number from 1 to {GPUS_MAX}")
    return int(text)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < len(text) <= 18:
        raise ValueError(f"{text!r:.80} is not a whole number of at most 18 digits")
    return int(text)


def _gpu(text: str) -> str | int:
    """Read a GPU: digits alone are an index, anything else is a uuid."""
    if not text or not text.isprintable():
        raise ValueError(f"{text!r} is no GPU: write an index such as 0, or a uuid")
    return _number(text) if text.isascii() and text.isdigit() else text


def _gpus(text: str) -> list[str | int]:
    return [_gpu(part) for part in text.split(",")]


memory = _kind(sizes.parse_memory)
wait = _duration(WAIT_S_MAX)
grace = _duration(GRACE_S_MAX)
# A day: longer than anybody waits for an answer, shorter than what poll can count.
budget = _duration(86_400)
# `events --for` and `top --interval`: a week, as for a wait.
span = _positive(WAIT_S_MAX)
# `--expected`: a year. Whoever holds longer than that holds for good.
expected = _positive(365 * 86_400)
gpu_count = _kind(_count)
number = _kind(_number)
gpu = _kind(_gpu)
gpu_list = _kind(_gpus)


def add_request_flags(parser: ArgumentParser) -> None:
    """Add the flags that say what is asked for: those of `run` and `explain`."""
    ask = parser.add_argument_group("what is asked for")
    ask.add_argument(
        "--mem", type=memory, metavar="SIZE",
        help="memory on each GPU, such as 4GiB (default: what the policy gives)",
    )  # fmt: skip
    ask.add_argument(
        "--agent", metavar="NAME",
        help="in whose name (default: $GPUORCH_AGENT, else the systemd service, else the command)",
    )  # fmt: skip
    ask.add_argument(
        "--gpus", type=gpu_count, default=1, metavar="N", help="how many GPUs (default: 1)"
    )
    ask.add_argument("--exclusive", action="store_true", help="whole GPUs, shared with nobody")
    ask.add_argument(
        "--wait", type=wait, default=0.0, metavar="TIME",
        help="how long to wait for it, such as 5m (default: not at all)",
    )  # fmt: skip
    ask.add_argument("--priority", choices=PRIORITIES, help="before whom (default: the policy's)")
    ask.add_argument(
        "--device", type=gpu_list, action="extend", metavar="GPU[,GPU]",
        help="only these GPUs: an index or uuid; may be repeated",
    )  # fmt: skip
    ask.add_argument("--expected", type=expected, metavar="TIME", help="how long it will be held")
    ask.add_argument("--purpose", metavar="TEXT", help="what for; others can read it")


def request_fields(args: Namespace, agent: str) -> dict[str, Any]:
    """Return the fields of the request. Raises ValueError for what cannot be asked for."""
    from libclient.asking import lease_fields

    return lease_fields(
        agent,
        args.mem,
        gpus=args.gpus,
        exclusive=args.exclusive,
        priority=args.priority,
        wait_s=args.wait,
        devices=args.device,
        expected_s=args.expected,
        purpose=args.purpose,
    )
