"""Methods that train on the retain set alone."""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.data import Examples
from orchestrator.models import Factory
from orchestrator.registry import Count, NonNegative, Share, ShareBelowOne
from orchestrator.training import Mask, Report, Training, clone, fit, reset
from orchestrator.unlearning.base import METHODS


@METHODS
def reset_and_finetune(
    model: nn.Module,
    mask: Mask | None,
    retain: Examples,
    fresh: Factory,
    generator: torch.Generator,
    report: Report,
    *,
    lr: NonNegative = 0.015,
    epochs: Count = 30,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    final: Share = 0.01,
) -> nn.Module:
    """DEL's second half: masked entries drawn anew, then trained on the retain set (Torkzadehmahani et al. 2025).

    Defaults as released for CIFAR-10. Batch-norm statistics are not reset, and follow training.
    """
    unlearned = reset(clone(model), mask, fresh(generator))
    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final)
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
) -> nn.Module:
    """Training continued on the retain set alone (defaults: RUM, Zhao et al. 2024; schedule as released with DEL)."""
    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final)
    return fit(clone(model), retain, training=training, generator=generator, mask=mask, report=report)
