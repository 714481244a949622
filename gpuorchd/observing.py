"""What watches the daemon, joined: readiness, metrics and the side HTTP port, with their sources.

Registers with the engine before the daemon answers, and loads what is slow afterwards. A port that
cannot be had costs no lease: it is tried again every `HTTP_RETRY_S`, and readiness names it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gpuorchd import views
from gpuorchd.config import Config
from gpuorchd.devices.telemetry import CALL_BUCKETS_S, DeviceSource
from gpuorchd.engine import Engine
from gpuorchd.host.http_port import HttpPort
from gpuorchd.host.settings_store import SettingsStore
from gpuorchd.observe.http import NOT_YET, HttpSide, Pages
from gpuorchd.observe.log import Log
from gpuorchd.observe.metrics import Metrics
from gpuorchd.observe.readiness import (
    Check,
    Readiness,
    devices_check,
    loop_check,
    mps_check,
    nvml_check,
    settings_check,
)
from gpuorchd.observe.sources import Sources
from gpuorchd.server.listener import Server

# The port is most likely held by a daemon that is on its way out.
HTTP_RETRY_S = 5.0


class Observers:
    """Readiness, metrics and HTTP of one daemon."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        source: DeviceSource,
        store: SettingsStore,
        log: Log,
        http_port: HttpPort,
        socket_path: Path,
    ) -> None:
        self._config = config
        self._engine = engine
        self._source = source
        self._log = log
        self._http_port = http_port
        self._socket_path = socket_path
        self._metrics: Metrics | None = None
        self._http: HttpSide | None = None
        self._http_failed = False
        self._serving: asyncio.Task[None] | None = None
        self._store = store
        self._readiness = Readiness()

    def register(self, server: Server, check_config: Check, check_table: Check) -> None:
        """Watch the engine from now on. Call it after the rooms that answer have registered."""
        self._log.attach(self._engine)
        self._metrics = metrics = Metrics(self._engine, self._sources(server))
        config, source = self._config, self._source
        add = self._readiness.add
        add("devices", devices_check(lambda: self._engine.state, source.checks))
        add(
            "nvml",
            nvml_check(
                lambda: self._engine.state, source.status, demanded=config.enable_nvml is True
            ),
        )
        add(
            "mps",
            mps_check(
                lambda: self._engine.state, source.status, demanded=config.enable_mps is True
            ),
        )
        add("settings", settings_check(lambda: self._store.failure or self._store.damage))
        add("config", check_config)
        add("table", check_table)
        add("loop", loop_check(metrics.lag))
        add("http", self._check_http)

    def start(
        self, loop: asyncio.AbstractEventLoop, on_bug: Callable[[str, BaseException], None]
    ) -> None:
        """Begin to measure the loop, and to serve HTTP as soon as its library is loaded."""
        assert self._metrics is not None, "started before registered"
        self._metrics.start(loop)
        if not self._http_port.wanted:
            return

        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None:
                on_bug("the side HTTP port", error)

        self._serving = loop.create_task(self._serve_http(), name="http")
        self._serving.add_done_callback(ended)

    async def stop(self) -> None:
        """Close the port and end what runs."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        if self._http is not None:
            await self._http.stop()
        if self._http_port.sock is not None:
            # Closed here too, where it ended before it was served.
            self._http_port.sock.close()
        if self._metrics is not None:
            await self._metrics.stop()

    def ready(self) -> Mapping[str, object]:
        """Answer `ready`."""
        return dict(self._readiness.report())

    async def metrics_text(self) -> str:
        """Answer `metrics`."""
        return (await self._metrics_page()).decode()

    async def _metrics_page(self) -> bytes:
        assert self._metrics is not None, "asked before registered"
        return await self._metrics.render()

    async def _serve_http(self) -> None:
        while True:
            choice = self._http_port
            self._http = HttpSide(
                self._pages(), self._report_http, port=choice.port, sock=choice.sock
            )
            await self._http.start()
            if self._http.failure is None:
                # The HTTP library is here to stay: the collector need not look at it either.
                gc.freeze()
                return
            self._http_failed = True
            await asyncio.sleep(HTTP_RETRY_S)

    def _report_http(self, event: str, /, **fields: object) -> None:
        # Once is loud enough: it stays to be seen in `ready` while it lasts.
        if event != "http.bind_failed" or not self._http_failed:
            self._log.event(event, **fields)

    def _check_http(self) -> tuple[bool, str]:
        if self._http_port.fault is not None:
            return False, self._http_port.fault
        if not self._http_port.wanted:
            return True, "no HTTP port is configured"
        return (True, NOT_YET) if self._http is None else self._http.check()

    def _pages(self) -> Pages:
        return Pages(
            health=lambda: views.health(self._engine.state),
            ready=self.ready,
            gpu_info=self._gpu_info,
            policy=lambda: views.policy_get(self._engine.state),
            allocations=self._allocations,
            metrics=self._metrics_page,
            socket_path=str(self._socket_path),
        )

    def _moment(self) -> views.Moment:
        return views.Moment(self._engine.now_ns(), time.time_ns())

    def _gpu_info(self) -> Mapping[str, object]:
        source = self._source
        return views.gpu_info(
            self._engine.state, source.telemetry(), source.status(), self._moment()
        )

    def _allocations(self, after: str | None, limit: int) -> Mapping[str, object]:
        return views.allocations(self._engine.state, self._moment(), after, limit)

    def _sources(self, server: Server) -> Sources:
        source = self._source
        return Sources(
            request_counts=lambda: server.request_counts,
            connections_open=lambda: server.connections,
            unsent_bytes=lambda: server.unsent_bytes,
            accept_failures=lambda: server.accept_failures,
            subscribers=lambda: server.subscribers,
            events_lost=lambda: server.events_lost,
            limits_reached=lambda: server.limits_reached,
            settings_damaged=lambda: self._store.damage is not None,
            driver_status=source.status,
            telemetry=source.telemetry,
            driver_calls=source.call_stats,
            driver_call_buckets_s=CALL_BUCKETS_S,
            log_suppressed=lambda: self._log.suppressed_total,
            log_lost=lambda: self._log.lost_total,
        )
