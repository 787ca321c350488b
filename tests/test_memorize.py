"""When a growing campaign has enough."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jobs.memorize import Goal
from orchestrator.campaigns import ScoresSummary
from orchestrator.registry import InputError
from tests.benchmarks.stopping import alone, together

SUMMARY = ScoresSummary("k", 20, 1.0, None, 0.9, 0.5, 1.0, standard_error=0.05)


@pytest.mark.parametrize(
    ("goal", "changes", "met"),
    [
        (Goal(standard_error=0.05), {}, True),
        (Goal(standard_error=0.04), {}, False),
        (Goal(standard_error=0.04), {"standard_error": 0.0}, True),
        (Goal(standard_error=0.04), {"standard_error": None}, False),
        (Goal(split_half=0.5), {}, True),
        (Goal(split_half=0.6), {}, False),
        (Goal(split_half=0.0), {"split_half": 0.0}, True),
        (Goal(split_half=0.0), {"split_half": None}, False),
        (Goal(split_half=0.6, standard_error=0.1), {}, True),
        (Goal(hours=1.0), {}, False),
    ],
)
def test_a_target_is_met_at_its_value_and_not_by_what_is_unknown(
    goal: Goal, changes: dict[str, float], met: bool
) -> None:
    assert (goal.met(dataclasses.replace(SUMMARY, **changes)) is not None) == met


@pytest.mark.parametrize("hours", [float("inf"), float("nan"), -1.0])
def test_a_budget_without_end_is_refused(hours: float) -> None:
    with pytest.raises(InputError, match=r"--budget-hours is .*; allowed: hours from 0"):
        _ = Goal(hours=hours).grows


def test_intervals_cover_though_the_example_itself_stopped_the_campaign() -> None:
    found = alone(0.1)
    assert 40 < found.models.min() < found.models.max() < 150
    assert found.points.mean() >= 0.95
    assert found.points.min() >= 0.93


@pytest.mark.parametrize("goal", [Goal(standard_error=0.105), Goal(split_half=0.85)], ids=["error", "halves"])
def test_intervals_cover_though_their_scores_stopped_the_campaign(goal: Goal) -> None:
    found = together(goal, per_point=2, campaigns=400, seed=1)  # mean: one binomial error is .0015
    assert 20 <= found.models.min() <= found.models.max() < 1000
    assert np.ptp(found.models) > 0, "the scores did not decide when"
    assert found.points.mean() >= 0.948
    assert found.points.min() >= 0.90
