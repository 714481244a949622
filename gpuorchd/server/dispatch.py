"""From a request to what answers it: an event for the core, or a view of the state.

One handler per op, in one table. A handler either submits an event, whose effects answer, or
replies itself. What every request has to pass first is here too: an id that can be used, the
daemon not stopping, the peer an admin where the op is for admins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from gpuorchd import views
from gpuorchd.core.events import (
    CancelAsked,
    CordonAsked,
    LeaseAsked,
    PolicyChangeAsked,
    ReattachAsked,
    ReleaseAsked,
    RenewAsked,
    RequestRepeated,
    RevokeAsked,
    SealAsked,
)
from gpuorchd.core.model import NS_PER_S, Refusal, RequestId, Token
from gpuorchd.core.policy import user_names
from gpuorchd.server import replies
from gpuorchd.server import requests as asked
from gpuorchd.server.faults import ALLOWED, Fault, missing_id, repeated_id, show
from gpuorchd.server.requests import BY_OP, AnyRequest, ask_of
from gpuorchd.server.services import PeerNotTaken
from gpuorchd.server.speaker import LATE_OP
from gpuorchd.server.subscriptions import Subscription, wanted_by
from gpuorchd.server.tokens import DIGEST, digest_of
from libclient.wire import vocabulary as words

if TYPE_CHECKING:
    from gpuorchd.server.connection import Connection
    from gpuorchd.server.switchboard import Switchboard

    Handler = Callable[[Switchboard, Connection, Any], None]

# Looking up a name may ask a directory on the network.
USER_NAMES_MAX: Final = 256


def handle(board: Switchboard, conn: Connection, request: AnyRequest) -> None:
    """Answer a request, or see to it that it will be answered. Does not raise."""
    op, handler, for_admins = HANDLERS[type(request)]
    conn.op = op
    request_id = request.id
    state = board.state
    if request_id is None:
        if not conn.is_text:
            conn.refuse(missing_id(op))
            return
    elif conn.arrived:
        client = state.clients.get(conn.number)
        if client is not None and client.repeats and request_id in client.repeats:
            _repeat(board, conn, request_id)
            return
        if client is not None and request_id in client.requests:
            conn.refuse(repeated_id(request_id, op))
            return
    if state.stopping:
        message = "the daemon stops; ask again when it is back"
        conn.refuse(Fault(words.SHUTTING_DOWN, message, None, request_id, op))
    elif for_admins and not conn.is_admin():
        message = (
            f"{op} is for root, the daemon's own user and the admin group; this peer is uid "
            f"{conn.credentials.uid}"
        )
        conn.refuse(Fault(words.FORBIDDEN, message, "op", request_id, op))
    else:
        _carry_out(board, conn, request, handler)
    if not conn.deferred:
        conn.op = LATE_OP


def _carry_out(board: Switchboard, conn: Connection, request: AnyRequest, handler: Handler) -> None:
    try:
        handler(board, conn, request)
    except PeerNotTaken as error:
        conn.refuse(Fault(error.code, str(error), None, request.id, conn.op))
    except Exception as error:  # a bug, wherever it is: no peer can bring one about
        board.bug(conn, request.id, error)


def _repeat(board: Switchboard, conn: Connection, request_id: RequestId) -> None:
    """Answer again what an earlier daemon may have answered: nothing is done twice."""
    board.engine.submit(RequestRepeated(conn.number, request_id))
    conn.op = LATE_OP


def find_repeated(
    board: Switchboard, conn: Connection, request_id: RequestId, op: str | None
) -> Fault | None:
    """Refuse an id that is in use on its connection."""
    if request_id is not None and conn.arrived:
        client = board.state.clients.get(conn.number)
        if client is not None and request_id in client.requests:
            return repeated_id(request_id, op)
    return None


def _bad_request(conn: Connection, request_id: RequestId, field: str, message: str) -> None:
    conn.refuse(Fault(words.BAD_REQUEST, message, field, request_id, conn.op))


# What changes something: an event, answered by the core.


def _lease(board: Switchboard, conn: Connection, request: asked.Lease) -> None:
    if board.services.keeping is None or _is_kept(board, conn, request, _ask):
        _ask(board, conn, request)


def _ask(board: Switchboard, conn: Connection, request: asked.Lease) -> None:
    if conn.peer is None:
        conn.identify()
    ask = ask_of(request)
    board.engine.submit(LeaseAsked(conn.number, request.id, ask, board.tokens.take()))


def _is_kept(
    board: Switchboard,
    conn: Connection,
    request: asked.Lease | asked.Reattach,
    then: Handler,
) -> bool:
    """Whether what is asked can be granted so that it outlives the daemon.

    Where its connection has to go into the store first, `then` goes on with the request afterwards.
    """
    keeping = board.services.keeping
    assert keeping is not None
    refusal = keeping.refusal(conn.kept or conn.is_text)
    if refusal is not None:
        conn.refuse(Fault(words.LIMIT, refusal, None, request.id, conn.op))
        return False
    if conn.kept or conn.is_text or not keeping.has_store:
        return True
    op = conn.op

    def stored(reason: str | None) -> None:
        if conn.ended:
            return
        conn.op = op
        if reason is None:
            _carry_out(board, conn, request, then)
        else:
            conn.keep_no_more()
            conn.refuse(Fault(words.LIMIT, reason, None, request.id, op))
        conn.go_on()
        board.flush()

    conn.keep()
    # Nothing behind it is taken before it: the order of requests stays.
    conn.defer(request.id)
    keeping.keep(conn.number, conn.fd, stored)
    return False


def _release(board: Switchboard, conn: Connection, request: asked.Release) -> None:
    board.engine.submit(ReleaseAsked(conn.number, request.id, Token(request.token)))


def _renew(board: Switchboard, conn: Connection, request: asked.Renew) -> None:
    board.engine.submit(RenewAsked(conn.number, request.id, Token(request.token)))


def _reattach(board: Switchboard, conn: Connection, request: asked.Reattach) -> None:
    if board.services.keeping is None or _is_kept(board, conn, request, _take_back):
        _take_back(board, conn, request)


def _take_back(board: Switchboard, conn: Connection, request: asked.Reattach) -> None:
    conn.identify()
    token = Token(request.token)
    if token.startswith(DIGEST):
        # What lies on a disk in a token's place may be read by others, and opens nothing.
        message = "no lease with this token waits for its owner"
        conn.refuse(Fault(words.UNKNOWN_TOKEN, message, "token", request.id, conn.op))
        return
    board.engine.submit(ReattachAsked(conn.number, request.id, token, digest_of(token)))


def _cancel(board: Switchboard, conn: Connection, request: asked.Cancel) -> None:
    board.engine.submit(CancelAsked(conn.number, request.id, request.request_id))


def _seal(board: Switchboard, conn: Connection, request: asked.Seal) -> None:
    board.engine.submit(SealAsked(conn.number, request.id, request.signal))


def _revoke(board: Switchboard, conn: Connection, request: asked.Revoke) -> None:
    grace_ns = int(request.grace_s * NS_PER_S)
    reason = request.reason or f"revoked by uid {conn.credentials.uid}"
    board.engine.submit(RevokeAsked(conn.number, request.id, request.lease_id, grace_ns, reason))


def _cordon(board: Switchboard, conn: Connection, request: asked.Cordon) -> None:
    reason = request.reason or f"cordoned by uid {conn.credentials.uid}"
    conn.defer(request.id)
    board.engine.submit(CordonAsked(conn.number, request.id, request.gpu, reason))


def _uncordon(board: Switchboard, conn: Connection, request: asked.Uncordon) -> None:
    conn.defer(request.id)
    board.engine.submit(CordonAsked(conn.number, request.id, request.gpu, None))


def _policy_set(board: Switchboard, conn: Connection, request: asked.PolicySet) -> None:
    names = set(user_names(request.changes))
    if len(names) > USER_NAMES_MAX:
        message = f"changes name {len(names)} users; allowed: at most {USER_NAMES_MAX} in a change"
        _bad_request(conn, request.id, "changes", message)
        return
    conn.defer(request.id)
    change = PolicyChangeAsked(conn.number, request.id, request.changes, request.if_revision, {})
    if names:
        board.look_up(names, change)
    else:
        board.engine.submit(change)


# What only shows: a view.


def _hello(board: Switchboard, conn: Connection, request: asked.Hello) -> None:
    state = board.state
    fields: dict[str, object] = {
        "protocol": words.PROTOCOL,
        "version": board.options.version,
        "epoch": state.settings.epoch,
        "safe_mode": state.safe_mode,
        "features": [],
    }
    conn.reply(request.id, fields)


def _health(board: Switchboard, conn: Connection, request: asked.Health) -> None:
    conn.reply(request.id, views.health(board.state))


def _ready(board: Switchboard, conn: Connection, request: asked.Ready) -> None:
    conn.reply(request.id, dict(board.services.ready()))


def _gpu_info(board: Switchboard, conn: Connection, request: asked.GpuInfo) -> None:
    services = board.services
    status = services.device_status()
    view = views.gpu_info(board.state, services.telemetry(), status, board.moment())
    conn.reply(request.id, view)


def _policy_get(board: Switchboard, conn: Connection, request: asked.PolicyGet) -> None:
    conn.reply(request.id, views.policy_get(board.state))


def _allocations(board: Switchboard, conn: Connection, request: asked.Allocations) -> None:
    state = board.state
    try:
        view = views.allocations(state, board.moment(), request.after, request.limit, conn.number)
    except views.BadCursor:
        _bad_cursor(conn, request)
    else:
        conn.reply(request.id, view)


def _queue(board: Switchboard, conn: Connection, request: asked.Queue) -> None:
    state = board.state
    try:
        view = views.queue(state, board.moment(), request.after, request.limit, conn.number)
    except views.BadCursor:
        _bad_cursor(conn, request)
    else:
        conn.reply(request.id, view)


def _bad_cursor(conn: Connection, request: asked.Allocations | asked.Queue) -> None:
    message = f"after is {show(request.after)}; allowed: {ALLOWED['after']}"
    _bad_request(conn, request.id, "after", message)


def _explain(board: Switchboard, conn: Connection, request: asked.Explain) -> None:
    engine = board.engine
    peer = conn.look()
    result = engine.machine.explain(peer, ask_of(request), engine.now_ns(), conn.number)
    if isinstance(result, Refusal):
        fault = Fault(str(result.code), result.message, result.field, request.id, conn.op)
        conn.refuse(fault)
    else:
        conn.reply(request.id, replies.explanation(result))


def _metrics(board: Switchboard, conn: Connection, request: asked.Metrics) -> None:
    board.render_metrics(conn, request.id)


def _whoami(board: Switchboard, conn: Connection, request: asked.Whoami) -> None:
    fields: dict[str, object] = {
        "pid": conn.credentials.pid,
        "uid": conn.credentials.uid,
        "gid": conn.credentials.gid,
        "admin": conn.is_admin(),
        "leases": views.leases_of(board.state, conn.number),
    }
    conn.reply(request.id, fields)


def _subscribe(board: Switchboard, conn: Connection, request: asked.Subscribe) -> None:
    try:
        wanted = wanted_by(request.topics)
    except KeyError as error:
        message = (
            f"topics has {show(error.args[0])}; allowed: *, {', '.join(words.TOPICS)}, each of "
            f"them with .*, and the names of events"
        )
        _bad_request(conn, request.id, "topics", message)
        return
    if conn.subscriptions is None:
        conn.subscriptions = {}
    bound = board.options.subscriptions_per_connection
    if len(conn.subscriptions) >= bound:
        message = f"at most {bound} subscriptions of one connection; this bound is reached"
        conn.refuse(Fault(words.LIMIT, message, None, request.id, conn.op))
        return
    number = conn.next_subscription
    conn.next_subscription += 1
    subscription: Subscription = board.subscriptions.add(conn, number, wanted)
    conn.subscriptions[number] = subscription
    conn.reply(request.id, {"subscription": number, "seq": subscription.seq})


def _unsubscribe(board: Switchboard, conn: Connection, request: asked.Unsubscribe) -> None:
    number = request.subscription
    subscription = (conn.subscriptions or {}).pop(number, None)
    if subscription is None:
        message = f"this connection has no subscription {number}"
        conn.refuse(Fault(words.NOT_FOUND, message, "subscription", request.id, conn.op))
        return
    board.subscriptions.remove(subscription)
    conn.reply(request.id, {"unsubscribed": True, "subscription": number})


_BY_OP: Final[Mapping[str, Handler]] = {
    "hello": _hello,
    "health": _health,
    "ready": _ready,
    "gpu_info": _gpu_info,
    "policy_get": _policy_get,
    "lease": _lease,
    "release": _release,
    "renew": _renew,
    "cancel": _cancel,
    "reattach": _reattach,
    "seal": _seal,
    "allocations": _allocations,
    "queue": _queue,
    "explain": _explain,
    "subscribe": _subscribe,
    "unsubscribe": _unsubscribe,
    "metrics": _metrics,
    "whoami": _whoami,
    "policy_set": _policy_set,
    "cordon": _cordon,
    "uncordon": _uncordon,
    "revoke": _revoke,
}

# What shows the state at length, and changes nothing: a request for one can wait its turn.
VIEWS: Final = frozenset(
    {asked.Allocations, asked.Queue, asked.GpuInfo, asked.PolicyGet, asked.Explain}
)

# By the request's type, which is what a decoder gives: the op's name, its handler, and whether it
# is for admins only.
HANDLERS: Final = {
    BY_OP[op]: (op, handler, op in words.ADMIN_OPS) for op, handler in _BY_OP.items()
}
