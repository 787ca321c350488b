"""Methods that unlearn the forget set part by part, each part by a method of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from orchestrator.data import Examples
from orchestrator.registry import InputError
from orchestrator.seeds import numpy_generator
from orchestrator.training import clone
from orchestrator.unlearning.base import METHODS, Stage


@METHODS(version=2)
def rum(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
    memorization: np.ndarray,
    stages: Sequence[Stage],
    *,
    order: Literal["low_to_high", "high_to_low"] = "low_to_high",
) -> nn.Module:
    """RUM: the forget set in parts of equal memorization, unlearned one after another (Zhao et al. 2024).

    The examples are ranked by `memorization` and cut into as many parts as there are stages, of equal size within one;
    ties rank in an order drawn once. The first stage takes the least memorized part; `high_to_low` takes the parts,
    with their stages, from the other end. Parts that are still to come belong to the retain set.
    """
    ties = numpy_generator(0, "ties").permutation(len(forget))  # by position they might go by class
    parts = _parts(np.lexsort((ties, memorization)), len(stages))
    turns = list(zip(stages, parts, strict=True))
    return _in_turn(model, forget, retain, turns if order == "low_to_high" else turns[::-1])


@METHODS
def rum_shuffled(
    model: nn.Module, forget: Examples, retain: Examples, stages: Sequence[Stage], generator: torch.Generator
) -> nn.Module:
    """Control of RUM: the same stages on parts of the same sizes drawn at random (*shuffle* in Zhao et al. 2024)."""
    order = torch.randperm(len(forget), generator=generator).numpy()
    return _in_turn(model, forget, retain, list(zip(stages, _parts(order, len(stages)), strict=True)))


def _parts(order: np.ndarray, number: int) -> list[np.ndarray]:
    if not 0 < number <= len(order):
        raise InputError(
            f"a forget set of {len(order)} examples is to be cut in {number} parts, one a stage; allowed: 1 to its size"
        )
    return np.array_split(order, number)


def _in_turn(
    model: nn.Module, forget: Examples, retain: Examples, turns: Sequence[tuple[Stage, np.ndarray]]
) -> nn.Module:
    unlearned = clone(model)
    for number, (stage, part) in enumerate(turns):
        later = [other for _, other in turns[number + 1 :]]
        rest = retain.followed_by(forget.take(np.sort(np.concatenate(later)))) if later else retain
        unlearned = stage(unlearned, forget.take(np.sort(part)), rest)
    return unlearned
