"""Unlearning methods: a model and what the method declares go in, a new model comes out.

A method names in its signature what it is given, and gets nothing else: `model` (the original), `mask` (None: all
parameters), `forget`, `retain`, `validation` (Examples), `fresh` (generator -> new model), `generator`, `training`
(how originals are trained), `report` (told after each epoch). What remains, after `*`, are its options. A method
that does not take `model` has no original; one that does not take `mask` has no localization.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from orchestrator.data import Examples
from orchestrator.models import Factory
from orchestrator.registry import Count, NonNegative, Registry, Share, ShareBelowOne
from orchestrator.training import Mask, Report, Training, clone, cross_entropy, endless_batches, fit, reset

METHODS: Registry[Callable[..., nn.Module]] = Registry(
    "method",
    frozenset(
        {"model", "mask", "forget", "retain", "validation", "fresh", "generator", "training", "report", "num_classes"}
    ),
)


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
) -> nn.Module:
    """Control: a new model trained on the retain set for as many steps as unlearning (full reset, no original)."""
    training = Training(lr, epochs, batch_size, momentum, weight_decay, warmup, final)
    return fit(fresh(generator), retain, training=training, generator=generator, report=report)


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
