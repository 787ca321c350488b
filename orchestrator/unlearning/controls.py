"""What methods are measured against: the original, the reference, and a reference cut short."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import nn

from orchestrator.data import Examples
from orchestrator.models import Factory
from orchestrator.registry import Added, Count, NonNegative, Share, ShareBelowOne
from orchestrator.training import Report, Schedule, Training, clone, fit
from orchestrator.unlearning.base import METHODS


@METHODS
def identity(model: nn.Module) -> nn.Module:
    """The original, unchanged: the control that forgets nothing."""
    return clone(model)


@METHODS
def retrain(
    retain: Examples, fresh: Factory, training: Training, generator: torch.Generator, report: Report
) -> nn.Module:
    """The reference: a new model trained on the retain set alone, as originals are trained."""
    return fit(fresh(generator), retain, training=training, generator=generator, report=report)


@METHODS
def retrain_short(
    retain: Examples,
    fresh: Factory,
    generator: torch.Generator,
    report: Report,
    *,
    lr: NonNegative = 0.1,
    epochs: Count = 30,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    warmup: ShareBelowOne = 0.2,
    final: Share = 0.01,
    schedule: Annotated[Schedule, Added()] = "step",
) -> nn.Module:
    """Control: a new model trained on the retain set for as many steps as unlearning (full reset, no original).

    The warm-up is ours: it lets few epochs begin at the rate of full training. No source; 0 for a reference cut short.
    """
    training = Training(lr, epochs, batch_size, momentum, weight_decay, warmup, final, schedule=schedule)
    return fit(fresh(generator), retain, training=training, generator=generator, report=report)
