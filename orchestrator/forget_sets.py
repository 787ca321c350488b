"""Forget sets: which training examples are to be forgotten. The only choice that may look at true labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from orchestrator.registry import InputError, Registry

FORGET_SETS: Registry[Callable[..., np.ndarray]] = Registry(
    "forget set", frozenset({"labels", "true_labels", "memorization", "rng"})
)
"""Functions of training labels int64 [n] (and `true_labels`, `memorization` scores float64 [n], `rng`) that return
sorted training indices int64."""


@FORGET_SETS
def random(labels: np.ndarray, rng: np.random.Generator, *, fraction: float = 0.1) -> np.ndarray:
    """A uniform draw from the training set (`fraction` of it)."""
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise InputError(
            f"forget set random: fraction {fraction} of {len(labels)} examples is {count}; "
            f"allowed: 1 to {len(labels) - 1}"
        )
    return np.sort(rng.choice(len(labels), count, replace=False))


@FORGET_SETS
def mislabelled(labels: np.ndarray, true_labels: np.ndarray) -> np.ndarray:
    """The training examples whose given label is not their true one."""
    flipped = np.flatnonzero(labels != true_labels)
    if not len(flipped):
        raise InputError(
            "forget set mislabelled: no label is flipped; set data.label_noise above 0, or leave this set out"
        )
    return flipped


@FORGET_SETS
def most_memorized(
    labels: np.ndarray, true_labels: np.ndarray, memorization: np.ndarray, *, count: int = 60, unflipped: bool = True
) -> np.ndarray:
    """The training examples with the highest memorization scores (`unflipped`: among those correctly labelled)."""
    candidates = np.flatnonzero(labels == true_labels) if unflipped else np.arange(len(labels))
    if not 0 < count < min(len(candidates) + 1, len(labels)):
        raise InputError(f"forget set most_memorized: count is {count}; allowed: 1 to {len(candidates)}")
    order = np.argsort(-memorization[candidates], kind="stable")
    return np.sort(candidates[order[:count]])
