"""The agents of the demo: a news-analysis pipeline whose limits do not fit on its card at once."""

from __future__ import annotations

import math
from typing import NamedTuple

from libclient.ports import port_map

# The card that the limits were written for, and that is simulated where there is none.
CARD_MB = 24_576


class Member(NamedTuple):
    """One agent. `limit_gib` is what it leases while it works, `need_gib` what its models take."""

    agent: str
    limit_gib: float
    need_gib: float
    priority: str
    models: str

    @property
    def port(self) -> int:
        """Where the agent answers."""
        return next(entry.port for entry in port_map() if entry.name == self.agent)

    def limit_mb(self, scale: float) -> int:
        """Return MiB to lease on a card that is `scale` times the one the limits are for."""
        return math.ceil(self.limit_gib * 1_024 * scale)


# In the order in which they are started: those who matter most first.
ROSTER = (
    Member("analyst", 2.3, 2.0, "critical", "sentiment and toxicity classifiers"),
    Member("scout", 4, 3, "critical", "small BERT classifiers"),
    Member("fact_checker", 5, 4, "critical", "distilbert, roberta-base, mpnet embeddings"),
    Member("synthesizer", 4, 3, "critical", "distilgpt2, flan-t5-small"),
    Member("chief_editor", 2, 1, "critical", "distilbert"),
    Member("critic", 4, 3.5, "normal", "toxicity classifiers"),
    Member("memory", 1, 0.5, "normal", "MiniLM embeddings"),
    Member("newsreader", 1, 0.5, "normal", "MiniLM embeddings"),
    Member("balancer", 1, 0.5, "background", "tiny BERT"),
)
# What the newsreader's vision model once took; in the demo it asks for that first.
VISION_GIB = 6.9


def member(agent: str) -> Member:
    """Return an agent of the roster."""
    return next(entry for entry in ROSTER if entry.agent == agent)
