"""The stages of a composed method: each a registered method under a mask that is localized when its turn comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from orchestrator.data import Examples, Splits
from orchestrator.localization import localize, rank
from orchestrator.models import head_names
from orchestrator.registry import Choice
from orchestrator.seeds import generator
from orchestrator.training import Mask, clone
from orchestrator.unlearning import METHODS, Stage


@dataclass(frozen=True)
class StageMask:
    """How a stage's mask is selected; see localization.rank and Ranking.mask."""

    strategy: Choice
    base: Choice | None
    granularity: str
    budget: float | None
    h: str | int | float
    train_head: bool
    freeze_statistics: bool


@dataclass(frozen=True)
class PlainStage:
    """A method by name, and its mask; in plain values."""

    method: Choice
    mask: StageMask | None


def performer(stage: PlainStage, place: int, seed: int, available: Mapping[str, Any], train: Examples) -> Stage:
    """The stage as a function of model, forget and retain part; `available` is what its method may ask for beside them.

    Each place has random streams of its own. The mask is that of the model as the stages before have left it, and of
    this part of the forget set; strategies see images as they are, as everywhere.
    """

    def perform(model: nn.Module, forget: Examples, retain: Examples) -> nn.Module:
        entry = METHODS[stage.method.name]
        splits = Splits(train, forget.augmented("none"), retain.augmented("none"))
        given = {
            "model": clone(model),
            "mask": None if stage.mask is None else _mask(stage.mask, place, seed, model, splits),
            "forget": forget,
            "retain": retain,
            "generator": generator(seed, "unlearning", "stage", place),
        }
        unlearned: nn.Module = entry({**available, **given}, entry.resolve(stage.method.options))
        return unlearned

    return perform


def _mask(asked: StageMask, place: int, seed: int, model: nn.Module, splits: Splits) -> Mask:
    scores = None
    for strategy in (asked.base, asked.strategy):
        if strategy is not None:
            stream = generator(seed, "localization", "stage", place)
            scores = localize(
                strategy.name,
                strategy.options,
                clone(model),
                splits,
                generator=stream,
                base=scores,
                granularity=asked.granularity,
            )
    assert scores is not None
    return rank(scores, asked.granularity, asked.h).mask(
        asked.budget,
        head=head_names(model),
        train_head=asked.train_head,
        freeze_statistics=asked.freeze_statistics,
    )
