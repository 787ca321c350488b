"""The pure pipeline: a spec and its inputs in, a model, a block, scores or a run's outputs and row out.

Workspace wraps it for a worker: it fetches inputs from the store, and puts what comes out before it says so.
"""

from __future__ import annotations

import math
import socket
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from orchestrator import results
from orchestrator.data import Dataset, Examples, Outputs, SplitOutputs, Splits
from orchestrator.localization import Ranking, Scores, localize, rank
from orchestrator.memorization import BLOCK_SIZE, block_membership
from orchestrator.metrics import METRICS
from orchestrator.models import Factory, factory, head_names
from orchestrator.registry import InputError, Plugin, load_plugin
from orchestrator.seeds import generator, numpy_generator
from orchestrator.specs import (
    CampaignSpec,
    ForgetSpec,
    LocalizationSpec,
    OriginalSpec,
    RunSpec,
    ScoresSpec,
    Setting,
    key,
)
from orchestrator.store import Store
from orchestrator.training import Mask, clone, fit, predict

T = TypeVar("T")


@dataclass(frozen=True)
class Lab:
    """A data set on a device, with what is cut from it kept: training, test and forget examples."""

    dataset: Dataset
    device: str = "cpu"
    _kept: dict[str, Examples] = field(default_factory=dict)

    def examples(self, split: str) -> Examples:
        if split not in self._kept:
            self._kept[split] = self.dataset.examples(split).to(self.device)
        return self._kept[split]

    def fresh(self, setting: Setting) -> Factory:
        make = factory(setting.model.name, setting.model.options, self.dataset.image_shape, self.dataset.num_classes)
        return lambda stream: make(stream).to(self.device)

    @property
    def numerics(self) -> str:
        """What equality of results is conditional on: device, CPU capability, torch version, compile mode."""
        name = torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu"
        return f"{name} {torch.backends.cpu.get_cpu_capability()} torch-{torch.__version__} eager"


def train_original(lab: Lab, spec: OriginalSpec) -> nn.Module:
    """Train a model on the whole training set."""
    stream = generator(spec.seed, "original")
    model = lab.fresh(spec.setting)(stream)
    return fit(model, lab.examples("train"), training=spec.setting.training.build(), generator=stream)


def train_block(lab: Lab, spec: CampaignSpec, block: int) -> dict[str, np.ndarray]:
    """Train the ten subset models of a block.

    Returns membership bool [10, n], train and test logits float16 [10, n, classes], and per model the accuracy on
    its subset, on test, and its seconds (float64 [10] each). Every model takes the same number of full batches.
    """
    train, test = lab.examples("train"), lab.examples("test")
    membership = block_membership(lab.dataset.split_labels("train"), spec.fraction, spec.seed, block)
    training = spec.setting.training.build()
    num_batches = max(1, int(np.floor(len(train) * spec.fraction)) // training.batch_size)
    arrays: dict[str, list[Any]] = {name: [] for name in ("train", "test", "in_accuracy", "test_accuracy", "seconds")}
    for index, members in enumerate(membership):
        start = time.perf_counter()
        stream = generator(spec.seed, "subset model", block, index)
        model = lab.fresh(spec.setting)(stream)
        subset = train.take(np.flatnonzero(members))
        fit(model, subset, training=training, generator=stream, num_batches=num_batches)
        logits, test_logits = results.half(predict(model, train)), results.half(predict(model, test))
        right = logits.argmax(axis=1) == train.labels.cpu().numpy()
        arrays["train"].append(logits)
        arrays["test"].append(test_logits)
        arrays["in_accuracy"].append(right[members].mean())
        arrays["test_accuracy"].append((test_logits.argmax(axis=1) == test.labels.cpu().numpy()).mean())
        arrays["seconds"].append(time.perf_counter() - start)
    return {"membership": membership, **{name: np.stack(parts) for name, parts in arrays.items()}}


def forget_indices(dataset: Dataset, spec: ForgetSpec, scores: np.ndarray | None, store: Store) -> np.ndarray:
    """Draw a forget set: sorted indices into the training set."""
    available = {
        "labels": dataset.split_labels("train"),
        "true_labels": dataset.split_true_labels("train"),
        "class_names": dataset.class_names,
        "memorization": scores,
        "rng": numpy_generator(spec.draw, "forget set", spec.rule.name),
        "files": store.get,
    }
    indices: np.ndarray = spec.rule.entry(available, spec.rule.options)
    return indices


def split_examples(lab: Lab, forget: np.ndarray) -> Splits:
    """The training set, and its parts to forget and to retain."""
    train = lab.examples("train")
    retained = np.setdiff1d(np.arange(len(train)), forget)
    return Splits(train, train.take(forget), train.take(retained))


class ChangedExamplesError(RuntimeError):
    """A function changed the examples that it was given: what others of this process hold is not to be used."""


@contextmanager
def unchanged(who: str, *given: Examples | None) -> Iterator[None]:
    """Raise ChangedExamplesError where the examples are changed in place inside."""

    def versions() -> list[int]:
        return [part._version for examples in given if examples for part in (examples.images, examples.labels)]

    before = versions()
    yield
    if versions() != before:
        raise ChangedExamplesError(
            f"{who} changed the examples that it was given, in place; it may change copies (`labels.clone()`)"
        )


def localize_run(spec: LocalizationSpec, original: nn.Module, splits: Splits, base: Scores | None) -> Scores:
    """Score every parameter entry of an original by a strategy, which is given a copy of it."""
    with unchanged(f"strategy {spec.strategy.name}", splits.train, splits.forget, splits.retain):
        return localize(
            spec.strategy.name,
            spec.strategy.options,
            clone(original),
            splits,
            generator=generator(spec.seed or 0, "localization"),
            base=base,
            granularity=spec.granularity,
        )


@dataclass(frozen=True)
class Finished:
    """What a run computed: its model, outputs, per-epoch series, measurements, mask layers, and method seconds."""

    model: nn.Module
    outputs: Outputs
    series: Mapping[str, list[float]]
    measurements: Mapping[str, float]
    layers: tuple[results.Layer, ...]
    seconds: float


def run(
    lab: Lab, spec: RunSpec, forget: np.ndarray, splits: Splits, original: nn.Module | None, ranking: Ranking | None
) -> Finished:
    """Unlearn (or retrain), predict on every split, and measure. The method is given a copy of the original."""
    mask = None
    if spec.mask is not None and ranking is not None and original is not None:
        mask = ranking.mask(
            spec.mask.budget,
            head=head_names(original),
            train_head=spec.mask.train_head,
            freeze_statistics=spec.mask.freeze_statistics,
        )
    losses: list[float] = []
    steps: list[int] = []

    def report(epoch: int, num_steps: int, loss: float) -> None:
        losses.append(loss)
        steps.append(num_steps)

    training = spec.setting.training.build()
    available: dict[str, Any] = {
        "model": None if original is None else clone(original),
        "mask": mask,
        "forget": splits.forget,
        "retain": splits.retain,
        "validation": lab.examples("validation") if "validation" in spec.method.entry.inputs else None,
        "fresh": lab.fresh(spec.setting),
        "initial": lambda: lab.fresh(spec.setting)(generator(spec.original_seed or 0, "original")),
        "generator": generator(spec.seed, "reference" if spec.is_reference else "unlearning"),
        "training": training,
        "report": report,
        "num_classes": lab.dataset.num_classes,
    }
    start = time.perf_counter()
    with unchanged(f"method {spec.method.name}", splits.forget, splits.retain, available["validation"]):
        model = spec.method.entry(available, spec.method.options)
    seconds = time.perf_counter() - start
    if not isinstance(model, nn.Module):
        raise TypeError(f"method {spec.method.name} returned {type(model).__name__}, not the unlearned model")
    measurements: dict[str, float] = {}
    if "report" in spec.method.entry.inputs:
        retraining = training.epochs * max(1, len(splits.retain) // training.batch_size)
        measurements |= {"steps": sum(steps), "steps_ratio": sum(steps) / retraining}
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
        moved = _moved(original, model)
        measurements |= {
            "moved": sum(int(part.sum()) for part in moved.values()),
            "moved_channels": _channels(moved),
            "distance": _distance(original, model),
        }
    outputs = _outputs(lab, model, forget)
    return Finished(model, outputs, {"loss": losses} if losses else {}, measurements, _layers(mask, moved), seconds)


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
            results.half(predict(model, lab.examples(split))),
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


def _layers(mask: Mask | None, moved: Mapping[str, Tensor]) -> tuple[results.Layer, ...]:
    if mask is None:
        return ()
    return tuple(
        results.Layer(name, part.numel(), int(part.sum()), int(mask.trainable[name].sum()), int(moved[name].sum()))
        for name, part in mask.reset.items()
    )


# ---- tasks ---------------------------------------------------------------------------------------------------------

Kind = Literal["block", "original", "localization", "run"]


@dataclass(frozen=True)
class Task:
    """A unit of work: one block of subset models, one original, one localization, or one run."""

    kind: Kind
    spec: CampaignSpec | OriginalSpec | LocalizationSpec | RunSpec
    block: int = 0

    @property
    def label(self) -> str:
        """What the task is, in a few words."""
        if isinstance(self.spec, RunSpec):
            return f"{self.spec.method.name} on {self.spec.forget.rule.name}, seed {self.spec.seed}"
        if isinstance(self.spec, LocalizationSpec):
            return f"{self.spec.strategy.name} on {self.spec.forget.rule.name}"
        return f"block {self.block}" if self.kind == "block" else f"seed {self.spec.seed}"

    @property
    def object_name(self) -> str:
        """The stored object that says the task is done."""
        name = key(self.spec)
        return {
            "block": f"campaigns/{name}/blocks/{self.block}.safetensors",
            "original": f"models/{name}.safetensors",
            "localization": f"localizations/{name}.safetensors",
            "run": f"rows/{name}.json",
        }[self.kind]


@dataclass(frozen=True)
class Outcome:
    """What became of a task: seconds in training and prediction, wall and CPU seconds in all, its error."""

    kind: Kind
    key: str
    models: int
    training_seconds: float
    seconds: float
    cpu_seconds: float
    began: float  # seconds since 1970
    error: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Context:
    """What a worker needs to know; the data set travels beside it."""

    store: Store
    plugins: tuple[Plugin, ...] = ()
    data: str = ""
    git_commit: str | None = None


class Workspace:
    """Performs tasks on one worker. Keeps the inputs that many runs share; a run never trains a dependency."""

    def __init__(self, dataset: Dataset, context: Context, device: str = "cpu") -> None:
        for plugin in context.plugins:
            load_plugin(plugin)
        self.lab = Lab(dataset, device)
        self.store = context.store
        self.context = context
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._training_seconds = 0.0

    def perform(self, task: Task) -> Outcome:
        """Compute a task and put the result into the store; a failure becomes an attempt there and an Outcome."""
        began, wall, cpu, self._training_seconds = time.time(), time.perf_counter(), time.process_time(), 0.0
        work: Callable[[Task], int] = getattr(self, f"_{task.kind}")
        models, error = 0, None
        with single_thread():
            try:
                models = work(task)
            except (Exception, SystemExit) as failure:  # one failed task is a result: the others go on
                error = str(failure) if isinstance(failure, InputError) else f"{type(failure).__name__}: {failure}"
                if isinstance(failure, ChangedExamplesError):
                    self._forget_all()
                put_failure(self.store, task, error, traceback.format_exc())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Outcome(task.kind, key(task.spec), models, self._training_seconds, wall, cpu, began, error, task.label)

    def _forget_all(self) -> None:
        """Drop what was cut from the data set and loaded from the store; it is cut and loaded anew."""
        self._kept.clear()
        self.lab._kept.clear()

    def _kept_or(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._kept:
            self._kept[name] = make()
            if len(self._kept) > 32:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        kept: T = self._kept[name]
        return kept

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._training_seconds += time.perf_counter() - start

    def _block(self, task: Task) -> int:
        assert isinstance(task.spec, CampaignSpec)
        with self._timed():
            arrays = train_block(self.lab, task.spec, task.block)
        metadata = {"host": socket.gethostname(), "numerics": self.lab.numerics}
        self.store.put(task.object_name, results.pack(arrays, metadata))
        return BLOCK_SIZE

    def _original(self, task: Task) -> int:
        assert isinstance(task.spec, OriginalSpec)
        with self._timed():
            model = train_original(self.lab, task.spec)
        self._put_tensors(task.object_name, model.state_dict())
        return 1

    def _localization(self, task: Task) -> int:
        assert isinstance(task.spec, LocalizationSpec)
        _, splits = self.forget(task.spec.forget)
        base = self._base_scores(task.spec, splits)
        original = self.original(task.spec.original)
        start = time.perf_counter()
        with self._timed():
            scores = localize_run(task.spec, original, splits, base)
        self._put_tensors(task.object_name, scores, {"seconds": f"{time.perf_counter() - start:.6f}"})
        return 0

    def _base_scores(self, spec: LocalizationSpec, splits: Splits) -> Scores | None:
        if spec.base is None:
            return None
        inputs = spec.base.entry.inputs
        base = LocalizationSpec(
            original=spec.original,
            forget=spec.forget,
            strategy=spec.base,
            seed=spec.seed if "generator" in inputs else None,
            granularity=spec.granularity if "granularity" in inputs else None,
        )
        if self.store.exists(Task("localization", base).object_name):
            return self.localization(base)
        return localize_run(base, self.original(spec.original), splits, None)

    def _run(self, task: Task) -> int:
        spec = task.spec
        assert isinstance(spec, RunSpec)
        indices, splits = self.forget(spec.forget)
        original = self.original(spec.original) if spec.original else None
        ranking = self._ranking(spec)
        with self._timed():
            finished = run(self.lab, spec, indices, splits, original, ranking)
        name = key(spec)
        if spec.is_reference:
            self._put_tensors(f"models/{name}.safetensors", finished.model.state_dict())
        results.put_outputs(self.store, name, finished.outputs)
        results.put_row(self.store, self._row(name, spec, finished))
        return 1

    def _row(self, name: str, spec: RunSpec, finished: Finished) -> results.Row:
        values = {metric: METRICS[metric]({"outputs": finished.outputs}, {}) for metric in METRICS}
        return results.Row(
            key=name,
            spec=spec.model_dump(mode="json"),
            metrics=values,
            metric_versions={metric: METRICS[metric].version for metric in METRICS},
            series=finished.series,
            measurements=finished.measurements,
            layers=finished.layers,
            provenance={
                "data": self.context.data,
                "model": spec.setting.model.label,
                "seconds": finished.seconds,
                "localization_seconds": self._localization_seconds(spec),
                "host": socket.gethostname(),
                "numerics": self.lab.numerics,
                "git_commit": self.context.git_commit,
                "finished_at": time.time(),
            },
        )

    def _localization_seconds(self, spec: RunSpec) -> float | None:
        """What the scores cost, once for all budgets and methods that share them."""
        if spec.localization is None:
            return None
        name = Task("localization", spec.localization).object_name
        said = self._kept_or(f"header of {name}", lambda: results.metadata_of(self.store, name))
        return float(said["seconds"]) if "seconds" in said else None

    def forget(self, spec: ForgetSpec) -> tuple[np.ndarray, Splits]:
        """A forget set's indices, and the training set cut by them."""

        def make() -> tuple[np.ndarray, Splits]:
            scores = None if spec.scores is None else memorization_scores(self.store, spec.scores)
            indices = forget_indices(self.lab.dataset, spec, scores, self.store)
            return indices, split_examples(self.lab, indices)

        return self._kept_or(key(spec), make)

    def original(self, spec: OriginalSpec) -> nn.Module:
        """A stored original; methods copy it, nobody changes it."""

        def make() -> nn.Module:
            model = self.lab.fresh(spec.setting)(generator(spec.seed, "original"))
            model.load_state_dict(self._tensors(Task("original", spec).object_name))
            return model

        return self._kept_or(key(spec), make)

    def localization(self, spec: LocalizationSpec) -> Scores:
        """Stored localization scores, in the order of the model's parameters."""

        def make() -> Scores:
            tensors = self._tensors(Task("localization", spec).object_name)
            return {name: tensors[name] for name, _ in self.original(spec.original).named_parameters()}

        return self._kept_or(key(spec), make)

    def _ranking(self, spec: RunSpec) -> Ranking | None:
        """The order in which a run's mask is selected: one sort for all budgets."""
        localization, mask = spec.localization, spec.mask
        if localization is None or mask is None:
            return None
        name = f"{key(localization)} {mask.granularity} {mask.h!r}"
        return self._kept_or(name, lambda: rank(self.localization(localization), mask.granularity, mask.h))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        # through numpy: one reader, and one sentence for a damaged object
        return {part: torch.tensor(array) for part, array in results.unpack(self.store, name).items()}

    def _put_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        plain = {part: tensor.detach().cpu().contiguous() for part, tensor in tensors.items()}
        self.store.put(name, safetensors.torch.save(plain, dict(metadata) if metadata else None))


def put_failure(store: Store, task: Task, error: str, trace: str = "") -> None:
    """Keep a try at a task that came to nothing, as an attempt."""
    provenance = {"host": socket.gethostname(), "time": time.time(), "kind": task.kind, "traceback": trace}
    spec = task.spec.model_dump(mode="json")
    results.put_attempt(store, results.Attempt(key(task.spec), spec, "failed", error, provenance))


@contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread inside: several threads sum in another order, and would give other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memorization_scores(store: Store, spec: ScoresSpec) -> np.ndarray:
    """Stored memorization scores of the training examples, float64 [n]."""
    scores: np.ndarray = results.get_table(store, f"scores/{key(spec)}.parquet").column("score").to_numpy()
    return scores
