"""Strategies that score entries by the gradient of the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples, Splits
from orchestrator.localization.base import STRATEGIES, Scores
from orchestrator.registry import Count
from orchestrator.training import as_input, evaluating


def _summed_gradients(model: nn.Module, examples: Examples, batch_size: int) -> dict[str, Tensor]:
    """Sum over batches of the gradient of the mean cross-entropy, evaluation mode, in the order of the examples."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            images, labels = examples.images[start : start + batch_size], examples.labels[start : start + batch_size]
            loss = functional.cross_entropy(model(as_input(images)), labels)
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += gradient
    return dict(zip(names, sums, strict=True))


@STRATEGIES
def weighted_gradient(model: nn.Module, splits: Splits, *, batch_size: Count = 128) -> Scores:
    """DEL's criterion: |sum over forget batches of weight x gradient| (Torkzadehmahani et al. 2025, section 5.2).

    The released code shuffles and drops the last batch; here every forget example counts, in a fixed order.
    """
    gradients = _summed_gradients(model, splits.forget, batch_size)
    return {name: (p.detach() * gradients[name]).abs() for name, p in model.named_parameters()}


@STRATEGIES
def gradient(model: nn.Module, splits: Splits, *, batch_size: Count = 128) -> Scores:
    """SalLoc, the saliency of SalUn: |sum over forget batches of the gradient| (Fan et al. 2024)."""
    return {name: g.abs() for name, g in _summed_gradients(model, splits.forget, batch_size).items()}


@STRATEGIES
def weighted_gradient_train(model: nn.Module, splits: Splits, *, batch_size: Count = 128) -> Scores:
    """Forget-agnostic: |sum over batches of the whole training set of weight x gradient| (DEL's Table 4)."""
    gradients = _summed_gradients(model, splits.train, batch_size)
    return {name: (p.detach() * gradients[name]).abs() for name, p in model.named_parameters()}
