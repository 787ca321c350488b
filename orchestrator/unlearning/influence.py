"""Methods that move parameters once, by gradients at the original, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from orchestrator.data import Examples
from orchestrator.registry import Count, NonNegative, Positive
from orchestrator.training import Mask, as_input, clone, cross_entropy, evaluating, trainable_part
from orchestrator.unlearning.base import METHODS


@METHODS
def influence(
    model: nn.Module,
    mask: Mask | None,
    forget: Examples,
    retain: Examples,
    generator: torch.Generator,
    *,
    alpha: NonNegative = 1900.0,
    hessian: Literal["released", "woodfisher"] = "released",
    num_samples: Count = 1000,
    damping: Positive = 1e-3,
    batch_size: Count = 128,
) -> nn.Module:
    """Influence unlearning: one step of alpha x inverse Hessian x (forget - retain gradient) (Izzo 2021; Jia 2023).

    v = sum of forget gradients / n - (share of the forget set) x mean retain gradient, of the loss in evaluation mode,
    where n counts both sets. `released`: the recursion of SalUn and DEL, whose correction never leaves the direction
    of the first sampled gradient, so it is no inverse; the published alphas (CIFAR-10 Non-IID 1900, the default; IID
    42000) hold for it alone; the released code takes the retain set's first thousand examples, this a seeded draw.
    `woodfisher`: the inverse of damping + mean of the outer products of `num_samples`
    retain gradients, applied exactly; needs memory for that many gradients. Under a mask, gradients are cut to it
    first.
    """
    result = clone(model)
    part = trainable_part(model, mask)
    if not any(bool(chosen.any()) for chosen in part.values()):
        return result
    total = len(forget) + len(retain)
    with evaluating(result):
        forgotten, retained = (_sum_of_gradients(result, examples, part, batch_size) for examples in (forget, retain))
        v = forgotten / total - retained * (len(forget) / (total * len(retain)))
        count = min(num_samples, len(retain))
        order = torch.randperm(len(retain), generator=generator)[:count]
        samples = (_flat(_gradients(result, retain.take(order[i : i + 1])), part) for i in range(count))
        solve = released_recursion if hessian == "released" else damped_inverse
        step = solve(v, samples, count, damping)
    _add(result, part, alpha * step)
    return result


def released_recursion(v: Tensor, gradients: Iterator[Tensor], num_samples: int, damping: float) -> Tensor:
    """The recursion as released: `o` starts as the first gradient and is only ever scaled. `damping` plays no part."""
    k, o = v.clone(), next(gradients)
    for gradient in gradients:
        inner = torch.dot(o, gradient)
        k -= torch.dot(k, gradient) / (num_samples + inner) * o
        o = o - inner / (num_samples + inner) * o
    return k


def damped_inverse(v: Tensor, gradients: Iterator[Tensor], num_samples: int, damping: float) -> Tensor:
    """(damping + mean of g g^T)^-1 v, what the true WoodFisher recursion ends at (Singh and Alistarh 2020).

    By the Woodbury identity: one system of `num_samples` unknowns in place of as many rank-one updates.
    """
    rows = torch.stack(list(gradients))
    gram = (rows @ rows.T).double()
    system = gram + num_samples * damping * torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    weights = torch.linalg.solve(system, (rows @ v).double())
    inverse: Tensor = (v - rows.T @ weights.to(rows.dtype)) / damping
    return inverse


@METHODS(version=2)
def ssd(
    model: nn.Module,
    mask: Mask | None,
    forget: Examples,
    retain: Examples,
    generator: torch.Generator,
    *,
    selection: Positive = 16.0,
    damping: Positive = 1.0,
    batch_size: Count = 128,
    order: Literal["shuffled", "retain_first"] = "shuffled",
) -> nn.Module:
    """Selective synaptic dampening: shrink weights that matter more to the forget set than to all (Foster et al. 2024).

    Importance: mean over batches of the squared gradient of their mean loss, in evaluation mode, over the forget set
    and over the whole training set. Where forget importance > selection x importance, the weight is multiplied by
    min(1, damping x importance / forget importance). Defaults: DEL's for CIFAR-10 Non-IID (IID: selection 1; SVHN:
    damping 3, selection 5; ImageNet: selection 2); for the batch size no source is at hand.

    `order` of the whole training set: in a shuffle, as in DEL's comparison, every batch is a sample of it.
    `retain_first`, the code released with SSD, has batches of forget examples alone, so that importance / forget
    importance never falls below their share of the batches, and no weight is selected once selection exceeds its
    inverse (10 for a forget set of 10 %).
    """
    result = clone(model)
    part = trainable_part(model, mask)
    everything = retain.followed_by(forget)
    if order == "shuffled":
        everything = everything.take(torch.randperm(len(everything), generator=generator))
    with evaluating(result):
        of_forget, of_all = (_importance(result, examples, batch_size) for examples in (forget, everything))
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            ours, theirs = of_forget[name], of_all[name]
            chosen = part[name] & (ours > selection * theirs)
            factor = torch.where(chosen, (damping * theirs / ours).clamp(max=1), 1.0)
            parameter.copy_(torch.where(chosen, parameter * factor, parameter))
    return result


def _gradients(model: nn.Module, examples: Examples) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy, by parameter; zero for what requires none."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = cross_entropy(model, as_input(examples.images), examples.labels)
    found = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    return {name: found.get(name, torch.zeros_like(parameter)) for name, parameter in model.named_parameters()}


def _flat(gradients: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradient[part[name]] for name, gradient in gradients.items()])


def _each_batch(examples: Examples, size: int) -> Iterator[Examples]:
    for start in range(0, len(examples), size):
        yield Examples(examples.images[start : start + size], examples.labels[start : start + size])


def _sum_of_gradients(model: nn.Module, examples: Examples, part: Mapping[str, Tensor], batch_size: int) -> Tensor:
    total = torch.zeros(())
    for batch in _each_batch(examples, batch_size):
        total = total.to(batch.labels.device) + len(batch) * _flat(_gradients(model, batch), part)
    return total


def _importance(model: nn.Module, examples: Examples, batch_size: int) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    count = 0
    for batch in _each_batch(examples, batch_size):
        count += 1
        for name, gradient in _gradients(model, batch).items():
            sums[name] += gradient**2
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def _add(model: nn.Module, part: Mapping[str, Tensor], step: Tensor) -> None:
    start = 0
    for name, parameter in model.named_parameters():
        count = int(part[name].sum())
        parameter[part[name]] += step[start : start + count]
        start += count
