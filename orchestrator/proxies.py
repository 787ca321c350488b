"""Cheap stand-ins for memorization: one training run in place of a campaign (Zhao and Triantafillou 2024).

Every proxy is turned so that more means more memorized. A Watcher looks at a model after each epoch of its training,
in evaluation mode on the images as they are; the released code reads the training batches' own logits instead, which
costs nothing but sees each example at another moment, and under augmentation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Examples
from orchestrator.registry import Count, InputError, NonNegative, Registry, ShareBelowOne
from orchestrator.training import Training, as_input, clone, evaluating, fit, predict

PROXIES: Registry[Callable[..., np.ndarray]] = Registry(
    "proxy", frozenset({"events", "curvature", "model", "train", "validation", "generator"})
)
"""Functions that return float64 [n], one value per training example. They may ask for `events` (LearningEvents) and
`curvature` (float64 [n], mean over epochs) of a training run, the `model` it ended with, `train` and `validation`
examples, and a `generator`."""

_STEP = 0.01  # of the finite difference, as released
_TINY = 1e-10


@dataclass(frozen=True)
class LearningEvents:
    """Means over the epochs of a training run, float64 [n] each: what the model said of each training example."""

    confidence: np.ndarray
    max_confidence: np.ndarray
    entropy: np.ndarray
    accuracy: np.ndarray


@dataclass
class Watcher:
    """Adds up what the proxies need, after each epoch; `with_curvature` costs two more backward passes each time."""

    train: Examples
    with_curvature: bool = False
    epochs: int = 0
    event_seconds: float = 0.0
    curvature_seconds: float = 0.0
    _sums: dict[str, np.ndarray] = field(default_factory=dict)

    def look(self, model: nn.Module) -> None:
        """Look at the model as it is now."""
        start = time.perf_counter()
        labels = self.train.labels.cpu().numpy()
        logs = log_probabilities(predict(model, self.train))
        own = np.exp(logs[np.arange(len(labels)), labels])
        self._add("confidence", own)
        self._add("max_confidence", np.exp(logs.max(axis=1)))
        self._add("entropy", -(np.exp(logs) * logs).sum(axis=1))
        self._add("accuracy", (logs.argmax(axis=1) == labels).astype(np.float64))
        middle = time.perf_counter()
        self.event_seconds += middle - start
        if self.with_curvature:
            self._add("curvature", curvatures(model, self.train))
            self.curvature_seconds += time.perf_counter() - middle
        self.epochs += 1

    def _add(self, name: str, values: np.ndarray) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + values

    @property
    def events(self) -> LearningEvents:
        means = {name: total / self.epochs for name, total in self._sums.items() if name != "curvature"}
        return LearningEvents(**means)

    @property
    def curvature(self) -> np.ndarray:
        mean: np.ndarray = self._sums["curvature"] / self.epochs
        return mean


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax in double precision, float64 [n, classes]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def curvatures(model: nn.Module, examples: Examples, batch_size: int = 512) -> np.ndarray:
    """|grad L(x + z) - grad L(x)| of each example, float64 [n]; z has length 0.01 along the sign of grad L(x).

    After CURE, as Garg et al. (2023) use it and RUM's code has it.
    """
    device = next(model.parameters()).device
    parts = []
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            images = as_input(examples.images[start : start + batch_size].to(device))
            labels = examples.labels[start : start + batch_size].to(device)
            here = _gradients(model, images, labels)
            signs = here.sign()
            lengths = signs.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            there = _gradients(model, images + _STEP * signs / (lengths + 1e-7), labels)
            parts.append((there - here).flatten(1).norm(dim=1).double().cpu().numpy())
    return np.concatenate(parts)


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    given = images.detach().requires_grad_(True)
    loss = functional.cross_entropy(model(given), labels, reduction="sum")  # of each example by itself
    (gradient,) = torch.autograd.grad(loss, given)
    return gradient


@PROXIES
def confidence(events: LearningEvents) -> np.ndarray:
    """1 - mean over epochs of the given label's probability (Zhao and Triantafillou 2024; Jiang et al. 2021)."""
    return 1 - events.confidence


@PROXIES
def max_confidence(events: LearningEvents) -> np.ndarray:
    """1 - mean over epochs of the highest probability of any class (Zhao and Triantafillou 2024)."""
    return 1 - events.max_confidence


@PROXIES
def entropy(events: LearningEvents) -> np.ndarray:
    """Mean over epochs of the entropy of the predicted distribution, in nats (Zhao and Triantafillou 2024)."""
    return events.entropy


@PROXIES
def binary_accuracy(events: LearningEvents) -> np.ndarray:
    """Share of epochs in which the example is wrong (Zhao and Triantafillou 2024); takes as many values as epochs."""
    return 1 - events.accuracy


@PROXIES
def loss_curvature(curvature: np.ndarray) -> np.ndarray:
    """Mean over epochs of the curvature of the loss in the input (Garg et al. 2023; Zhao and Triantafillou 2024)."""
    return curvature


@PROXIES
def holdout_retraining(
    model: nn.Module,
    train: Examples,
    validation: Examples,
    generator: torch.Generator,
    *,
    lr: NonNegative = 0.1,
    epochs: Count = 30,
    batch_size: Count = 128,
    momentum: ShareBelowOne = 0.9,
    weight_decay: NonNegative = 5e-4,
) -> np.ndarray:
    """Symmetric KL between the model's prediction and that of a copy trained on held-out examples.

    Half the sum of both directions (Carlini et al. 2019). Rates as released with RUM, whose copy is trained on the test
    set and stopped early; this one on the validation split, for all epochs at a constant rate. Raises InputError
    without a validation split.
    """
    if not len(validation):
        raise InputError("proxy holdout_retraining needs a validation split; give the data one (data.num_validation)")
    training = Training(lr, epochs, batch_size, momentum, weight_decay, final=1.0)
    copy = fit(clone(model), validation, training=training, generator=generator)
    p, q = (np.maximum(np.exp(log_probabilities(predict(net, train))), _TINY) for net in (model, copy))
    found: np.ndarray = ((p - q) * (np.log(p) - np.log(q))).sum(axis=1) / 2
    return found
