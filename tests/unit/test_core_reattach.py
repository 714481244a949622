"""A lease whose connection was lost with the daemon waits for its owner, and for nobody else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gpuorchd.core import effects as fx
from gpuorchd.core import events as ev
from gpuorchd.core import rows
from gpuorchd.core.model import ConnectionId, Lease, LeaseState, Token
from gpuorchd.core.state import Limits
from tests.support.succeeding import GRACE_NS, Core, answers, code, process, token_of, told
from tests.support.world import MS, SECOND, card

CARD_MB = 10_000
OWNER, OTHER = 101, 102
TOKEN = token_of(1, "l")


@pytest.fixture
def core() -> Core:
    """Two simulated cards; one process holds 6,000 MiB of one of them."""
    core = Core(card(0, CARD_MB, drain_ms=100), card(1, CARD_MB, drain_ms=100))
    core.arrive(1, OWNER)
    core.arrive(2, OTHER)
    core.lease(1, "l", 6_000)
    return core


def given(effects: Sequence[fx.Effect]) -> Lease:
    """The lease of the one grant that is answered."""
    (effect,) = answers(effects)
    assert isinstance(effect, fx.AnswerGrant), effect
    return effect.lease


def lose(core: Core) -> Lease:
    """Restart with the owner's connection lost; return its lease."""
    core.restart(lost=[1])
    lease = core.held(1, "l")
    assert lease.state is LeaseState.DETACHED
    return lease


def test_its_owner_takes_it_back_on_another_connection(core: Core) -> None:
    before = core.held(1, "l")
    lose(core)
    core.arrive(7, OWNER)
    lease = given(core.reattach(7, TOKEN))
    for name in ("lease_id", "token", "granted_ns", "waited_ns", "ask"):
        assert getattr(lease, name) == getattr(before, name)
    assert (lease.state, lease.conn) == (LeaseState.ACTIVE, 7)
    # From now on it lives and ends with that connection.
    assert core.wait(2 * GRACE_NS) == []
    effects = core.submit(ev.ClientLeft(ConnectionId(7)))
    assert len(told(effects, "lease.draining")) == 1


def test_its_bytes_stay_taken_meanwhile(core: Core) -> None:
    lose(core)
    assert core.state.devices[core.cards[0].uuid].claim_mb == 6_000
    assert core.state.live_leases == 1
    # It waits for its owner and holds up no connection's count.
    assert core.state.holding_clients == 0
    assert len(core.state.tokens) == 1


def test_nobody_comes_after_the_grace(core: Core) -> None:
    lose(core)
    assert core.wait(GRACE_NS - 1) == []
    effects = core.wait(1)
    assert [x.fields["reason"] for x in told(effects, "lease.released")] == ["disconnected"]
    core.arrive(7, OWNER)
    assert code(core.reattach(7, TOKEN)) == "unknown_token"


def test_another_restart_gives_the_whole_grace_again_and_no_more(core: Core) -> None:
    lose(core)
    core.wait(GRACE_NS - SECOND)
    core.restart()
    assert core.held(1, "l").state is LeaseState.DETACHED
    assert core.wait(GRACE_NS - 1) == []
    assert len(told(core.wait(1), "lease.released")) == 1


def test_the_end_of_its_process_is_its_end_at_once(core: Core) -> None:
    lose(core)
    effects = core.submit(ev.ProcessEnded(process(OWNER)))
    assert len(told(effects, "lease.released")) == 1
    assert len(told(core.wait(100 * MS), "lease.drained")) == 1
    assert process(OWNER) not in core.state.holders


def test_the_process_is_watched_though_no_connection_of_it_is_left(core: Core) -> None:
    effects = core.restart(lost=[1])
    assert process(OWNER) in [x.process for x in effects if isinstance(x, fx.WatchProcess)]
    assert not any(isinstance(x, fx.ForgetProcess) for x in effects)


def test_another_process_is_not_the_owner(core: Core) -> None:
    lose(core)
    assert code(core.reattach(2, TOKEN)) == "not_owner"
    core.arrive(7, OWNER)
    assert given(core.reattach(7, TOKEN)).conn == 7


def test_the_same_process_as_another_user_is_not_the_owner(core: Core) -> None:
    lose(core)
    core.arrive(7, OWNER, uid=2_000)
    assert code(core.reattach(7, TOKEN)) == "not_owner"


def test_a_later_process_with_the_same_pid_is_not_the_owner(core: Core) -> None:
    lose(core)
    later = process(OWNER)._replace(start_ticks=99_999)
    core.submit(ev.ClientArrived(ConnectionId(7), core.client(2).peer._replace(process=later)))
    assert code(core.reattach(7, TOKEN)) == "not_owner"


def test_what_a_connection_holds_cannot_be_taken_over(core: Core) -> None:
    core.restart()
    core.arrive(7, OWNER)
    assert code(core.reattach(7, TOKEN)) == "not_owner"
    assert core.held(1, "l").conn == 1


def test_a_clients_own_close_leaves_nothing_to_come_back_for(core: Core) -> None:
    core.submit(ev.ClientLeft(ConnectionId(1)))
    core.restart(lost=[2])
    core.arrive(7, OWNER)
    assert code(core.reattach(7, TOKEN)) == "unknown_token"


def test_an_unknown_token_is_told_apart(core: Core) -> None:
    lose(core)
    core.arrive(7, OWNER)
    assert code(core.reattach(7, Token("no such"))) == "unknown_token"


def test_one_that_is_asked_back_stays_so_and_its_owner_hears_of_it(core: Core) -> None:
    lease = core.held(1, "l")
    core.submit(ev.RevokeAsked(ConnectionId(2), "x", lease.lease_id, 20 * SECOND, "wanted"))
    lose(core)
    core.wait(5 * SECOND)
    core.arrive(7, OWNER)
    effects = core.reattach(7, TOKEN)
    assert given(effects).state is LeaseState.REVOKING
    (event,) = told(effects, "lease.revoking")
    assert (event.owner, event.private) == (7, True)
    assert event.fields["deadline_s"] == 15.0
    (event,) = told(core.wait(15 * SECOND), "lease.revoked")
    assert event.owner == 7


def test_one_that_is_asked_back_while_nobody_holds_it_ends_at_the_earlier_time(core: Core) -> None:
    lease = lose(core)
    effects = core.submit(
        ev.RevokeAsked(ConnectionId(2), "x", lease.lease_id, 20 * SECOND, "wanted")
    )
    assert len(told(effects, "lease.revoking")) == 1
    assert core.held(1, "l").state is LeaseState.DETACHED
    # It stays so over another restart.
    core.restart()
    assert len(told(core.wait(20 * SECOND), "lease.revoked")) == 1
    assert told(core.wait(GRACE_NS), "lease.released") == []


def test_a_time_limit_ends_it_too(core: Core) -> None:
    core = Core(card(0, CARD_MB, drain_ms=100), ttl_ns=60 * SECOND)
    core.arrive(1, OWNER)
    core.lease(1, "l", 6_000)
    core.now_ns += 55 * SECOND
    core.restart(lost=[1])
    # Both end with the grace: the limit, which nobody could renew, and the detachment.
    core.now_ns += GRACE_NS
    core.arrive(7, OWNER)
    assert code(core.reattach(7, TOKEN)) == "unknown_token"
    core.wait(0)
    assert not core.state.tokens


def test_a_time_limit_goes_on_once_it_is_back() -> None:
    core = Core(card(0, CARD_MB, drain_ms=100), ttl_ns=60 * SECOND)
    core.arrive(1, OWNER)
    core.lease(1, "l", 6_000)
    core.restart(lost=[1])
    core.arrive(7, OWNER)
    lease = given(core.reattach(7, TOKEN))
    assert lease.expires_ns == core.now_ns + 60 * SECOND
    renewed = answers(core.submit(ev.RenewAsked(ConnectionId(7), "n", TOKEN)))
    assert isinstance(renewed[0], fx.Answer)
    assert len(told(core.wait(60 * SECOND), "lease.expired")) == 1


def test_whole_cards_of_a_gang_come_back_whole(core: Core) -> None:
    core.submit(ev.ReleaseAsked(ConnectionId(1), "r", TOKEN))
    core.wait(SECOND)
    core.lease(1, "gang", 100, gpus=2, exclusive=True)
    core.restart(lost=[1])
    for device in core.state.devices.values():
        assert device.exclusive == core.held(1, "gang").lease_id
    core.arrive(7, OWNER)
    lease = given(core.reattach(7, token_of(1, "gang")))
    assert [part.device.uuid for part in lease.parts] == ["GPU-0", "GPU-1"]
    assert all(part.claim_mb == part.device.capacity_mb for part in lease.parts)
    core.submit(ev.ReleaseAsked(ConnectionId(7), "r", lease.token))
    core.wait(SECOND)
    assert all(device.exclusive is None for device in core.state.devices.values())


def test_waits_of_a_lost_connection_end(core: Core) -> None:
    core.lease(1, "w", 9_000, wait_s=600)
    core.lease(1, "w2", 9_000, wait_s=600)
    core.restart(lost=[1])
    assert not core.state.waiters
    assert not core.state.unrepeated
    assert not any(key[0] == rows.WAITER for key in core.table.rows)


def test_several_leases_come_back_on_one_connection(core: Core) -> None:
    core.lease(1, "m", 1_000)
    core.arrive(3, OWNER)
    core.lease(3, "n", 1_000)
    core.restart(lost=[1, 3])
    core.arrive(7, OWNER)
    for number, (conn, name) in enumerate([(1, "l"), (1, "m"), (3, "n")]):
        assert given(core.reattach(7, token_of(conn, name), number)).conn == 7
    assert len(core.client(7).requests) == 3
    assert core.state.holding_clients == 1


def test_the_answer_to_a_reattach_is_given_again_after_yet_another_restart(core: Core) -> None:
    lose(core)
    core.arrive(7, OWNER)
    core.reattach(7, TOKEN, "back")
    core.restart()
    (effect,) = answers(core.repeat(7, "back"))
    assert isinstance(effect, fx.AnswerGrant)
    assert effect.lease.token == TOKEN


def test_the_bound_on_holders_holds_for_it_too() -> None:
    core = Core(card(0, CARD_MB, drain_ms=0), limits=Limits(holders=1))
    core.arrive(1, OWNER)
    core.arrive(2, OTHER)
    core.lease(1, "l", 6_000)
    core.restart(lost=[1])
    core.lease(2, "m", 100)
    core.arrive(7, OWNER)
    assert code(core.reattach(7, TOKEN)) == "limit"
    core.submit(ev.ReleaseAsked(ConnectionId(2), "r", token_of(2, "m")))
    assert given(core.reattach(7, TOKEN, "again")).conn == 7


def test_where_digests_were_kept_the_token_itself_is_given_back(core: Core) -> None:
    for key, row in core.table.rows.items():
        if isinstance(row, rows.LeaseRow):
            core.table.rows[key] = row._replace(token=Token("digest of it"))
    core.restart(lost=[1])
    core.arrive(7, OWNER)
    assert code(core.reattach(7, TOKEN, "wrong", "digest of another")) == "unknown_token"
    lease = given(core.reattach(7, TOKEN, "right", "digest of it"))
    assert lease.token == TOKEN
    released = answers(core.submit(ev.ReleaseAsked(ConnectionId(7), "r", TOKEN)))
    assert isinstance(released[0], fx.Answer)


def test_a_daemon_that_stops_takes_none_back(core: Core) -> None:
    lose(core)
    core.arrive(7, OWNER)
    core.submit(ev.StopAsked())
    assert code(core.reattach(7, TOKEN)) == "shutting_down"
