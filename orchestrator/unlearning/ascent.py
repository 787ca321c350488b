"""Methods that climb the loss of the forget set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orchestrator.data import Examples
from orchestrator.registry import Count, NonNegative, Share, ShareBelowOne
from orchestrator.training import Mask, Report, Training, clone, cross_entropy, endless_batches, fit
from orchestrator.unlearning.base import METHODS


@METHODS
def neg_grad_plus(
    model: nn.Module,
    mask: Mask | None,
    forget: Examples,
    retain: Examples,
    generator: torch.Generator,
    report: Report,
    *,
    alpha: Share = 0.99,
    lr: NonNegative = 0.01,
    epochs: Count = 5,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
) -> nn.Module:
    """NegGrad+: descent on alpha x retain loss - (1 - alpha) x forget loss (Kurmanji et al. 2023).

    One forget batch per retain batch, cycling; constant rate. alpha as released with DEL, the rest as in RUM.
    """
    stream = endless_batches(forget, batch_size, generator)

    def objective(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        forgotten = cross_entropy(net, *next(stream))
        return alpha * cross_entropy(net, images, labels) - (1 - alpha) * forgotten

    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=1.0)
    return fit(
        clone(model), retain, training=training, generator=generator, mask=mask, objective=objective, report=report
    )
