"""CritMem: the channels that single examples hang on, found by zeroing one after another (Maini et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples, Splits
from orchestrator.localization.base import STRATEGIES, OwnScores
from orchestrator.localization.gradients import weighted_gradient
from orchestrator.registry import Count, NonNegative
from orchestrator.seeds import generator
from orchestrator.training import as_input, clone, evaluating


@STRATEGIES(version=2)
def critmem(
    model: nn.Module,
    splits: Splits,
    granularity: Literal["channel"],
    *,
    batch_size: Count = 512,
    noise: NonNegative = 0.01,
    draws: Count = 5,
    max_channels: Count = 100,
    num_examples: Count | None = None,
) -> OwnScores:
    """Critical channels (Maini et al. 2023): zeroed one by one until a forget example's prediction flips; their union.

    For every forget example, the channel (or entry of a tensor with one axis) with the largest signed sum of weight x
    gradient of -its loss + mean loss of `batch_size` - 1 other training examples is set to zero, until the prediction
    is wrong or `max_channels` are gone. Logits are averaged over `draws` inputs with Gaussian noise of `noise` times
    the input's norm. An example that is wrong already has no critical channel. Score: the number of examples whose
    set holds the channel, plus below one half its weight x gradient magnitude; its own budget is all channels that
    any example needs. How DEL's authors united the sets was not published; the union is ours. `num_examples` searches
    only the first so many, as Maini et al. did with 1,000. Noise and companions are one seeded draw, so that one search
    serves all unlearning seeds.
    """
    stream = generator(0, "critical channels")
    counts = {name: torch.zeros(_units(p), device=p.device) for name, p in model.named_parameters()}
    probe = clone(model)
    with evaluating(probe):
        for index in range(min(len(splits.forget), num_examples or len(splits.forget))):
            others = torch.randint(len(splits.train), (batch_size - 1,), generator=stream)
            batch = Examples(
                torch.cat([splits.forget.images[index : index + 1], splits.train.take(others).images]),
                torch.cat([splits.forget.labels[index : index + 1], splits.train.take(others).labels]),
            )
            for name, unit in _critical(probe, batch, noise, draws, max_channels, stream):
                counts[name][unit] += 1
            _restore(probe, model)
    ties = {
        name: part.flatten(1).mean(1) if part.ndim > 1 else part
        for name, part in weighted_gradient(model, splits).items()
    }
    largest = max(float(part.max()) for part in ties.values())
    return {
        name: _spread(counts[name] + ties[name] / (2 * largest) if largest else counts[name], p)
        for name, p in model.named_parameters()
    }


def _units(parameter: Tensor) -> int:
    return len(parameter) if parameter.ndim else 1


def _spread(units: Tensor, parameter: Tensor) -> Tensor:
    return units.view(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter) if parameter.ndim else units.view(())


def _critical(
    model: nn.Module, batch: Examples, noise: float, draws: int, max_channels: int, stream: torch.Generator
) -> list[tuple[str, int]]:
    """Zero channels of the model in place until the first example of the batch is predicted wrong; return them."""
    found: list[tuple[str, int]] = []
    images = as_input(batch.images)
    while len(found) < max_channels and _is_right(model, images, batch.labels):
        scores = _signed(model, _noisy(images, noise, draws, stream), batch.labels, draws)
        for name, unit in found:  # zero already: its score says nothing
            scores[name][unit] = -torch.inf
        best = max(scores, key=lambda name: float(scores[name].max()))
        unit = int(scores[best].argmax())
        if scores[best][unit] == -torch.inf:
            break  # nothing is left to zero
        with torch.no_grad():
            parameter = model.get_parameter(best)
            (parameter[unit] if parameter.ndim else parameter).zero_()
        found.append((best, unit))
    return found


@torch.no_grad()
def _is_right(model: nn.Module, images: Tensor, labels: Tensor) -> bool:
    return bool(model(images[:1]).argmax(1) == labels[0])


def _noisy(images: Tensor, noise: float, draws: int, stream: torch.Generator) -> Tensor:
    repeated = images.repeat(draws, 1, 1, 1)
    if not noise:
        return repeated
    drawn = torch.randn(repeated.shape, generator=stream).to(images.device)
    norms = [part.flatten(1).norm(dim=1) for part in (repeated, drawn)]
    scaled: Tensor = drawn * (noise * norms[0] / norms[1]).view(-1, 1, 1, 1)
    return repeated + scaled


def _signed(model: nn.Module, images: Tensor, labels: Tensor, draws: int) -> dict[str, Tensor]:
    """Per channel, the sum of weight x gradient of -the first example's loss + the mean loss of the rest."""
    logits = model(images).view(draws, len(labels), -1).mean(0)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(losses[1:].sum() / len(losses) - losses[0], parameters)
    return {
        name: (p.detach() * g).reshape(_units(p), -1).sum(1)
        for name, p, g in zip(names, parameters, gradients, strict=True)
    }


@torch.no_grad()
def _restore(probe: nn.Module, model: nn.Module) -> None:
    originals: Mapping[str, Tensor] = dict(model.named_parameters())
    for name, parameter in probe.named_parameters():
        parameter.copy_(originals[name])
