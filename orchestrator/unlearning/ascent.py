"""Methods that climb the loss of the forget set."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from orchestrator.data import Examples
from orchestrator.registry import Count, NonNegative, Share, ShareBelowOne
from orchestrator.training import Mask, Report, Training, clone, cross_entropy, endless_batches, fit
from orchestrator.unlearning.base import METHODS


@METHODS(version=2)
def gradient_ascent(
    model: nn.Module,
    mask: Mask | None,
    forget: Examples,
    retain: Examples,
    generator: torch.Generator,
    report: Report,
    *,
    steps: Literal["retain", "forget"] = "retain",
    lr: NonNegative = 1e-4,
    epochs: Count = 5,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    statistics: Literal["both", "forget"] = "both",
) -> nn.Module:
    """NegGrad: ascent on the forget loss, at a constant rate (Golatkar et al. 2020).

    As released with DEL, an epoch has as many steps as the retain set has batches; `steps=forget`: one pass over the
    forget set. Rate and epochs as in RUM. Batch-norm `statistics` follow `both` the batch that the epoch goes through
    and the forget batch, in this order, as released; or the forget batches alone.
    """
    stream = endless_batches(forget, batch_size, generator)

    def objective(net: nn.Module, images: Tensor, _: Tensor) -> Tensor:
        if statistics == "both":
            with torch.no_grad():
                net(images)
        return -cross_entropy(net, *next(stream))

    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=1.0)
    return fit(
        clone(model),
        retain if steps == "retain" else forget,
        training=training,
        generator=generator,
        mask=mask,
        objective=objective,
        report=report,
    )


@METHODS(version=2)
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

    One forget batch per retain batch, cycling; constant rate. alpha as released with DEL, the rest as in RUM. The
    retain batch goes through batch norm first, as released.
    """
    stream = endless_batches(forget, batch_size, generator)

    def objective(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        retained = cross_entropy(net, images, labels)
        return alpha * retained - (1 - alpha) * cross_entropy(net, *next(stream))

    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=1.0)
    return fit(
        clone(model), retain, training=training, generator=generator, mask=mask, objective=objective, report=report
    )
