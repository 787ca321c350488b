"""Strategies that do not look at the loss: magnitude, depth and chance."""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.localization.base import STRATEGIES, Scores


@STRATEGIES
def random_within_tensor(base: Scores, generator: torch.Generator) -> Scores:
    """Control: the base strategy's output channels permuted inside each tensor, so every layer keeps its share."""
    shuffled = {}
    for name, scores in base.items():
        order = torch.randperm(len(scores), generator=generator) if scores.ndim else torch.arange(0)
        shuffled[name] = scores[order] if scores.ndim else scores
    return shuffled


@STRATEGIES
def random(model: nn.Module, granularity: str, generator: torch.Generator) -> Scores:
    """Control: entries, or whole output channels, in random order over all layers."""
    scores = {}
    for name, parameter in model.named_parameters():
        whole = granularity == "channel" and parameter.ndim > 1
        shape = (len(parameter), *[1] * (parameter.ndim - 1)) if whole else parameter.shape
        scores[name] = torch.rand(shape, generator=generator).expand(parameter.shape)
    return scores


@STRATEGIES
def weight_magnitude(model: nn.Module) -> Scores:
    """Forget-agnostic: the magnitude of the weight (`weight` in the code released with DEL)."""
    return {name: parameter.detach().abs() for name, parameter in model.named_parameters()}


@STRATEGIES
def shallowest(model: nn.Module) -> Scores:
    """The layers closest to the input until the budget is spent; inside the last of them by position."""
    layers = _layers(model)
    return _by_layer(model, {layer: float(len(layers) - place) for place, layer in enumerate(layers)})


@STRATEGIES
def deepest(model: nn.Module) -> Scores:
    """The layers closest to the output until the budget is spent; inside the last of them by position."""
    return _by_layer(model, {layer: float(place) for place, layer in enumerate(_layers(model))})


def _layers(model: nn.Module) -> list[str]:
    """The modules that hold parameters, in the order of definition."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()))


def _by_layer(model: nn.Module, score: dict[str, float]) -> Scores:
    return {name: torch.full(p.shape, score[name.rpartition(".")[0]]) for name, p in model.named_parameters()}
