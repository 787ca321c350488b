"""Methods that train the forget set under other labels."""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.data import Examples
from orchestrator.registry import Count, NonNegative, Share, ShareBelowOne
from orchestrator.training import Mask, Report, Training, clone, fit
from orchestrator.unlearning.base import METHODS


@METHODS
def random_labels(
    model: nn.Module,
    mask: Mask | None,
    forget: Examples,
    retain: Examples,
    num_classes: int,
    generator: torch.Generator,
    report: Report,
    *,
    lr: NonNegative = 0.01,
    epochs: Count = 10,
    redraw: bool = False,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    final: Share = 0.5,
) -> nn.Module:
    """Training on the retain set and the forget set under uniformly random labels, shuffled together.

    Labels (any class, the given one too) are drawn once, as released with DEL, or anew each epoch (`redraw`, as SalUn
    does, Fan et al. 2024; under a `gradient` mask of granularity `param` this is SalUn). Rates: SalUn's released ones.
    """

    def relabelled(_: int) -> Examples:
        drawn = torch.randint(num_classes, (len(forget),), generator=generator).to(forget.labels.device)
        return Examples(torch.cat([retain.images, forget.images]), torch.cat([retain.labels, drawn]))

    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final)
    examples = relabelled if redraw else relabelled(0)
    return fit(clone(model), examples, training=training, generator=generator, mask=mask, report=report)
