"""The registry of localization strategies, which score parameter entries and never see a budget.

A strategy names in its signature what it is given: `model` (the original), `splits` (training set, forget and retain
part), `generator`, `granularity` (`Literal["channel"]`: it has no other), `base` (another strategy's scores). One that
returns OwnScores ends at a budget of its own: the entries with a score of 1 or more.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from orchestrator.data import Splits
from orchestrator.localization.selection import GRANULARITIES
from orchestrator.registry import Entry, Registry

Scores = Mapping[str, Tensor]
"""One non-negative float32 score per parameter entry, by parameter name, in the order of the model."""


@dataclass(frozen=True)
class OwnBudget:
    """Marks scores whose strategy ends at a budget of its own."""


OwnScores = Annotated[Scores, OwnBudget()]

STRATEGIES: Registry[Callable[..., Scores]] = Registry(
    "strategy", frozenset({"model", "splits", "generator", "granularity", "base"})
)


def granularities(entry: Entry[Any]) -> tuple[str, ...]:
    """The granularities at which a strategy can be selected from."""
    return _granularities(entry.function)


@cache
def _granularities(function: Callable[..., Scores]) -> tuple[str, ...]:
    hint = typing.get_type_hints(function).get("granularity")
    named: tuple[str, ...] = typing.get_args(hint) if typing.get_origin(hint) is Literal else GRANULARITIES
    return named


def has_own_budget(entry: Entry[Any]) -> bool:
    """Whether a strategy ends at a budget of its own, so that a mask may be selected without asking for one."""
    hint = typing.get_type_hints(entry.function, include_extras=True).get("return")
    return any(isinstance(part, OwnBudget) for part in getattr(hint, "__metadata__", ()))


def localize(
    name: str,
    options: Mapping[str, object],
    model: nn.Module,
    splits: Splits,
    *,
    generator: torch.Generator,
    base: Scores | None,
    granularity: str | None = None,
) -> Scores:
    """Score every entry of the model by a strategy; raises ValueError where a score is not finite.

    `granularity` is given to a strategy that asks for it (None: the first that it allows).
    """
    entry = STRATEGIES[name]
    available = {
        "model": model,
        "splits": splits,
        "generator": generator,
        "granularity": granularity or granularities(entry)[0],
        "base": base,
    }
    scores: Scores = entry(available, entry.resolve(options))
    for parameter, part in scores.items():
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"strategy {name} gives {parameter} a score that is not finite")
    return {name: part.detach().float().cpu() for name, part in scores.items()}
