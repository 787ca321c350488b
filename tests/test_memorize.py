"""When a growing campaign has enough."""

from __future__ import annotations

import dataclasses

import pytest

from jobs.memorize import Goal
from orchestrator.plan import ScoresSummary

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
