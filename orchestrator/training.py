"""The only training loop, the mask that restrains it, and prediction. Knows nothing of what a run is for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Augment, Examples
from orchestrator.descent import Descent
from orchestrator.seeds import drawing_from

Schedule = Literal["step", "epoch"]
"""When the rate changes: each step, or between epochs alone, as released with DEL."""


@dataclass(frozen=True)
class Training:
    """How a model is trained from scratch.

    The rate rises linearly over the share `warmup` of all steps, then falls on a cosine to `final` times its peak; with
    the `schedule` "epoch" it changes between epochs alone, as released with DEL (and reaches `final` after the last; a
    `warmup` of less than two epochs is then none).
    Batches are full: the rest of each shuffled epoch is left out (of training only). `augment` says what the pipeline
    has training do to the images, unlearning's too; predictions and localization see them as they are.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: float = 0.0
    final: float = 0.01
    precision: str = "fp32"
    schedule: Schedule = "step"
    augment: Augment = "none"


@dataclass(frozen=True)
class Mask:
    """A selection of parameter entries, each part one boolean tensor per parameter name.

    `reset`: the localized entries, as many as the budget says. `trainable`: the entries that training may move,
    which is `reset` and, by DEL's head rule, the classifier. `freeze_statistics` keeps the running statistics of batch
    norm as they are, and trains with them; else they follow training, as released with DEL.
    """

    reset: Mapping[str, Tensor]
    trainable: Mapping[str, Tensor]
    freeze_statistics: bool = False

    @property
    def num_entries(self) -> int:
        return sum(part.numel() for part in self.reset.values())

    @property
    def num_reset(self) -> int:
        return sum(int(part.sum()) for part in self.reset.values())

    @property
    def num_trainable(self) -> int:
        return sum(int(part.sum()) for part in self.trainable.values())


Report = Callable[[int, int, float], None]
"""Told after each epoch: the epoch from 1, the optimizer steps it took, the mean loss of its batches."""

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Loss of one batch: model, images (float, channels_last), labels."""


@dataclass(frozen=True)
class Phase:
    """A part of an epoch: examples gone through once under an objective of their own."""

    examples: Examples
    objective: Objective
    batch_size: int | None = None  # None: that of the training


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of one batch."""
    return functional.cross_entropy(model(images), labels)


def as_input(images: Tensor) -> Tensor:
    """uint8 [n, height, width, channels] to float32 [n, channels, height, width] in [0, 1], channels_last."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def batches(examples: Examples, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled epoch of full batches; fewer examples than a batch make one batch of all."""
    order = _sent(torch.randperm(len(examples), generator=generator), examples.labels.device)
    size = min(batch_size, len(examples))
    for start in range(0, len(examples) - size + 1, size):
        chosen = order[start : start + size]
        images = examples.images.index_select(0, chosen)  # a copy of rows, where [chosen] goes by elements
        yield as_input(augmented(images, examples.augment, generator)), examples.labels.index_select(0, chosen)


_BORDER = 4  # black pixels on each side before a crop
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a resized crop: share of the image, width over height


def augmented(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Images uint8 [n, height, width, channels] as training sees them; all draws are made on the CPU."""
    if augment == "none":
        return images
    count, height, width, _ = images.shape
    flips = _sent(torch.rand(count, generator=generator), images.device) < 0.5
    if augment == "crop_flip":
        corners = _sent(torch.randint(2 * _BORDER + 1, (2, count), generator=generator), images.device)
        return cropped(images, corners[0], corners[1], flips)
    draws = torch.rand(4, count, generator=generator)
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[0]) * height * width
    ratio = torch.exp(math.log(_RATIO[0]) + math.log(_RATIO[1] / _RATIO[0]) * draws[1])
    tall, wide = (area / ratio).sqrt().clamp(max=height), (area * ratio).sqrt().clamp(max=width)
    top, left = draws[2] * (height - tall), draws[3] * (width - wide)
    box = _sent(torch.stack((top, left, tall, wide)), images.device)
    return resampled(images, *box, flips=flips)


def _optimizer(
    parameters: Sequence[nn.Parameter], training: Training, device: torch.device
) -> torch.optim.Optimizer | Descent:
    rate, momentum, decay = training.learning_rate, training.momentum, training.weight_decay
    if device.type == "cuda":  # one kernel for all parameters
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay, fused=True)
    return Descent(parameters, lr=rate, momentum=momentum, weight_decay=decay)


def _sent(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on the device; no step waits for the copy, nor the copy for the steps before it."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn


def cropped(images: Tensor, top: Tensor, left: Tensor, flips: Tensor) -> Tensor:
    """Crops of the images' own size, int64 [n] corners counted in the image with its black border; some mirrored."""
    count, height, width, _ = images.shape
    padded = functional.pad(images, (0, 0, _BORDER, _BORDER, _BORDER, _BORDER))
    device = images.device
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    return padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def resampled(images: Tensor, top: Tensor, left: Tensor, tall: Tensor, wide: Tensor, *, flips: Tensor) -> Tensor:
    """Boxes of the images, float [n] each in pixels, bilinearly resized to the images' own size; some mirrored.

    Pixels just outside a box count at its border, where torchvision crops first; boxes that would not fit are cut to
    the image (`augmented`), where torchvision draws again, so they are a little larger: .53 of the image for .49.
    """
    _, height, width, _ = images.shape
    rows = top[:, None] + tall[:, None] * (torch.arange(height, device=images.device) + 0.5) / height
    columns = left[:, None] + wide[:, None] * (torch.arange(width, device=images.device) + 0.5) / width
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    grid = torch.stack(
        [
            (2 * columns / width - 1)[:, None, :].expand(-1, height, -1),
            (2 * rows / height - 1)[:, :, None].expand(-1, -1, width),
        ],
        dim=-1,
    )
    found = functional.grid_sample(
        images.permute(0, 3, 1, 2).float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return found.round().to(torch.uint8).permute(0, 2, 3, 1)


def endless_batches(examples: Examples, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled epochs of full batches, one after another, for ever."""
    while True:
        yield from batches(examples, batch_size, generator)


def rate_factor(step: int, num_steps: int, warmup: float, final: float) -> float:
    """Factor on the learning rate at a step: linear warm-up to 1, then a cosine down to `final` at the last step."""
    rising = round(warmup * num_steps)
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, num_steps - rising - 1))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    model: nn.Module,
    examples: Examples | Callable[[int], Examples | Sequence[Phase]],
    *,
    training: Training,
    generator: torch.Generator,
    mask: Mask | None = None,
    objective: Objective = cross_entropy,
    report: Report | None = None,
    num_batches: int | None = None,
) -> nn.Module:
    """Train the given model in place and return it.

    `examples` may be a function of the epoch (from 0), and may be phases that follow one another in it; the rate then
    falls as if every epoch had as many steps as the first. `num_batches` cuts each epoch, so that models trained on
    subsets that differ in size by one take the same steps. Under a mask, entries outside `trainable` do not move by
    one bit, whatever momentum and weight decay do; under a mask with none trainable nothing moves, buffers included.
    Batch-norm statistics follow training unless the mask freezes them. Dropout draws from a stream of the `generator`.
    Raises FloatingPointError where the loss stops being finite.
    """
    if mask is not None and not any(bool(part.any()) for part in mask.trainable.values()):
        return model
    device = next(model.parameters()).device
    autocast = autocast_of(device, training.precision)
    train_mode(model, mask)
    step = num_steps = 0
    with _Restraint(model, mask) as restrained, drawing_from(generator, device):
        optimizer = _optimizer(restrained.parameters, training, device)
        for epoch in range(training.epochs):
            data = examples(epoch) if callable(examples) else examples
            phases = [Phase(data, objective)] if isinstance(data, Examples) else data
            available = sum(_num_batches(phase, training.batch_size) for phase in phases)
            per_epoch = available if num_batches is None else min(num_batches, available)
            num_steps = num_steps or per_epoch * training.epochs
            total = torch.zeros((), device=device)
            stream = _stream(phases, training.batch_size, generator)
            for _, (loss_of, images, labels) in zip(range(per_epoch), stream, strict=False):
                factor = rate_factor(step, num_steps, training.warmup, training.final)
                if training.schedule == "epoch":
                    factor = rate_factor(epoch, training.epochs + 1, training.warmup, training.final)
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * factor
                optimizer.zero_grad(set_to_none=True)
                with autocast():
                    loss = loss_of(model, images, labels)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                restrained.restore()
                total += loss.detach()
                step += 1
            mean = float(total) / per_epoch
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss became {mean} in epoch {epoch + 1} at learning rate {training.learning_rate}; "
                    "try a smaller one"
                )
            if report is not None:
                report(epoch + 1, per_epoch, mean)
    return model


def _num_batches(phase: Phase, batch_size: int) -> int:
    return max(1, len(phase.examples) // (phase.batch_size or batch_size))


def _stream(
    phases: Sequence[Phase], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Objective, Tensor, Tensor]]:
    for phase in phases:
        for images, labels in batches(phase.examples, phase.batch_size or batch_size, generator):
            yield phase.objective, images, labels


def train_mode(model: nn.Module, mask: Mask | None) -> None:
    """Training mode; under a mask that freezes statistics, batch norm stays in evaluation mode."""
    model.train()
    if mask is not None and mask.freeze_statistics:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def trainable_part(model: nn.Module, mask: Mask | None) -> dict[str, Tensor]:
    """What a method that takes no optimizer may move: per parameter a boolean tensor on its device."""
    part = {}
    for name, parameter in model.named_parameters():
        allowed = torch.ones_like(parameter, dtype=torch.bool)
        part[name] = (allowed if mask is None else mask.trainable[name].to(parameter.device)) & parameter.requires_grad
    return part


class _Restraint:
    """Keeps the frozen entries of a model in place: whole tensors by leaving them out of the optimizer, the frozen
    part of mixed tensors by writing it back after every step (weight decay and momentum would move it). On leaving,
    however that comes about, every parameter requires a gradient as it did before."""

    def __init__(self, model: nn.Module, mask: Mask | None) -> None:
        self.parameters: list[nn.Parameter] = []
        self._mixed: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._frozen: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            allowed = None if mask is None else mask.trainable[name].to(parameter.device)
            if allowed is not None and not bool(allowed.any()):
                parameter.requires_grad_(False)
                self._frozen.append(parameter)
                continue
            self.parameters.append(parameter)
            if allowed is not None and not bool(allowed.all()):
                self._mixed.append((parameter, allowed, parameter.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, allowed, before in self._mixed:
            parameter.copy_(torch.where(allowed, parameter, before))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)


def autocast_of(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """A context for the forward pass in a precision: none for fp32, bf16 autocast else."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def predict(model: nn.Module, examples: Examples, *, batch_size: int = 512) -> np.ndarray:
    """Logits float32 [n, classes] in evaluation mode, of every example; the model keeps its mode."""
    device = next(model.parameters()).device
    with evaluating(model):
        parts = [
            model(as_input(examples.images[start : start + batch_size].to(device))).float()
            for start in range(0, len(examples), batch_size)
        ]
    logits: np.ndarray = torch.cat(parts).cpu().numpy()  # once: every copy waits for the device
    return logits


def clone(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model."""
    return copy.deepcopy(model)


@torch.no_grad()
def reset(model: nn.Module, mask: Mask | None, source: nn.Module) -> nn.Module:
    """Overwrite the masked entries (all, without a mask) in place with those of `source`; buffers stay as they are."""
    replacement = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        new = replacement[name].to(parameter.device)
        parameter.copy_(new if mask is None else torch.where(mask.reset[name].to(parameter.device), new, parameter))
    return model
