"""Specs performed on a worker: a Workspace fetches inputs from the store, and puts what comes out before it says so."""

from __future__ import annotations

import json
import secrets
import socket
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor, nn

from orchestrator import exact, pipeline, results
from orchestrator.arrays import checksums, metadata_of, pack, unpack
from orchestrator.blocks import put_together
from orchestrator.costs import Outcome
from orchestrator.data import Dataset, Splits
from orchestrator.localization import Scores, rank
from orchestrator.memorization import block_membership
from orchestrator.models import head_names
from orchestrator.pipeline import (
    BrokenWorkerError,
    Finished,
    Lab,
    is_of_a_broken_device,
    split_examples,
    steady,
)
from orchestrator.progress import Heard, Progress, but_last
from orchestrator.registry import InputError, Plugin, canonical_json, load_plugin
from orchestrator.rows import make_row
from orchestrator.seeds import generator, numpy_generator
from orchestrator.specs import (
    CampaignSpec,
    ForgetSpec,
    LocalizationSpec,
    OriginalSpec,
    ProxiesSpec,
    RunSpec,
    ScoresSpec,
    SingleSpec,
    StageSpec,
    StandInSpec,
    key,
)
from orchestrator.stages import PlainStage, StageMask
from orchestrator.store import StorageError, Store
from orchestrator.tasks import Task, put_failure, scores_object
from orchestrator.training import Mask

T = TypeVar("T")


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


@dataclass(frozen=True)
class Context:
    """What a worker needs to know; the data set travels beside it."""

    store: Store
    plugins: tuple[Plugin, ...] = ()
    data: str = ""
    git_commit: str | None = None
    compiled: bool = False  # subset models; see pipeline.Lab
    host: str = field(default_factory=socket.gethostname)  # the driver's
    marker: str = ""  # which the driver keeps in the store while workers may be elsewhere


class Workspace:
    """Performs tasks on one worker. Keeps the inputs that many runs share; a run never trains a dependency."""

    def __init__(self, dataset: Dataset, context: Context, device: str = "cpu") -> None:
        for plugin in context.plugins:
            load_plugin(plugin)
        self.lab = Lab(dataset, device, context.compiled)
        self.store = context.store
        self.context = context
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._training_seconds = 0.0
        self._heard: Heard | None = None
        self._host, self._name = socket.gethostname(), secrets.token_hex(4)  # a pid may be another's in a container
        if context.marker and self._host != context.host and not self.store.exists(context.marker):
            raise InputError(
                f"storage root {self.store.root!r} on {self._host} is not that of the driver on {context.host}; "
                "give --storage a folder that all nodes share, at the same path, or s3://bucket/prefix"
            )

    def perform(self, task: Task, report: Callable[[Progress], None] | None = None) -> Outcome:
        """Compute a task and store the result; a failure becomes an attempt and an Outcome, StorageError ends all.

        What is in the store by now is not computed again: another driver was faster, or a worker was lost, with its
        node, after the result was kept and before anybody heard of it.
        BrokenWorkerError asks for another process, whose tries are counted as if this one had died. `report` hears of
        each epoch of a run but the last, of which the row says all there is; it may raise RunStoppedError.
        """
        began, wall, cpu, self._training_seconds = time.time(), time.perf_counter(), time.process_time(), 0.0

        def outcome(models: int = 0, error: str | None = None, training: float | None = None) -> Outcome:
            seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
            training = self._training_seconds if training is None else training
            who = (task.label, self._host, self._name)
            return Outcome(task.kind, key(task.spec), models, training, seconds, cpu_seconds, began, error, *who)

        def heard(epoch: int, series: Mapping[str, float]) -> None:
            if report is not None:
                report(Progress(epoch, series, outcome(training=time.perf_counter() - wall)))

        self._heard = None if report is None else but_last(heard, task.spec)
        work: Callable[[Task], int] = getattr(self, f"_{task.kind}")
        models, error = 0, None
        with steady(self.lab.device):
            try:
                is_there = task.kind != "model" and all(map(self.store.exists, task.objects))  # which looks by itself
                models = 0 if is_there else work(task)
            except StorageError:
                raise
            except (Exception, SystemExit) as failure:  # one failed task is a result: the others go on
                if is_of_a_broken_device(failure):
                    raise BrokenWorkerError(f"{type(failure).__name__}: {failure}") from failure
                error = str(failure) if isinstance(failure, InputError) else f"{type(failure).__name__}: {failure}"
                self._kept.clear()  # what failed may have left changed is cut and loaded anew
                self.lab.forget()
                put_failure(self.store, task, error, traceback.format_exc())
        return outcome(models, error)

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

    def _model(self, task: Task) -> int:
        assert isinstance(task.spec, CampaignSpec)
        whole, trained = Task("block", task.spec, task.block).object_name, 0
        if not self.store.exists(whole) and not self.store.exists(task.object_name):
            spec, setting = task.spec, task.spec.setting
            purpose = ("subset model", task.block, task.member)
            with self._timed():
                arrays = pipeline.train_subset_model(
                    self.lab,
                    setting.model,
                    setting.training.build(),
                    self._membership(spec, task.block)[task.member],
                    fraction=spec.fraction,
                    stream=generator(spec.seed, *purpose),
                )
            stream = canonical_json([spec.seed, *purpose])
            metadata = {"host": socket.gethostname(), "numerics": self.lab.subset_numerics, "stream": stream}
            self.store.put(task.object_name, pack(arrays, metadata))
            trained = 1
        if self.store.exists(whole):  # another driver on this store was faster
            self.store.delete(task.object_name)
        else:
            put_together(self.store, key(task.spec), task.block, self._membership(task.spec, task.block))
        return trained

    def _membership(self, spec: CampaignSpec, block: int) -> np.ndarray:
        labels = self.lab.dataset.split_labels("train")
        return self._kept_or(
            f"{key(spec)} block {block}", lambda: block_membership(labels, spec.fraction, spec.seed, block)
        )

    def _single(self, task: Task) -> int:
        assert isinstance(task.spec, SingleSpec)
        with self._timed():
            exact.train(self.lab, self.store, task.spec)
        return 1

    def _original(self, task: Task) -> int:
        assert isinstance(task.spec, OriginalSpec)
        with self._timed():
            setting = task.spec.setting
            model = pipeline.train_original(self.lab, setting.model, setting.training.build(), task.spec.seed)
        self._put_tensors(task.object_name, model.state_dict())
        return 1

    def _proxies(self, task: Task) -> int:
        assert isinstance(task.spec, ProxiesSpec)
        original = task.spec.original
        missing = [each for each in task.spec.each if not self.store.exists(scores_object(each))]
        with self._timed():
            values, seconds = pipeline.proxies(
                self.lab,
                [each.proxy for each in missing],
                original.setting.model,
                original.setting.training.build(),
                original.seed,
            )
        facts = {"setting": key(original.setting), "seconds": json.dumps(seconds), "numerics": self.lab.numerics}
        for each in missing:
            table = pa.table({each.proxy.name: values[each.proxy.name]})
            results.put_table(self.store, scores_object(each), table, facts)
        return 1

    def _localization(self, task: Task) -> int:
        assert isinstance(task.spec, LocalizationSpec)
        _, splits = self.forget(task.spec.forget)
        base = self._base_scores(task.spec, splits)
        original = self.original(task.spec.original)
        start = time.perf_counter()
        with self._timed():
            scores = self._score(task.spec, original, splits, base)
        self._put_tensors(task.object_name, scores, {"seconds": f"{time.perf_counter() - start:.6f}"})
        return 0

    def _base_scores(self, spec: LocalizationSpec, splits: Splits) -> Scores | None:
        base = spec.base_spec
        if base is None:
            return None
        if self.store.exists(Task("localization", base).object_name):
            return self.localization(base)
        return self._score(base, self.original(spec.original), splits, None)

    @staticmethod
    def _score(spec: LocalizationSpec, original: nn.Module, splits: Splits, base: Scores | None) -> Scores:
        return pipeline.score(
            spec.strategy, original, splits, seed=spec.seed or 0, granularity=spec.granularity, base=base
        )

    def _run(self, task: Task) -> int:
        spec = task.spec
        assert isinstance(spec, RunSpec)
        indices, splits = self.forget(spec.forget)
        original = self.original(spec.original) if spec.original else None
        mask = self._mask(spec)
        memorization = None
        if spec.memorization is not None:
            memorization = self._memorization(spec.memorization)[indices]
        with self._timed():
            finished = pipeline.run(
                self.lab,
                spec.setting.model,
                spec.setting.training.build(),
                spec.method,
                forget=indices,
                splits=splits,
                original=original,
                original_seed=spec.original_seed,
                mask=mask,
                seed=spec.seed,
                memorization=memorization,
                stages=[plain_stage(stage) for stage in spec.stages],
                heard=self._heard,
            )
        name = key(spec)
        if spec.is_reference and finished.model is not None:
            self._put_tensors(f"models/{name}.safetensors", finished.model.state_dict())
        results.put_outputs(self.store, name, finished.outputs)
        results.put_row(self.store, self._row(name, spec, finished))
        return 1

    def _row(self, name: str, spec: RunSpec, finished: Finished) -> results.Row:
        provenance = {
            "data": self.context.data,
            "model": spec.setting.model.label,
            "seconds": finished.seconds,
            "localization_seconds": self._localization_seconds(spec),
            "host": socket.gethostname(),
            "numerics": self.lab.numerics,
            "git_commit": self.context.git_commit,
            "finished_at": time.time(),
        }
        return make_row(name, spec, finished, provenance)

    def _localization_seconds(self, spec: RunSpec) -> float | None:
        """What the scores cost, once for all budgets and methods that share them."""
        if spec.localization is None:
            return None
        name = Task("localization", spec.localization).object_name
        said = self._kept_or(f"header of {name}", lambda: metadata_of(self.store, name))
        return float(said["seconds"]) if "seconds" in said else None

    def forget(self, spec: ForgetSpec) -> tuple[np.ndarray, Splits]:
        """A forget set's indices, and the training set cut by them."""

        def make() -> tuple[np.ndarray, Splits]:
            scores = None if spec.scores is None else memorization_scores(self.store, spec.scores)
            indices = forget_indices(self.lab.dataset, spec, scores, self.store)
            return indices, split_examples(self.lab, indices)

        return self._kept_or(key(spec), make)

    def _memorization(self, spec: ScoresSpec | StandInSpec) -> np.ndarray:
        return self._kept_or(f"values of {key(spec)}", lambda: memorization_scores(self.store, spec))

    def original(self, spec: OriginalSpec) -> nn.Module:
        """A stored original; methods copy it, nobody changes it."""

        def make() -> nn.Module:
            model = self.lab.fresh(spec.setting.model)(generator(spec.seed, "original"))
            model.load_state_dict(self._tensors(Task("original", spec).object_name))
            return model

        return self._kept_or(key(spec), make)

    def localization(self, spec: LocalizationSpec) -> Scores:
        """Stored localization scores, in the order of the model's parameters."""

        def make() -> Scores:
            tensors = self._tensors(Task("localization", spec).object_name)
            return {name: tensors[name] for name, _ in self.original(spec.original).named_parameters()}

        return self._kept_or(key(spec), make)

    def _mask(self, spec: RunSpec) -> Mask | None:
        """A run's mask; one sort serves all budgets."""
        localization, mask = spec.localization, spec.mask
        if localization is None or mask is None:
            return None
        name = f"{key(localization)} {mask.granularity} {mask.h!r}"
        ranking = self._kept_or(name, lambda: rank(self.localization(localization), mask.granularity, mask.h))
        return ranking.mask(
            mask.budget,
            head=head_names(self.original(localization.original)),
            train_head=mask.train_head,
            freeze_statistics=mask.freeze_statistics,
        )

    def _tensors(self, name: str) -> dict[str, Tensor]:
        # through numpy: one reader, and one sentence for a damaged object
        return {part: torch.tensor(array) for part, array in unpack(self.store, name).items()}

    def _put_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        plain = {part: tensor.detach().cpu().contiguous() for part, tensor in tensors.items()}
        sums = checksums({part: tensor.numpy() for part, tensor in plain.items()})
        self.store.put(name, safetensors.torch.save(plain, {**(metadata or {}), **sums}))


def plain_stage(stage: StageSpec) -> PlainStage:
    """A stage in plain values."""
    return PlainStage(stage.method, None if stage.mask is None else StageMask(**dict(stage.mask)))


def memorization_scores(store: Store, spec: ScoresSpec | StandInSpec) -> np.ndarray:
    """Stored memorization scores of the training examples, or a stand-in's values, float64 [n]."""
    column = spec.proxy.name if isinstance(spec, StandInSpec) else "score"
    scores: np.ndarray = results.get_table(store, scores_object(spec)).column(column).to_numpy()
    return scores
