"""The daemon: joins the rooms, starts them in order, and stops them the other way round.

    open files -> socket name -> kept settings -> machine, engine -> rooms register -> answers
    then, while it answers already: GPUs are looked for; log, metrics and HTTP load

What the lease path does not need is loaded after the first answer can be given. At a clean stop
the core answers those who wait and tells those who hold; what was said is sent, the rooms are
closed, and the socket's name goes last: nobody takes it while something of this daemon still runs.
Nobody can connect meanwhile.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import replace

import uvloop

from gpuorchd.config import Config
from gpuorchd.config_reading import ReadConfig
from gpuorchd.core.effects import Commit, PersistSettings
from gpuorchd.core.events import ConfigurationRead, PolicyChangeAsked, StopAsked
from gpuorchd.core.machine import Machine
from gpuorchd.core.model import ConnectionId, ProcessKey, RequestId
from gpuorchd.core.settings import SAFE_MODE
from gpuorchd.core.state import Settings
from gpuorchd.devices.mps import MpsWatch
from gpuorchd.devices.nvml import NvmlDevices, ProbeOptions
from gpuorchd.devices.processes import ProcessWatch
from gpuorchd.devices.simulated import SimulatedDevices
from gpuorchd.devices.telemetry import DeviceSource, attach_source
from gpuorchd.engine import Engine
from gpuorchd.host.http_port import HttpPort, choose_http_port
from gpuorchd.host.keeping import Keeper
from gpuorchd.host.lifecycle import Lifecycle, exit_now
from gpuorchd.host.limits import fit_open_files
from gpuorchd.host.settings_file import KeptSettings, boot_id
from gpuorchd.host.settings_store import SettingsStore
from gpuorchd.host.socket_file import PassedSocket
from gpuorchd.host.start import EXIT_BUG, EXIT_CANNOT_START, StartError
from gpuorchd.host.supervisor import Supervisor, served_socket
from gpuorchd.host.users import UserNames
from gpuorchd.observe.log import Log
from gpuorchd.observing import Observers
from gpuorchd.peers import Peers
from gpuorchd.reloading import Reloading
from gpuorchd.server.listener import Server
from gpuorchd.server.services import Options, Services
from gpuorchd.server.tokens import digest_of
from gpuorchd.succession import Succession, table_path
from gpuorchd.supervised import Supervised
from libclient.version import VERSION

# Names the lease table: 64 bits are not guessed and not met twice.
EPOCH_BYTES = 8
# Who asks for what a reload brings: no connection has this number, so nobody is answered.
NOBODY = ConnectionId(0)


def run_daemon(read: ReadConfig, supervisor: Supervisor) -> int:
    """Run until a signal or a bug ends it; return the exit code.

    What `supervisor` passed is closed at the end. Raises `StartError` where it cannot start;
    nothing of it is left behind then.
    """
    began_ns = time.monotonic_ns()
    config = read.config
    log = Log(form=config.log_format.value, level=config.log_level.value)
    for warning in read.warnings:
        log.event("config.value_warned", warning=warning)
    if read.refused is not None:
        log.event("config.kept_used", error=read.refused)
    for problem in supervisor.problems:
        log.event("host.passed_unusable", problem=problem)
    if supervisor.notifier.watchdog_period_s is not None:
        # The watchdog's signal then leaves in the log where it hung.
        faulthandler.enable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_live(read, supervisor, log, began_ns))
    finally:
        supervisor.inherited.close()
        supervisor.notifier.close()
        log.close()


async def _live(read: ReadConfig, supervisor: Supervisor, log: Log, began_ns: int) -> int:
    loop = asyncio.get_running_loop()
    lifecycle = Lifecycle(loop, log.event)
    lifecycle.install()
    try:
        async with AsyncExitStack() as closing:
            daemon = Daemon(read, supervisor, log, lifecycle, closing)
            try:
                daemon.start()
            except Exception as error:
                daemon.abandon(error)
                raise
            daemon.tell_started(began_ns)
            code = await lifecycle.ended
            lifecycle.set_deadline(daemon.release_socket)
            daemon.end(code)
    except StartError:
        raise
    except Exception as error:
        # A bug on the way in or out ends it as any other: in the log, with the code for it.
        lifecycle.fail("start or stop", error)
        code = EXIT_BUG
    finally:
        lifecycle.go_deaf()
    if code != EXIT_BUG:
        log.event("daemon.stopped")
    return code


def _fit(config: Config, log: Log) -> Config:
    """Lower the bounds to what the limit of open files allows, and say so."""
    bounds = fit_open_files(config.max_connections, config.max_processes)
    if bounds.open_files >= bounds.needed_files:
        return config
    log.event(
        "host.bounds_lowered",
        open_files=bounds.open_files,
        needed_files=bounds.needed_files,
        max_connections=bounds.max_connections,
        wanted_connections=config.max_connections,
        max_processes=bounds.max_processes,
        wanted_processes=config.max_processes,
    )
    return replace(
        config,
        max_connections=bounds.max_connections,
        max_connections_per_uid=_share(
            config.max_connections_per_uid, bounds.max_connections, config.max_connections
        ),
        max_processes=bounds.max_processes,
        max_processes_per_uid=_share(
            config.max_processes_per_uid, bounds.max_processes, config.max_processes
        ),
    )


def _share(per_uid: int, now: int, before: int) -> int:
    """Lower what one user may have of a bound as the bound was lowered."""
    return max(1, per_uid * now // before)


class Daemon:
    """The rooms of one daemon. Every room that is opened puts its closing on `closing`."""

    def __init__(
        self,
        read: ReadConfig,
        supervisor: Supervisor,
        log: Log,
        lifecycle: Lifecycle,
        closing: AsyncExitStack,
    ) -> None:
        self._config = config = _fit(read.config, log)
        self._reloading = Reloading(read, self._take, log.event)
        self._read = read
        self._supervisor = supervisor
        self._log = log
        self._lifecycle = lifecycle
        self._closing = closing
        self._loop = asyncio.get_running_loop()
        self._socket = served_socket(supervisor, config)
        closing.callback(self._socket.release)
        assert config.state_dir is not None, "reading the configuration fills it in"
        self._store = SettingsStore(config.state_dir, config.safe_mode, log.event)
        closing.push_async_callback(self._store.close)
        kept = self._store.open()
        self._settled = kept.settled
        keeper = Keeper(table_path(config, os.environ), boot_id(), log.event, digest_of)
        closing.callback(keeper.close)
        self._keeper = keeper
        self._succession = Succession(keeper, supervisor.inherited, supervisor.notifier, config)
        epoch = self._succession.epoch or os.urandom(EPOCH_BYTES).hex()
        self._engine = Engine(_machine(config, kept, epoch, self._succession), self._loop)
        closing.callback(self._engine.close)
        self._supervised = Supervised(supervisor.notifier, self._engine, self._loop)
        self._supervised.add_remark(self._reloading.remark)
        closing.callback(self._supervised.stop)
        self._processes = ProcessWatch(self._engine, self._loop)
        closing.callback(self._processes.close)
        self._peers = Peers(self._processes, self._engine.state, config)
        self._source = _device_source(config, self._engine, self._loop, log)
        closing.push_async_callback(self._source.stop)

    def start(self) -> None:
        """Let every room register, then answer, then look for GPUs and load the rest."""
        engine = self._engine
        engine.on(Commit, self._keeper.commit)
        http = self._http_port()
        observers = Observers(
            self._config, engine, self._source, self._store, self._log, http, self._socket.path
        )
        self._server = server = Server(
            engine, self._services(observers), _options(self._config), self._loop
        )
        engine.on(PersistSettings, lambda effect: self._store.persist(effect, engine.submit))
        attach_source(engine, self._source)
        self._processes.attach(engine)
        observers.register(server, self._reloading.check, self._succession.check)
        self._closing.push_async_callback(server.stop)
        self._succession.go_on(engine, server, self._settled, self._log.event)
        server.serve(self._socket.listener)
        self._supervised.start()
        if not engine.state.safe_mode:
            self._source.open()
        # What is here now stays: the collector need not look at it again and again. It was off
        # until now, and what little garbage there is costs less than the search for it.
        gc.freeze()
        gc.enable()
        self._log.start(self._loop)
        self._closing.push_async_callback(observers.stop)
        observers.start(self._loop, self._lifecycle.fail)
        self._lifecycle.on_hangup(self._reload)

    def tell_started(self, began_ns: int) -> None:
        """Log that the daemon answers."""
        state = self._engine.state
        self._log.event(
            "daemon.started",
            version=VERSION,
            epoch=state.settings.epoch,
            pid=os.getpid(),
            socket=str(self._socket.path),
            safe_mode=state.safe_mode,
            start_s=(time.monotonic_ns() - began_ns) / 1e9,
        )

    def end(self, code: int) -> None:
        """Begin the end. Where connections outlive this process it does not return."""
        self._supervised.tell_stopping()
        # Before anybody loses a connection: who connects anew is not to ask a daemon that ends.
        self._server.stop_accepting()
        self._socket.refuse()
        if code != EXIT_BUG and not self._succession.hands_over:
            # Those who wait are answered, those who hold are told.
            self._engine.submit(StopAsked())
        # What ends with this process has not ended for the next one.
        self._succession.freeze()
        if self._succession.hands_over:
            self._log.event("daemon.handed_over", code=code)
            self._log.close()
            exit_now(code)

    def abandon(self, error: Exception) -> None:
        """Leave all that was handed over to the next daemon: the start of this one has failed.

        Where connections outlive this process it does not return.
        """
        self._succession.freeze()
        if not self._succession.hands_over:
            return
        code = EXIT_BUG
        if isinstance(error, StartError):
            sys.stderr.write(f"gpuorchd: {error}\n")
            code = EXIT_CANNOT_START
        else:
            self._lifecycle.fail("start", error)
        self._log.close()
        exit_now(code)

    def release_socket(self) -> None:
        """Give the socket's name up, when the rest of the end has taken too long."""
        self._socket.release()

    def _http_port(self) -> HttpPort:
        inherited = self._supervisor.inherited
        # Whoever serves it closes it.
        metrics, inherited.metrics = inherited.metrics, None
        return choose_http_port(
            self._config.http_port,
            is_set="http_port" in self._read.sources,
            passed=metrics,
            under_manager=isinstance(self._socket, PassedSocket),
        )

    def _reload(self) -> None:
        """Read the configuration again, and let the service manager know when that is done."""
        self._supervised.tell_reloading()
        self._reloading.reload()
        self._supervised.tell_reloaded()

    def _take(self, config: Config, changed: frozenset[str]) -> None:
        """Put in force what a reload has changed."""
        self._config = config = _fit(config, self._log)
        self._log.set_level(config.log_level.value)
        self._peers.set_bounds(config)
        self._server.set_options(_options(config))
        if isinstance(self._source, NvmlDevices):
            self._source.set_options(_probe_options(config))
        self._engine.submit(
            ConfigurationRead(config.limits, config.ttl_ns, config.reading_max_age_ns)
        )
        if "safe_mode" in changed:
            self._store.see_safe_mode(config.safe_mode)
            if config.safe_mode is not None:
                changes = {SAFE_MODE: config.safe_mode}
                self._engine.submit(PolicyChangeAsked(NOBODY, None, changes, None, {}))

    def _services(self, observers: Observers) -> Services:
        return Services(
            identify=self._peers.identify,
            look=self._peers.look,
            ready=observers.ready,
            device_status=self._source.status,
            telemetry=self._source.telemetry,
            render_metrics=observers.metrics_text,
            resolve_users=UserNames(self._loop).resolve,
            signal_peer=self._signal_peer,
            on_bug=self._on_bug,
            keeping=self._keeper,
        )

    def _signal_peer(self, process: ProcessKey, uid: int, name: str) -> None:
        self._processes.signal(process, uid, name)

    def _on_bug(self, error: Exception, op: str, request_id: RequestId) -> None:
        self._lifecycle.fail(f"request {request_id!r}, op {op}", error)


def _options(config: Config) -> Options:
    return Options(
        version=VERSION,
        admin_gid=config.admin_group,
        connections=config.max_connections,
        connections_per_uid=config.max_connections_per_uid,
        subscriptions_per_connection=config.max_subscriptions_per_connection,
        unsent_bytes_per_connection=config.max_unsent_bytes_per_connection,
        unsent_bytes=config.max_unsent_bytes,
    )


def _machine(config: Config, kept: KeptSettings, epoch: str, succession: Succession) -> Machine:
    settings = Settings(
        epoch=epoch,
        keeps_answers=succession.keeps_connections,
        keeps=True,
        limits=config.limits,
        ttl_ns=config.ttl_ns,
        reading_max_age_ns=config.reading_max_age_ns,
    )
    return Machine(
        settings,
        policy=kept.policy,
        revision=kept.revision,
        safe_mode=kept.safe_mode,
        cordons=kept.cordons,
    )


def _device_source(
    config: Config, engine: Engine, loop: asyncio.AbstractEventLoop, log: Log
) -> DeviceSource:
    """Choose where GPUs come from. Nothing is opened yet."""
    mps = MpsWatch(config.enable_mps is not False, str(config.mps_pipe_directory))
    if config.simulate is not None:
        cards_mb = (config.simulate.memory_mb,) * config.simulate.cards
        return SimulatedDevices(engine, cards_mb, config.simulate_drain_s, mps)
    return NvmlDevices(engine, loop, _probe_options(config), mps, log.event)


def _probe_options(config: Config) -> ProbeOptions:
    return ProbeOptions(
        telemetry=config.enable_nvml is not False,
        period_s=config.sample_period_s,
        deadline_s=config.nvml_deadline_s,
    )
