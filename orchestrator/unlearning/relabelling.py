"""Methods that train the forget set under other labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import nn

from orchestrator.data import Examples
from orchestrator.registry import Added, Count, NonNegative, Share, ShareBelowOne
from orchestrator.training import Mask, Phase, Report, Schedule, Training, clone, cross_entropy, fit
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
    schedule: Annotated[Schedule, Added()] = "step",
    labels: Annotated[Literal["all", "wrong"], Added()] = "all",
    order: Annotated[Literal["shuffled", "forget_first"], Added()] = "shuffled",
) -> nn.Module:
    """Training on the retain set and the forget set under uniformly random labels, shuffled together.

    Labels (of `all` classes, the given one too, or of the `wrong` ones) are drawn once, as released with DEL, or anew
    each epoch (`redraw`, as SalUn does, Fan et al. 2024; under a `gradient` mask of granularity `param` this is SalUn).
    `forget_first`: each epoch goes through the forget set, then through the retain set, as SalUn's code does for
    CIFAR-10. Rates: SalUn's released ones.
    """

    def drawn() -> Examples:
        numbers = torch.randint(num_classes - (labels == "wrong"), (len(forget),), generator=generator)
        numbers = numbers.to(forget.labels.device)
        if labels == "wrong":
            numbers = (forget.labels + 1 + numbers) % num_classes
        return forget.relabelled(numbers)

    def together(part: Examples) -> Examples | Sequence[Phase]:
        if order == "forget_first":
            return [Phase(part, cross_entropy), Phase(retain, cross_entropy)]
        return retain.followed_by(part)

    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final, schedule=schedule)
    once = None if redraw else together(drawn())

    def examples(_: int) -> Examples | Sequence[Phase]:
        return together(drawn()) if once is None else once

    return fit(clone(model), examples, training=training, generator=generator, mask=mask, report=report)
