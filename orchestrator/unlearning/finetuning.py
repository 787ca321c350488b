"""Methods that train on the retain set alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from orchestrator.data import Examples
from orchestrator.models import Factory
from orchestrator.registry import Added, Count, NonNegative, Share, ShareBelowOne
from orchestrator.training import Mask, Report, Schedule, Training, clone, cross_entropy, fit, reset
from orchestrator.unlearning.base import METHODS


@METHODS
def reset_and_finetune(
    model: nn.Module,
    mask: Mask | None,
    retain: Examples,
    fresh: Factory,
    initial: Callable[[], nn.Module],
    generator: torch.Generator,
    report: Report,
    *,
    lr: NonNegative = 0.015,
    epochs: Count = 30,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    final: Share = 0.01,
    schedule: Annotated[Schedule, Added()] = "step",
    reset_to: Annotated[Literal["fresh", "initial", "zero"], Added()] = "fresh",
) -> nn.Module:
    """DEL's second half: masked entries drawn anew, then trained on the retain set (Torkzadehmahani et al. 2025).

    Defaults as released for CIFAR-10: masked entries become those of a new model (`fresh`); `initial`: those that the
    original began with; `zero`. Batch-norm statistics are not reset, and follow training unless the mask freezes them.
    """
    source = fresh(generator) if reset_to == "fresh" else initial() if reset_to == "initial" else _zeros(model)
    unlearned = reset(clone(model), mask, source)
    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final, schedule=schedule)
    return fit(unlearned, retain, training=training, generator=generator, mask=mask, report=report)


@METHODS
def finetune(
    model: nn.Module,
    mask: Mask | None,
    retain: Examples,
    generator: torch.Generator,
    report: Report,
    *,
    lr: NonNegative = 0.01,
    epochs: Count = 10,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    final: Share = 0.01,
    schedule: Annotated[Schedule, Added()] = "step",
) -> nn.Module:
    """Training continued on the retain set alone (defaults: RUM, Zhao et al. 2024; schedule as released with DEL)."""
    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final, schedule=schedule)
    return fit(clone(model), retain, training=training, generator=generator, mask=mask, report=report)


@METHODS
def l1_sparse(
    model: nn.Module,
    mask: Mask | None,
    retain: Examples,
    generator: torch.Generator,
    report: Report,
    *,
    gamma: NonNegative = 7e-5,
    lr: NonNegative = 0.01,
    epochs: Count = 10,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    final: Share = 0.01,
    schedule: Annotated[Schedule, Added()] = "step",
) -> nn.Module:
    """Fine-tuning on retain loss + gamma x (1 - epoch / epochs) x sum of magnitudes (Jia et al. 2023).

    gamma and its linear decay as released with DEL, rate and epochs as in RUM.
    """
    per_epoch = max(1, len(retain) // batch_size)
    steps = itertools.count()

    def objective(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        weight = gamma * (1 - next(steps) // per_epoch / epochs)
        magnitude = torch.stack([p.abs().sum() for p in net.parameters() if p.requires_grad]).sum()
        return cross_entropy(net, images, labels) + weight * magnitude

    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final, schedule=schedule)
    return fit(
        clone(model), retain, training=training, generator=generator, mask=mask, objective=objective, report=report
    )


def _zeros(model: nn.Module) -> nn.Module:
    zeros = clone(model)
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    return zeros
