"""`explain`: what a lease request would be answered now, and why."""

from __future__ import annotations

from typing import Any

from libclient.cli import exits
from libclient.cli.arguments import request_fields
from libclient.cli.faults import UsageError
from libclient.cli.invocation import Invocation
from libclient.cli.naming import agent_name
from libclient.cli.progress import describe
from libclient.cli.screen import Screen
from libclient.cli.tables import Cell, Column
from libclient.cli.text import safe
from libclient.sizes import format_duration, format_memory

COLUMNS = (Column("GPU", right=True), Column("REASON"), Column("DETAIL", least=20))


def explain(invocation: Invocation) -> int:
    """Say what the request would get now."""
    args = invocation.args
    try:
        fields = request_fields(args, agent_name(args.agent, args.words))
    except (ValueError, TypeError) as fault:
        raise UsageError(safe(fault)) from None
    reply = invocation.call("explain", **fields)
    if invocation.screen.json:
        invocation.screen.document(reply)
    else:
        _show(invocation.screen, describe(fields), reply)
    return exits.OK if reply.get("would_grant") else exits.NO


def _show(screen: Screen, wanted: str, reply: dict[str, Any]) -> None:
    paint = screen.paint
    if reply.get("would_grant"):
        screen.line(f"{paint('yes', 'bold green')}: {wanted} would be granted now, {_where(reply)}")
        return
    screen.line(f"{paint('no', 'bold red')}: {wanted} would not be granted now: "
                f"{paint(safe(reply.get('note')), 'bold')}")  # fmt: skip
    reasons = reply.get("reasons") or []
    if reasons:
        rows = [
            [
                Cell("host" if reason.get("gpu") is None else safe(reason["gpu"])),
                Cell(safe(reason.get("reason"))),
                Cell(safe(reason.get("detail") or "")),
            ]
            for reason in reasons
        ]
        screen.table(COLUMNS, rows)
    if reply.get("eta_s") is not None:
        screen.line(f"it might be in about {format_duration(reply['eta_s'])}")


def _where(reply: dict[str, Any]) -> str:
    return ", ".join(
        f"{format_memory(gpu.get('memory_mb'))} on GPU {safe(gpu.get('index'))}"
        if isinstance(gpu, dict)
        else f"GPU {safe(gpu)}"
        for gpu in reply.get("gpus") or ()
    )
