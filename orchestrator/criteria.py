"""Criteria by which a setting is chosen: one number per tuning run, higher is better; never sees a test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from orchestrator.data import Outputs
from orchestrator.metrics import accuracy
from orchestrator.registry import Registry

SPLITS = ("forget", "retain", "validation")
"""What a criterion is given of any outputs."""

CRITERIA: Registry[Callable[..., float]] = Registry("criterion", frozenset({"outputs", "references", "original"}))
"""Functions of a tuning run's `outputs` and, where they ask for them, those of the `references` of its forget set and
of the `original` that it started from, each with SPLITS alone."""


@CRITERIA
def tug_of_war_validation(outputs: Outputs, references: Sequence[Outputs]) -> float:
    """Mean over tuning references of the product over forget, retain, validation of 1 - |accuracy - reference's|."""
    ours = accuracy(outputs)
    return float(np.mean([_closeness(ours, accuracy(reference)) for reference in references]))


@CRITERIA
def forget_as_unseen(outputs: Outputs, original: Outputs) -> float:
    """Product of 1 - |forget accuracy - original's validation accuracy| and 1 - |accuracy - original's| on retain,
    validation.

    Needs no retraining: it takes for granted that a retrained model does as well on the forget set as any model does
    on unseen examples, which holds for a random set and not for one of wrong labels or of memorized examples.
    """
    start = accuracy(original)
    return _closeness(accuracy(outputs), {**start, "forget": start["validation"]})


def _closeness(ours: dict[str, float], wanted: dict[str, float]) -> float:
    return float(np.prod([1 - abs(ours[split] - wanted[split]) for split in SPLITS]))
