"""What a message from the daemon has to hold, and how to take it out.

Everything here distrusts the peer: what breaks the contract raises `Malformed`, what is optional
and of the wrong kind counts as absent.
"""

from __future__ import annotations

from typing import Any


class Malformed(Exception):
    """A reply or event that breaks the contract. Its text says in what way."""


def check_error(reply: dict[str, Any]) -> None:
    """Raise unless it is a refusal with its code and message."""
    error = reply.get("error")
    if (
        reply["ok"] is not False
        or type(error) is not dict
        or type(error.get("code")) is not str
        or type(error.get("message")) is not str
    ):
        raise Malformed("a refusal without its code and message")


def gist_of(reply: dict[str, Any]) -> str:
    """Return which reply it is, for people; short, whatever the peer wrote."""
    if reply["ok"] is True:
        return f"id {reply.get('id')!r:.80}"
    error = reply["error"]
    return f"id {reply.get('id')!r:.80}, {error['code']:.80}: {error['message']:.300}"


def missed_before(last: int | None, event: dict[str, Any]) -> int:
    """How many events are missing before this one. Raises `Malformed` if `seq` does not rise."""
    seq = event.get("seq")
    if type(seq) is not int or (last is not None and seq <= last):
        raise Malformed(f"an event whose seq is {seq!r} after {last}")
    return 0 if last is None else seq - last - 1


def deadline_of(event: dict[str, Any]) -> float | None:
    """Return the unix time that an event announces, None where it does not say."""
    time, deadline_s = event.get("time"), event.get("deadline_s")
    if isinstance(time, int | float) and isinstance(deadline_s, int | float):
        return float(time) + float(deadline_s)
    return None


def text_of(value: object) -> str:
    """Return a string as it is, and anything else as none at all."""
    return value if type(value) is str else ""


def number_of(value: object) -> int:
    """Return a number as it is, and anything else as 0, which is nobody's id."""
    return value if type(value) is int else 0


def reasons_in_words(reply: dict[str, Any]) -> str:
    """Return why each GPU did not serve a request, in one line."""
    said = []
    for reason in reply.get("reasons") or ():
        if isinstance(reason, dict) and reason.get("detail"):
            index = reason.get("gpu")
            said.append(f"{'host' if index is None else f'gpu {index}'}: {reason['detail']}")
    return "; ".join(said)
