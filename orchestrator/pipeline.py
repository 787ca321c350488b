"""The pure pipeline on plain values: train, score, unlearn, predict, measure. Knows no specs, no keys and no store.

It needs torch and numpy alone, and what a data set needs to be read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.compiled import Reused
from orchestrator.data import Dataset, Examples, Outputs, SplitOutputs, Splits
from orchestrator.localization import Scores, localize
from orchestrator.models import Factory, factory
from orchestrator.proxies import PROXIES, Watcher
from orchestrator.registry import Choice
from orchestrator.seeds import generator
from orchestrator.stages import PlainStage, performer
from orchestrator.subset_outputs import packed
from orchestrator.training import Mask, Objective, Training, clone, cross_entropy, fit, predict
from orchestrator.unlearning import METHODS


@dataclass(frozen=True)
class Layer:
    """How many entries of one parameter a mask resets, how many it lets train, and how many moved."""

    parameter: str
    entries: int
    reset: int
    trainable: int
    moved: int | None = None  # None: a row from before it was counted


@dataclass(frozen=True)
class Lab:
    """A data set on a device, with what is cut from it kept: training, test and forget examples.

    `compiled`: subset models are trained through one compiled model, which is kept too. All else is eager.
    """

    dataset: Dataset
    device: str = "cpu"
    compiled: bool = False
    _kept: dict[str, Examples] = field(default_factory=dict)
    _reused: dict[str, Reused] = field(default_factory=dict)

    def examples(self, split: str) -> Examples:
        if split not in self._kept:
            self._kept[split] = self.dataset.examples(split).to(self.device)
        return self._kept[split]

    def forget(self) -> None:
        """Drop what was cut; it is cut anew."""
        self._kept.clear()

    def fresh(self, model: Choice) -> Factory:
        make = factory(model.name, model.options, self.dataset.image_shape, self.dataset.num_classes)
        return lambda stream: make(stream).to(self.device)

    def subset_model(self, model: Choice, training: Training, stream: torch.Generator) -> tuple[nn.Module, Objective]:
        """A new model for a subset, and the loss to train it by; compiled, it is the same object each time."""
        made = self.fresh(model)(stream)
        if not self.compiled:
            return made, cross_entropy
        kind = f"{model.name} {dict(model.options)} {training.batch_size} {training.precision}"
        if kind not in self._reused:
            self._reused.clear()
            self._reused[kind] = Reused(clone(made), training, self.examples("train"))
        return self._reused[kind].loaded(made), self._reused[kind].objective

    @property
    def numerics(self) -> str:
        """What equality of results is conditional on: device, CPU capability, torch version, compile mode."""
        return self._numerics("eager")

    @property
    def subset_numerics(self) -> str:
        """The same for the subset model that was trained last."""
        return self._numerics(next((reused.mode for reused in self._reused.values()), "eager"))

    def _numerics(self, mode: str) -> str:
        name = torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu"
        return f"{name} {torch.backends.cpu.get_cpu_capability()} torch-{torch.__version__} {mode}"


def train_original(lab: Lab, model: Choice, training: Training, seed: int) -> nn.Module:
    """Train a model on the whole training set."""
    stream = generator(seed, "original")
    examples = lab.examples("train").augmented(training.augment)
    return fit(lab.fresh(model)(stream), examples, training=training, generator=stream)


def train_watched(
    lab: Lab, model: Choice, training: Training, seed: int, *, with_curvature: bool
) -> tuple[nn.Module, Watcher, float]:
    """Train an original, the same one as ever, and look at it after each epoch; also the seconds of training alone."""
    stream = generator(seed, "original")
    made, watcher = lab.fresh(model)(stream), Watcher(lab.examples("train"), with_curvature)
    examples = lab.examples("train").augmented(training.augment)
    start = time.perf_counter()
    fit(made, examples, training=training, generator=stream, report=lambda *_: watcher.look(made))
    seconds = time.perf_counter() - start - watcher.event_seconds - watcher.curvature_seconds
    return made, watcher, seconds


def proxies(
    lab: Lab, chosen: Sequence[Choice], model: Choice, training: Training, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Stand-ins for memorization from one training run: by name float64 [n], and what each cost beside the training."""
    entries = {choice.name: PROXIES[choice.name] for choice in chosen}
    asked = {name for entry in entries.values() for name in entry.inputs}
    made, watcher, training_seconds = train_watched(lab, model, training, seed, with_curvature="curvature" in asked)
    available = {
        "events": watcher.events,
        "curvature": watcher.curvature if "curvature" in asked else None,
        "train": lab.examples("train"),
        "validation": lab.examples("validation"),
    }
    watched = {"events": watcher.event_seconds, "curvature": watcher.curvature_seconds}
    values, seconds = {}, {"training": training_seconds}
    for choice in chosen:
        start = time.perf_counter()
        given = {"model": clone(made), "generator": generator(seed, "proxy", choice.name)}
        entry = entries[choice.name]
        values[choice.name] = entry({**available, **given}, entry.resolve(choice.options))
        own = time.perf_counter() - start
        seconds[choice.name] = own + sum(watched[name] for name in entry.inputs & set(watched))
    return values, seconds


def train_subset_model(
    lab: Lab, model: Choice, training: Training, members: np.ndarray, *, fraction: float, stream: torch.Generator
) -> dict[str, np.ndarray]:
    """Train a model on the training examples marked in `members`, bool [n].

    Returns its outputs on train and test as `subset_outputs.packed` has them, and as float64 the accuracy on its
    subset, on test, and its seconds. Subsets whose sizes differ by one take the same number of full batches.
    """
    train, test = lab.examples("train"), lab.examples("test")
    num_batches = max(1, int(np.floor(len(train) * fraction)) // training.batch_size)
    start = time.perf_counter()
    made, objective = lab.subset_model(model, training, stream)
    subset = train.take(np.flatnonzero(members)).augmented(training.augment)
    fit(made, subset, training=training, generator=stream, num_batches=num_batches, objective=objective)
    logits, test_logits = finite(half(predict(made, train))), finite(half(predict(made, test)))
    labels, test_labels = train.labels.cpu().numpy(), test.labels.cpu().numpy()
    right = logits.argmax(axis=1) == labels
    return {
        **packed("train", logits, labels),
        **packed("test", test_logits, test_labels),
        "in_accuracy": np.array(right[members].mean()),
        "test_accuracy": np.array((test_logits.argmax(axis=1) == test_labels).mean()),
        "seconds": np.array(time.perf_counter() - start),
    }


def train_single(lab: Lab, model: Choice, training: Training, left_out: int | None, seed: int) -> dict[str, np.ndarray]:
    """Train a model on the whole training set, or on all of it but one example.

    Returns whether it is right (bool) and the given label's probability (float32) for every training example, or for
    the one left out alone; and as float64 its accuracy on what it was trained on, on test, and its seconds.
    Both sides take the same number of full batches. Their streams have nothing in common, nor with any other model's:
    the intervals take the sides for independent, and a shared seed would hardly make them vary together, since one
    example fewer changes every batch, and training is sensitive to any change (Jordan 2023, arXiv 2304.01910).
    """
    train, test = lab.examples("train"), lab.examples("test")
    stream = generator(seed, "exact with") if left_out is None else generator(seed, "exact without", left_out)
    seen = np.flatnonzero(np.arange(len(train)) != (-1 if left_out is None else left_out))
    start = time.perf_counter()
    made, objective = lab.subset_model(model, training, stream)
    examples = train.take(seen).augmented(training.augment)
    num_batches = max(1, (len(train) - 1) // training.batch_size)
    fit(made, examples, training=training, generator=stream, num_batches=num_batches, objective=objective)
    labels, test_logits = train.labels.cpu().numpy(), finite(half(predict(made, test)))
    outputs = SplitOutputs(half(predict(made, train)), labels, labels)
    right, kept = outputs.predictions == labels, slice(left_out, None if left_out is None else left_out + 1)
    return {
        "correct": right[kept],
        "probability": outputs.confidences[kept].astype(np.float32),
        "accuracy": np.array(right[seen].mean()),
        "test_accuracy": np.array((test_logits.argmax(axis=1) == test.labels.cpu().numpy()).mean()),
        "seconds": np.array(time.perf_counter() - start),
    }


def split_examples(lab: Lab, forget: np.ndarray) -> Splits:
    """The training set, and its parts to forget and to retain."""
    train = lab.examples("train")
    retained = np.setdiff1d(np.arange(len(train)), forget)
    return Splits(train, train.take(forget), train.take(retained))


class ChangedExamplesError(RuntimeError):
    """A function changed the examples that it was given: what others of this process hold is not to be used."""


@contextmanager
def unchanged(who: str, *given: Examples | None) -> Iterator[None]:
    """Raise ChangedExamplesError where the examples are changed in place inside, whatever else is raised there."""
    before = [_sums(examples) for examples in given if examples]
    try:
        yield
    finally:
        if [_sums(examples) for examples in given if examples] != before:
            raise ChangedExamplesError(
                f"{who} changed the examples that it was given, in place; it may change copies (`labels.clone()`)"
            )


def _sums(examples: Examples) -> tuple[int, ...]:
    """What changes when examples are written to: torch's count of writes, and sums for what it does not see."""
    places = torch.arange(len(examples), device=examples.labels.device)
    sums = examples.images.sum(dtype=torch.int64), (examples.labels * (places + 1)).sum()
    return (examples.images._version, examples.labels._version, *(int(part) for part in sums))


def score(
    strategy: Choice, original: nn.Module, splits: Splits, *, seed: int, granularity: str | None, base: Scores | None
) -> Scores:
    """Score every parameter entry of an original by a strategy, which is given a copy of it."""
    with unchanged(f"strategy {strategy.name}", splits.train, splits.forget, splits.retain):
        return localize(
            strategy.name,
            strategy.options,
            clone(original),
            splits,
            generator=generator(seed, "localization"),
            base=None if base is None else {name: part.clone() for name, part in base.items()},
            granularity=granularity,
        )


@dataclass(frozen=True)
class Finished:
    """What a run computed: its model (None where it was left behind), outputs, per-epoch series, measurements, mask
    layers, and method seconds."""

    model: nn.Module | None
    outputs: Outputs
    series: Mapping[str, list[float]]
    measurements: Mapping[str, float]
    layers: tuple[Layer, ...]
    seconds: float


class BrokenWorkerError(RuntimeError):
    """A device failed in such a way that nothing can be computed on it by this process any more."""


def is_of_a_broken_device(error: BaseException) -> bool:
    """Whether an error leaves its process without a usable device; running out of its memory does not."""
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


class RunStoppedError(BaseException):
    """A run was stopped by who hears of its epochs; no failure, so nothing that catches failures catches it."""


REFERENCE = "retrain"  # the method whose runs are references
SERIES = ("loss",)  # what a method that reports has of each epoch, by name


def run(
    lab: Lab,
    model: Choice,
    training: Training,
    method: Choice,
    *,
    forget: np.ndarray,
    splits: Splits,
    original: nn.Module | None,
    original_seed: int | None,
    mask: Mask | None,
    seed: int,
    memorization: np.ndarray | None = None,
    stages: Sequence[PlainStage] = (),
    heard: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Finished:
    """Unlearn (or retrain), predict on every split, and measure. The method is given a copy of the original.

    `forget` are training indices int64, by which `splits` is cut; `memorization` is float64, one value for each of
    them; `stages` are those of a composed method; `heard` is told the number of each epoch, from 1, and its SERIES.
    """
    losses: list[float] = []
    counts: list[int] = []

    def report(epoch: int, num_steps: int, loss: float) -> None:
        losses.append(loss)
        counts.append(num_steps)
        if heard is not None:
            heard(len(losses), {"loss": loss})

    entry = METHODS[method.name]
    seen = splits.augmented(training.augment)
    available: dict[str, Any] = {
        "model": None if original is None else clone(original),
        "mask": mask,
        "forget": seen.forget,
        "retain": seen.retain,
        "validation": lab.examples("validation") if "validation" in entry.inputs else None,
        "fresh": lab.fresh(model),
        "initial": lambda: lab.fresh(model)(generator(original_seed or 0, "original")),
        "generator": generator(seed, "reference" if method.name == REFERENCE else "unlearning"),
        "training": training,
        "report": report,
        "num_classes": lab.dataset.num_classes,
        "memorization": None if memorization is None else memorization.copy(),
    }
    available["stages"] = [
        performer(stage, place, seed, available, lab.examples("train")) for place, stage in enumerate(stages)
    ]
    start = time.perf_counter()
    with unchanged(f"method {method.name}", splits.forget, splits.retain, available["validation"]):
        unlearned = entry(available, entry.resolve(method.options))
    seconds = time.perf_counter() - start
    if not isinstance(unlearned, nn.Module):
        raise TypeError(f"method {method.name} returned {type(unlearned).__name__}, not the unlearned model")
    measurements: dict[str, float] = {}
    if entry.inputs & {"report", "stages"}:
        retraining = training.epochs * max(1, len(splits.retain) // training.batch_size)
        measurements |= {"steps": sum(counts), "steps_ratio": sum(counts) / retraining}
    if mask is not None:
        measurements |= {
            "entries": mask.num_entries,
            "reset": mask.num_reset,
            "trainable": mask.num_trainable,
            "realised_budget": mask.num_reset / mask.num_entries,
            "effective_budget": mask.num_trainable / mask.num_entries,
            "reset_channels": _channels(mask.reset),
            "trainable_channels": _channels(mask.trainable),
        }
    moved: dict[str, Tensor] = {}
    if original is not None:
        moved = _moved(original, unlearned)
        measurements |= {
            "moved": sum(int(part.sum()) for part in moved.values()),
            "moved_channels": _channels(moved),
            "distance": _distance(original, unlearned),
        }
    outputs = _outputs(lab, unlearned, forget)
    return Finished(unlearned, outputs, {"loss": losses} if losses else {}, measurements, _layers(mask, moved), seconds)


def _moved(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Which entries differ, by parameter."""
    old = dict(before.named_parameters())
    return {name: (parameter != old[name]).cpu() for name, parameter in after.named_parameters()}


def _distance(before: nn.Module, after: nn.Module) -> float:
    """Euclidean distance between the parameters of two models."""
    old = dict(before.named_parameters())
    return math.sqrt(
        sum(float(((p.detach() - old[name].detach()).double() ** 2).sum()) for name, p in after.named_parameters())
    )


def _channels(parts: Mapping[str, Tensor]) -> int:
    """How many output channels (rows of tensors with two axes or more) hold a marked entry."""
    return sum(int(part.flatten(1).any(1).sum()) for part in parts.values() if part.ndim > 1)


def _outputs(lab: Lab, model: nn.Module, forget: np.ndarray) -> dict[str, SplitOutputs]:
    dataset = lab.dataset
    whole = {
        split: SplitOutputs(
            half(predict(model, lab.examples(split))),
            dataset.split_labels(split),
            dataset.split_true_labels(split),
        )
        for split in ("train", "validation", "test")
        if len(dataset.splits[split])
    }
    train = whole.pop("train")
    return {
        "forget": train.take(forget),
        "retain": train.take(np.setdiff1d(np.arange(len(train.labels)), forget)),
        **whole,
    }


def _layers(mask: Mask | None, moved: Mapping[str, Tensor]) -> tuple[Layer, ...]:
    if mask is None:
        return ()
    return tuple(
        Layer(name, part.numel(), int(part.sum()), int(mask.trainable[name].sum()), int(moved[name].sum()))
        for name, part in mask.reset.items()
    )


def finite(logits: np.ndarray) -> np.ndarray:
    """The logits; FloatingPointError where one is NaN, which as a prediction would be class 0."""
    bad = np.count_nonzero(~np.isfinite(logits).all(axis=1))
    if bad:
        raise FloatingPointError(f"the model predicts NaN for {bad} of {len(logits)} examples; its training diverged")
    return logits


def half(logits: np.ndarray) -> np.ndarray:
    """Logits as float16, clipped to its finite range."""
    limit = float(np.finfo(np.float16).max)
    halved: np.ndarray = np.clip(logits, -limit, limit).astype(np.float16)
    return halved


@contextmanager
def steady(device: str = "cpu") -> Iterator[None]:
    """What torch is set to inside, whatever was left behind, and as before after it: gradients on, float32.

    On the CPU one thread: several sum in another order, and would give other numbers.
    """
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    if device == "cpu":
        torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.random.fork_rng([]):  # the first turns gradients on, too
            torch.default_generator.manual_seed(0)  # whatever draws from it draws the same on every worker
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
        torch.use_deterministic_algorithms(before[2])
