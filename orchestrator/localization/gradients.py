"""Strategies that score entries by the gradient of the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples, Splits
from orchestrator.localization.base import STRATEGIES, Scores
from orchestrator.registry import Count
from orchestrator.seeds import generator
from orchestrator.training import as_input, evaluating


def _summed_gradients(model: nn.Module, examples: Examples, batch_size: int, as_released: bool) -> dict[str, Tensor]:
    """Sum over batches of the gradient of the cross-entropy in evaluation mode, every example with the same weight.

    A whole batch counts with its mean, as published, and the last one with its share of a batch. `as_released`: the
    last batch of a shuffle is left out, where there is a whole one; the shuffle is seeded here.
    """
    if as_released and len(examples) >= batch_size:
        order = torch.randperm(len(examples), generator=generator(0, "released batches"))
        examples = examples.take(order[: len(examples) // batch_size * batch_size])
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            images, labels = examples.images[start : start + batch_size], examples.labels[start : start + batch_size]
            loss = functional.cross_entropy(model(as_input(images)), labels, reduction="sum") / batch_size
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += gradient
    return dict(zip(names, sums, strict=True))


@STRATEGIES(version=2)
def weighted_gradient(
    model: nn.Module, splits: Splits, *, batch_size: Count = 128, as_released: bool = False
) -> Scores:
    """DEL's criterion: |sum over forget batches of weight x gradient| (Torkzadehmahani et al. 2025, section 5.2).

    Every forget example counts alike; `as_released` drops the last batch of a shuffle, as the released code does
    (without a seed there, with one here).
    """
    gradients = _summed_gradients(model, splits.forget, batch_size, as_released)
    return {name: (p.detach() * gradients[name]).abs() for name, p in model.named_parameters()}


@STRATEGIES(version=2)
def gradient(model: nn.Module, splits: Splits, *, batch_size: Count = 128, as_released: bool = False) -> Scores:
    """SalLoc, the saliency of SalUn: |sum over forget batches of the gradient| (Fan et al. 2024).

    `as_released` as in weighted_gradient.
    """
    return {name: g.abs() for name, g in _summed_gradients(model, splits.forget, batch_size, as_released).items()}


@STRATEGIES(version=2)
def weighted_gradient_train(
    model: nn.Module, splits: Splits, *, batch_size: Count = 128, as_released: bool = False
) -> Scores:
    """Forget-agnostic: |sum over batches of the whole training set of weight x gradient| (DEL's Table 4).

    `as_released` as in weighted_gradient.
    """
    gradients = _summed_gradients(model, splits.train, batch_size, as_released)
    return {name: (p.detach() * gradients[name]).abs() for name, p in model.named_parameters()}
