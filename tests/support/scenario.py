"""Scenarios as text: commands, and below each, indented, what must come of it.

A file is read top to bottom; lines with `#` are for people. `card` and `settings` describe the host
before it starts. Every other line is one command (`COMMANDS` below names them); the effects that
matter to anybody are shown as short lines, in no particular order, and compared with those
written under the command. Nothing happens by itself: readings, the disk and the end of a process
are commands too, and time passes only with `wait`. The observer and the core's own invariants
judge every step besides.

`REWRITE_SCENARIOS=1 pytest tests/scenarios` writes what happens into the files, for review.
"""

from __future__ import annotations

from collections.abc import Callable

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core.model import (
    Ask,
    Denial,
    DeviceFacts,
    DeviceUuid,
    Priority,
    Reading,
    Refusal,
    Token,
)
from gpuorchd.core.state import Limits, Settings
from tests.support.cast import ADMIN, Cast
from tests.support.restarted import go_on
from tests.support.scenario_text import Names, Options, Outcome, Step, ns, parse, show
from tests.support.stage import Link, Stage
from tests.support.world import Process


class ScriptedStage(Stage):
    """A stage on which nothing happens by itself but what the clock does."""

    def __init__(self, facts: tuple[DeviceFacts, ...], settings: Settings) -> None:
        super().__init__(facts, settings=settings)
        self._agenda.clear()

    def want_reading(self) -> None:
        """Leave readings to the script."""

    def _carry_out(self, effect: fx.Effect) -> None:
        if not isinstance(effect, fx.PersistSettings | fx.OpenDevices):
            super()._carry_out(effect)


class Script:
    """One scenario while it is played."""

    def __init__(self, steps: list[Step]) -> None:
        self.facts: list[DeviceFacts] = []
        self.settings = Settings(epoch="s")
        self.names = Names()
        self.processes: dict[str, Process] = {}
        self.links: dict[str, Link] = {}
        self.begun: tuple[int, dict[DeviceUuid, Reading]] | None = None
        self._stage: ScriptedStage | None = None
        self._steps = steps
        self._effects: list[fx.Effect] = []

    def play(self) -> list[Outcome]:
        """Play all steps; return what came of each."""
        outcomes = []
        for step in self._steps:
            self._effects = []
            if step.command:
                COMMANDS[step.command](self, step.words, step.options)
            outcomes.append(Outcome(step, show(self._effects, self.names)))
        return outcomes

    @property
    def stage(self) -> ScriptedStage:
        """The stage; it opens with the first command that needs it."""
        if self._stage is None:
            self._stage = ScriptedStage(tuple(self.facts), self.settings)
            submit = self._stage.submit

            def listen(event: ev.Event) -> list[fx.Effect]:
                effects = submit(event)
                self._effects.extend(effects)
                return effects

            self._stage.submit = listen  # type: ignore[method-assign]  # the script overhears
        return self._stage

    @property
    def cast(self) -> Cast:
        """Its moves."""
        return Cast(self.stage)

    def lease_id(self, name: str) -> str:
        """Give the lease that a request was granted."""
        return next(
            lease.lease_id
            for lease in self.stage.observer.books.leases.values()
            if lease.request_id == name
        )

    # What commands do. Each is given its words and its options.

    def card(self, words: list[str], options: Options) -> None:
        """`card NAME MB [reserved=MB] [simulated=DRAIN]`."""
        drain = options.get("simulated")
        self.facts.append(
            DeviceFacts(
                DeviceUuid(words[0]),
                len(self.facts),
                words[0],
                int(words[1]),
                int(options.get("reserved", "0")),
                None if drain is None else ns(drain),
            )
        )

    def configure(self, words: list[str], options: Options) -> None:
        """`settings [ttl=TIME] [age=TIME] [BOUND=N]...`; once all runs, they are read anew."""
        bounds = {name: int(value) for name, value in options.items() if name in Limits._fields}
        limits, ttl_ns = Limits(**bounds), ns(options.get("ttl", "0s"))
        age_ns = ns(options.get("age", "3s"))
        if self._stage is None:
            self.settings = Settings("s", limits, ttl_ns, age_ns)
        else:
            self.stage.submit(ev.ConfigurationRead(limits, ttl_ns, age_ns))

    def devices(self, words: list[str], options: Options) -> None:
        """`devices NAME...`: these are there now, as a probe finds them; none: lost."""
        for uuid, card in self.stage.world.cards.items():
            card.present = uuid in words
        found = self.stage.world.found()
        self.stage.submit(ev.DevicesFound(found) if found else ev.DevicesLost("no driver"))

    def process(self, words: list[str], options: Options) -> None:
        """`process NAME... [uid=N] [unit=NAME]`."""
        for name in words:
            uid = int(options.get("uid", "1000"))
            self.processes[name] = self.stage.world.spawn(uid=uid, unit=options.get("unit"))

    def fork(self, words: list[str], options: Options) -> None:
        """`fork PARENT CHILD [detached] [inherits]`."""
        parent = self.processes[words[0]]
        if "detached" in words:
            self.processes[words[1]] = self.stage.world.spawn_detached(parent)
        else:
            child = self.cast.fork(parent, inherits="inherits" in words)
            self.processes[words[1]] = child

    def connect(self, words: list[str], options: Options) -> None:
        """`connect CONNECTION PROCESS`."""
        link = self.links[words[0]] = self.stage.connect(self.processes[words[1]])
        self.names.conns[link.conn] = words[0]

    def lease(self, words: list[str], options: Options) -> None:
        """`lease CONNECTION REQUEST ASK`."""
        self.stage.lease(self.links[words[0]], words[1], ask(words, options))

    def explain(self, words: list[str], options: Options) -> None:
        """`explain CONNECTION ASK`: a dry run, told as `would ...`."""
        link = self.links[words[0]]
        self.stage.arrive(link)
        peer = self.stage.observer.books.peers[link.conn]
        now_ns = self.stage.world.now_ns
        told = self.stage.machine.explain(peer, ask(words, options), now_ns, link.conn)
        note = None
        if isinstance(told, Denial):
            note = told.note.value
        elif isinstance(told, Refusal):
            note = told.code.value
        self._effects.append(fx.Answer(ADMIN, "dry run", {"note": note}))

    def release(self, words: list[str], options: Options) -> None:
        """`release CONNECTION REQUEST`: the lease that the request was granted."""
        held = self.stage.observer.books.leases[self.lease_id(words[1])]
        conn = self.links[words[0]].conn
        self.stage.submit(ev.ReleaseAsked(conn, f"release {words[1]}", held.token))

    def renew(self, words: list[str], options: Options) -> None:
        """`renew CONNECTION REQUEST [late]`; `late`: the timer has not fired yet."""
        held = self.stage.observer.books.leases[self.lease_id(words[1])]
        conn = self.links[words[0]].conn
        self.stage.submit(ev.RenewAsked(conn, f"renew {words[1]}", held.token))

    def cancel(self, words: list[str], options: Options) -> None:
        """`cancel CONNECTION REQUEST`."""
        conn = self.links[words[0]].conn
        self.stage.submit(ev.CancelAsked(conn, f"cancel {words[1]}", words[1]))

    def seal(self, words: list[str], options: Options) -> None:
        """`seal CONNECTION [signal=NAME]`."""
        conn = self.links[words[0]].conn
        self.stage.submit(ev.SealAsked(conn, "seal", options.get("signal")))

    def close(self, words: list[str], options: Options) -> None:
        """`close CONNECTION`: its last holder has closed it."""
        self.stage.close(self.links[words[0]])

    def use(self, words: list[str], options: Options) -> None:
        """`use PROCESS NAME MB`: from now on it uses so much, of its leases or not."""
        process = self.processes[words[0]]
        uuid = DeviceUuid(words[1])
        process.uses[uuid] = int(words[2])
        if not process.uses[uuid]:
            del process.uses[uuid]
        process.opaque = "unknown" in words
        assert self.stage.world.free_mb(uuid) >= 0, "more than the card has"

    def kill(self, words: list[str], options: Options) -> None:
        """`kill PROCESS`: it runs no more; its connections and its memory are still there."""
        self.stage.world.kill(self.processes[words[0]])

    def gone(self, words: list[str], options: Options) -> None:
        """`gone PROCESS`: its memory is back and its pidfd says so."""
        process = self.processes[words[0]]
        self.stage.world.kill(process)
        self.stage.world.finish(process)
        if process.key in self.stage.watched:
            self.stage.watched.discard(process.key)
            self.stage.submit(ev.ProcessEnded(process.key))

    def read(self, words: list[str], options: Options) -> None:
        """`read [begin|end] [fails=NAME]`: all cards at once, or begun now and ended later."""
        stage = self.stage
        if "end" not in words:
            looked = {
                uuid: stage.world.look(uuid)
                for uuid, card in stage.world.cards.items()
                if card.present and card.facts.drain_ns is None
            }
            self.begun = (stage.world.now_ns, looked)
        if "begin" in words:
            return
        assert self.begun is not None, "a reading ends that was not begun"
        started_ns, looked = self.begun
        failed = [DeviceUuid(name) for name in options.get("fails", "").split(",") if name]
        readings = tuple(reading for uuid, reading in looked.items() if uuid not in failed)
        failures = tuple((uuid, "did not answer") for uuid in failed)
        stage.submit(ev.ReadingsTaken(started_ns, readings, failures))

    def wait(self, words: list[str], options: Options) -> None:
        """`wait TIME`: time passes, and what is due happens."""
        self.stage.advance(ns(words[0]))

    def late(self, words: list[str], options: Options) -> None:
        """`late TIME`: time passes while the loop is busy: no timer fires."""
        self.stage.world.now_ns += ns(words[0])

    def cordon(self, words: list[str], options: Options) -> None:
        """`cordon NAME` and `uncordon NAME`."""
        self.stage.submit(ev.CordonAsked(ADMIN, "cordon", words[0], "by hand"))

    def uncordon(self, words: list[str], options: Options) -> None:
        """See `cordon`."""
        self.stage.submit(ev.CordonAsked(ADMIN, "uncordon", words[0], None))

    def revoke(self, words: list[str], options: Options) -> None:
        """`revoke REQUEST grace=TIME`."""
        lease_id = self.lease_id(words[0])
        grace_ns = ns(options["grace"])
        self.stage.submit(ev.RevokeAsked(ADMIN, "revoke", lease_id, grace_ns, "by hand"))

    def policy(self, words: list[str], options: Options) -> None:
        """`policy NAME [if_revision=N] FIELD=VALUE...`; values are JSON."""
        revision = options.get("if_revision")
        changes = {name: parse(value) for name, value in options.items() if name != "if_revision"}
        expected = None if revision is None else int(revision)
        self.stage.submit(ev.PolicyChangeAsked(ADMIN, words[0], changes, expected, {}))

    def persisted(self, words: list[str], options: Options) -> None:
        """`persisted [failed]`: the disk has the settings, or not."""
        self.stage.submit(ev.SettingsPersisted("no space" if words else None))

    def restart(self, words: list[str], options: Options) -> None:
        """`restart [emptied] [gone=CONNECTION,...]`: the daemon is killed, another goes on.

        `gone` have ended meanwhile. `emptied`: no connection was kept.
        """
        for name in options.get("gone", "").split(","):
            if name:
                self.links[name].open = False
                del self.stage.links[self.links[name].conn]
        go_on(self.stage, emptied="emptied" in words)

    def reattach(self, words: list[str], options: Options) -> None:
        """`reattach CONNECTION REQUEST`: ask for the lease that the request was granted."""
        link = self.links[words[0]]
        held = self.stage.observer.books.leases[self.lease_id(words[1])]
        self.stage.arrive(link)
        event = ev.ReattachAsked(link.conn, words[1], held.token, Token("no digest"))
        self.stage.submit(event)

    def stop(self, words: list[str], options: Options) -> None:
        """`stop`: the daemon is told to stop."""
        self.stage.submit(ev.StopAsked())


COMMANDS: dict[str, Callable[[Script, list[str], Options], None]] = {
    "cancel": Script.cancel,
    "card": Script.card,
    "close": Script.close,
    "connect": Script.connect,
    "cordon": Script.cordon,
    "devices": Script.devices,
    "explain": Script.explain,
    "fork": Script.fork,
    "gone": Script.gone,
    "kill": Script.kill,
    "late": Script.late,
    "lease": Script.lease,
    "persisted": Script.persisted,
    "policy": Script.policy,
    "process": Script.process,
    "read": Script.read,
    "reattach": Script.reattach,
    "release": Script.release,
    "renew": Script.renew,
    "restart": Script.restart,
    "revoke": Script.revoke,
    "seal": Script.seal,
    "settings": Script.configure,
    "stop": Script.stop,
    "uncordon": Script.uncordon,
    "use": Script.use,
    "wait": Script.wait,
}


def ask(words: list[str], options: Options) -> Ask:
    """Read the ask of `lease` and `explain`."""
    priority = options.get("priority")
    return Ask(
        agent=options.get("agent", "analyst"),
        memory_mb=int(options.get("mem", "0")),
        gpus=int(options.get("gpus", "1")),
        exclusive="exclusive" in words,
        priority=None if priority is None else Priority[priority.upper()],
        wait_ns=ns(options.get("wait", "0s")),
        devices=tuple(name for name in options.get("devices", "").split(",") if name),
    )
