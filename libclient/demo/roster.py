"""The agents of the demo: a news-analysis pipeline whose limits do not fit on its card at once."""

from __future__ import annotations

import math
from typing import NamedTuple

# The card that the limits were written for, and that is simulated where there is none.
CARD_MB = 24_576


class Member(NamedTuple):
    """One agent. `limit_gib` is what it leases while it works, `need_gib` what its models take."""

    agent: str
    port: int
    limit_gib: float
    need_gib: float
    priority: str
    models: str

    def limit_mb(self, scale: float) -> int:
        """Return MiB to lease on a card that is `scale` times the one the limits are for."""
        return math.ceil(self.limit_gib * 1_024 * scale)


# In the order in which they are started: those who matter most first.
ROSTER = (
    Member("analyst", 8004, 2.3, 2.0, "critical", "sentiment and toxicity classifiers"),
    Member("scout", 8002, 4, 3, "critical", "small BERT classifiers"),
    Member("fact_checker", 8003, 5, 4, "critical", "distilbert, roberta-base, mpnet embeddings"),
    Member("synthesizer", 8005, 4, 3, "critical", "distilgpt2, flan-t5-small"),
    Member("chief_editor", 8001, 2, 1, "critical", "distilbert"),
    Member("critic", 8006, 4, 3.5, "normal", "toxicity classifiers"),
    Member("memory", 8007, 1, 0.5, "normal", "MiniLM embeddings"),
    Member("newsreader", 8009, 1, 0.5, "normal", "MiniLM embeddings"),
    Member("balancer", 8010, 1, 0.5, "background", "tiny BERT"),
)
# What the newsreader's vision model once took; in the demo it asks for that first.
VISION_GIB = 6.9


def member(agent: str) -> Member:
    """Return an agent of the roster."""
    return next(entry for entry in ROSTER if entry.agent == agent)
