"""Localization: which parameters hold the forget set. Every module here is loaded on import."""

from orchestrator.localization.base import STRATEGIES, Scores, granularities, has_own_budget, localize
from orchestrator.localization.selection import GRANULARITIES, Ranking, TopH, num_selected, rank, select
from orchestrator.registry import load_modules

load_modules(__name__)

__all__ = [
    "GRANULARITIES",
    "STRATEGIES",
    "Ranking",
    "Scores",
    "TopH",
    "granularities",
    "has_own_budget",
    "localize",
    "num_selected",
    "rank",
    "select",
]
