"""One question to a program's side HTTP port on 127.0.0.1, within a given time.

What answers may be anything: no more than `BODY_BYTES` of it are read, and whatever is wrong with
it is a `Reached` that says so.
"""

from __future__ import annotations

import http.client
import json
from time import monotonic
from typing import Any, Final, NamedTuple

HOST: Final = "127.0.0.1"
# A health page has hundreds of bytes.
BODY_BYTES: Final = 65_536


class Reached(NamedTuple):
    """What came of a question.

    `status` is the HTTP status, None where none came; `fault` then says why. `listening` is whether
    somebody took the connection.
    """

    status: int | None
    fault: str
    listening: bool
    document: dict[str, Any]


def ask(port: int, path: str, timeout_s: float) -> Reached:
    """Ask for a page. Raises nothing for what the other side does."""
    deadline_s = monotonic() + timeout_s
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    listening = False
    try:
        connection.connect()
        listening = True
        connection.request("GET", path, headers={"Accept": "application/json"})
        connection.sock.settimeout(max(0.001, deadline_s - monotonic()))
        response = connection.getresponse()
        return Reached(response.status, "", True, _document(response.read(BODY_BYTES)))
    except ConnectionRefusedError:
        return Reached(None, "nobody listens there", False, {})
    except TimeoutError:
        what = "takes the connection and does not answer" if listening else "no connection"
        return Reached(None, f"{what} within {timeout_s:g} s", listening, {})
    except (OSError, http.client.HTTPException) as fault:
        what = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
        return Reached(None, f"does not speak HTTP: {what}" if listening else what, listening, {})
    finally:
        connection.close()


def _document(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
