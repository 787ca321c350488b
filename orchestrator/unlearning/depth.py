"""Methods that choose their own parameters: the last k layers (Goel et al. 2022). They take no mask."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import nn

from orchestrator.data import Examples
from orchestrator.models import Factory
from orchestrator.registry import Bounds, Count, Fits, InputError, NonNegative, Share, ShareBelowOne
from orchestrator.training import Mask, Report, Training, clone, fit, reset
from orchestrator.unlearning.base import METHODS


def last_layers(model: nn.Module, k: int) -> Mask:
    """The last k convolutional and linear layers, counted from the output in the order of definition.

    trainable: every parameter from the first of them on, normalization between and behind them too; reset: the
    parameters of those layers alone. Raises InputError where the model has fewer.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if k > len(layers):
        raise InputError(f"k is {k}; allowed: 1 to {len(layers)}, the convolutional and linear layers of this model")
    chosen = tuple(f"{name}." if name else "" for name in layers[-k:])
    names = [name for name, _ in model.named_parameters()]
    first = next(place for place, name in enumerate(names) if name.startswith(chosen))
    whole = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    none = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    behind = set(names[first:])
    return Mask(
        reset={name: (whole if name in behind and name.startswith(chosen) else none)[name] for name in names},
        trainable={name: (whole if name in behind else none)[name] for name in names},
    )


Depth = Annotated[int, Bounds(at_least=1), Fits(last_layers)]


@METHODS
def cf_k(
    model: nn.Module,
    retain: Examples,
    generator: torch.Generator,
    report: Report,
    *,
    k: Depth = 3,
    lr: NonNegative = 0.1,
    epochs: Count = 62,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    final: Share = 0.05,
) -> nn.Module:
    """CF-k: fine-tune the last k layers on the retain set, the rest frozen (Goel et al. 2022).

    Rate, its floor and epochs as published; their restarts of the schedule are one cosine here, and k, which they
    swept from 1 to 3, is 3. Batch-norm statistics of all layers follow training.
    """
    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final)
    return fit(clone(model), retain, training=training, generator=generator, mask=last_layers(model, k), report=report)


@METHODS
def eu_k(
    model: nn.Module,
    retain: Examples,
    fresh: Factory,
    generator: torch.Generator,
    report: Report,
    *,
    k: Depth = 3,
    lr: NonNegative = 0.1,
    epochs: Count = 62,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 0.0,
    final: Share = 0.05,
) -> nn.Module:
    """EU-k: retrain the last k layers on the retain set from a new draw, the rest frozen (Goel et al. 2022).

    Normalization between the layers trains but is not drawn anew. Defaults as in `cf_k`.
    """
    mask = last_layers(model, k)
    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=final)
    unlearned = reset(clone(model), mask, fresh(generator))
    return fit(unlearned, retain, training=training, generator=generator, mask=mask, report=report)
