"""What the side port answers, asked without sockets."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from gpuorchd import views
from gpuorchd.observe.http import Pages
from gpuorchd.observe.http_pages import Answers, Asked, Page, host_name
from tests.support.observed import SECRET, ObservedEngine

SOCKET = "/run/justnews/gpuorch.sock"


async def _no_metrics() -> bytes:
    return b"# nothing\n"


def pages_of(
    engine: ObservedEngine,
    ready: Callable[[], Mapping[str, Any]] = lambda: {"ready": True, "checks": {}},
    metrics: Callable[[], Awaitable[bytes]] = _no_metrics,
    extra_hosts: tuple[str, ...] = (),
) -> Pages:
    def moment() -> views.Moment:
        return views.Moment(engine.now_ns(), 1_700_000_000 * 10**9)

    return Pages(
        health=lambda: views.health(engine.state),
        ready=ready,
        gpu_info=lambda: {"available": True},
        policy=lambda: views.policy_get(engine.state),
        allocations=lambda after, limit: views.allocations(engine.state, moment(), after, limit),
        metrics=metrics,
        socket_path=SOCKET,
        extra_hosts=extra_hosts,
    )


class Port:
    """Ask the pages as a client would."""

    def __init__(self, pages: Pages) -> None:
        self.reports: list[tuple[str, dict[str, object]]] = []
        self._answers = Answers(pages, self._report)

    def _report(self, event: str, /, **fields: object) -> None:
        self.reports.append((event, fields))

    async def get(
        self,
        path: str,
        method: str = "GET",
        hosts: tuple[str, ...] = ("localhost",),
        query: Mapping[str, str] | None = None,
    ) -> Page:
        return await self._answers.answer(Asked(method, path, query or {}, hosts))


@pytest.fixture
def engine() -> ObservedEngine:
    return ObservedEngine(cards=1)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8014", "localhost"),
        ("localhost.:8014", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]:8014", "::1"),
        ("evil.example", "evil.example"),
        ("localhost@evil.example", ""),
        ("localhost:80@evil.example", ""),
        ("localhost/evil", ""),
        ("localhost:port", ""),
        ("[::1", ""),
        ("", ""),
        (" ", " "),
    ],
)
def test_the_name_in_a_host_header_is_read_strictly(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize(
    "hosts",
    [
        (),
        ("evil.example",),
        ("evil.example:8014",),
        ("localhost.evil.example",),
        ("localhost", "evil.example"),
        ("127.0.0.1.evil.example",),
        ("localhost:80@evil.example",),
    ],
)
async def test_a_foreign_host_reads_nothing(engine: ObservedEngine, hosts: tuple[str, ...]) -> None:
    page = await Port(pages_of(engine)).get("/gpu/info", hosts=hosts)
    assert page.status == 403
    assert b"available" not in page.body


async def test_a_configured_host_is_served(engine: ObservedEngine) -> None:
    port = Port(pages_of(engine, extra_hosts=("GPU.internal",)))
    assert (await port.get("/health", hosts=("gpu.internal:8014",))).status == 200
    assert (await port.get("/health", hosts=("gpu.other",))).status == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"])
@pytest.mark.parametrize("path", ["/lease", "/policy", "/nowhere"])
async def test_a_change_is_refused_and_shown_the_way_to_the_socket(
    engine: ObservedEngine, method: str, path: str
) -> None:
    page = await Port(pages_of(engine)).get(path, method)
    assert page.status == 405
    assert page.headers["Allow"] == "GET, HEAD"
    answer = json.loads(page.body)
    assert answer["ok"] is False
    assert answer["error"]["code"] == "method_not_allowed"
    assert SOCKET in answer["error"]["message"]
    assert answer["socket"] == SOCKET


async def test_an_unknown_page_is_told_what_there_is(engine: ObservedEngine) -> None:
    page = await Port(pages_of(engine)).get("/secret")
    assert page.status == 404
    assert "/metrics" in json.loads(page.body)["error"]["message"]


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
async def test_ready_answers_with_a_status_that_scripts_can_use(
    engine: ObservedEngine, ready: bool, status: int
) -> None:
    report = {"ready": ready, "checks": {"devices": {"ok": ready, "detail": "d"}}}
    page = await Port(pages_of(engine, ready=lambda: report)).get("/ready")
    assert page.status == status
    assert json.loads(page.body) == report


async def test_pages_show_what_the_socket_shows(engine: ObservedEngine) -> None:
    port = Port(pages_of(engine))
    assert json.loads((await port.get("/health")).body) == {"status": "ok", "safe_mode": False}
    assert json.loads((await port.get("/policy")).body) == views.policy_get(engine.state)
    assert json.loads((await port.get("/gpu/info")).body) == {"available": True}
    index = (await port.get("/")).body.decode()
    assert SOCKET in index
    assert "/allocations" in index


async def test_allocations_are_paged_and_hold_no_token(engine: ObservedEngine) -> None:
    for number in range(130):
        engine.ask(f"agent{number}", 1)
    port = Port(pages_of(engine))
    first = json.loads((await port.get("/allocations", query={"limit": "120"})).body)
    assert len(first["allocations"]) == 120
    query = {"limit": "1000", "after": first["next"]}
    rest = json.loads((await port.get("/allocations", query=query)).body)
    assert rest["next"] is None
    agents = [entry["agent"] for entry in first["allocations"] + rest["allocations"]]
    assert agents == [f"agent{number}" for number in range(130)]
    whole = (await port.get("/allocations", query={"limit": "1000"})).body.decode()
    assert SECRET not in whole
    assert "token" not in whole
    assert len(json.loads((await port.get("/allocations")).body)["allocations"]) == 100


async def test_no_leases_are_an_empty_page(engine: ObservedEngine) -> None:
    page = await Port(pages_of(engine)).get("/allocations")
    assert json.loads(page.body) == {"allocations": [], "next": None}


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "-1"},
        {"limit": "1e2"},
        {"limit": "\u0661"},
        {"limit": ""},
        {"after": "no lease at all"},
        {"token": "x"},
    ],
)
async def test_a_bad_query_field_is_refused_by_name(
    engine: ObservedEngine, query: dict[str, str]
) -> None:
    page = await Port(pages_of(engine)).get("/allocations", query=query)
    assert page.status == 400
    assert next(iter(query)) in json.loads(page.body)["error"]["message"]


async def test_a_bug_in_a_page_is_told_and_answered(engine: ObservedEngine) -> None:
    pages = pages_of(engine)

    def broken() -> Mapping[str, Any]:
        raise KeyError("nothing")

    pages.gpu_info = broken
    port = Port(pages)
    page = await port.get("/gpu/info")
    assert page.status == 500
    assert b"nothing" not in page.body, "what went wrong is for the log alone"
    ((event, fields),) = port.reports
    assert event == "http.request_failed"
    assert "KeyError" in str(fields["error"])


@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/health", "/ready", "/gpu/info", "/policy", "/allocations"]
)
async def test_a_query_field_that_a_page_does_not_have_is_refused_on_every_page(path: str) -> None:
    page = await Port(pages_of(ObservedEngine())).get(path, query={"colour": "red"})
    assert page.status == 400
    error = json.loads(page.body)["error"]
    assert error["code"] == "bad_request"
    assert "'colour'" in error["message"]
    assert ("limit" if path == "/allocations" else "none") in error["message"]
    assert (await Port(pages_of(ObservedEngine())).get(path)).status == 200
