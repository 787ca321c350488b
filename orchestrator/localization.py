"""Localization: which parameters hold the forget set. Strategies score entries and never see a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples, Splits
from orchestrator.registry import Count, InputError, Registry
from orchestrator.training import Mask, as_input, evaluating

Scores = Mapping[str, Tensor]
"""One non-negative float32 score per parameter entry, by parameter name, in the order of the model."""

STRATEGIES: Registry[Callable[..., Scores]] = Registry("strategy", frozenset({"model", "splits", "generator", "base"}))
GRANULARITIES = ("param", "channel")


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
def random_within_tensor(base: Scores, generator: torch.Generator) -> Scores:
    """Control: the base strategy's output channels permuted inside each tensor, so every layer keeps its share."""
    shuffled = {}
    for name, scores in base.items():
        order = torch.randperm(len(scores), generator=generator) if scores.ndim else torch.arange(0)
        shuffled[name] = scores[order] if scores.ndim else scores
    return shuffled


def select(
    scores: Scores,
    budget: float,
    granularity: str,
    *,
    head: frozenset[str],
    train_head: bool = True,
) -> Mask:
    """Mask exactly floor(budget x entries) entries, the highest-scoring first; ties break by position.

    `param`: entries rank by their own score. `channel`: all entries of an output channel (first axis of a tensor with
    two or more) rank by its mean over the h highest, h = min(max(1, int(0.1 x channels)), fan-in) as released with
    DEL; tensors with one axis rank by entry. Only the last channel can be cut. `train_head` adds the parameters
    named in `head` to the trainable part whole, as released. Raises InputError for a budget outside (0, 1] or one
    that selects nothing.
    """
    if not 0 < budget <= 1:
        raise InputError(f"budget is {budget}; allowed: a share of the entries in (0, 1]")
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity is {granularity!r}; allowed: {', '.join(GRANULARITIES)}")
    ranked = [_channel_scores(part) if granularity == "channel" else part for part in scores.values()]
    flat = torch.cat([part.flatten() for part in ranked])
    count = int(Fraction(str(budget)) * len(flat))  # exact: 0.29 x 100 is 29, not 28
    if count == 0:
        raise InputError(
            f"budget {budget} of {len(flat)} entries selects nothing; allowed: {1 / len(flat):.2g} or more"
        )
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    pieces = torch.split(chosen, [part.numel() for part in ranked])
    reset = {name: piece.view(part.shape) for (name, part), piece in zip(scores.items(), pieces, strict=True)}
    trainable = {
        name: torch.ones_like(piece) if train_head and name in head else piece for name, piece in reset.items()
    }
    return Mask(reset, trainable)


def _channel_scores(scores: Tensor) -> Tensor:
    if scores.ndim < 2:
        return scores
    rows = scores.flatten(1)
    h = min(max(1, int(0.1 * rows.shape[0])), rows.shape[1])
    mean = rows.topk(h, dim=1).values.mean(dim=1)
    return mean.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)


def localize(
    name: str,
    options: Mapping[str, object],
    model: nn.Module,
    splits: Splits,
    *,
    generator: torch.Generator,
    base: Scores | None,
) -> Scores:
    """Score every entry of the model by a strategy; raises ValueError where a score is not finite."""
    entry = STRATEGIES[name]
    available = {"model": model, "splits": splits, "generator": generator, "base": base}
    scores: Scores = entry(available, entry.resolve(options))
    for parameter, part in scores.items():
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"strategy {name} gives {parameter} a score that is not finite")
    return {name: part.detach().float().cpu() for name, part in scores.items()}
