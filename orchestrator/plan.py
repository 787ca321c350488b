"""Specs and store -> tasks that are missing, what is cached, scores from blocks. Knows no Ray."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator import results
from orchestrator.data import Dataset
from orchestrator.experiment import Task, scores_object
from orchestrator.localization import num_selected
from orchestrator.memorization import (
    BLOCK_SIZE,
    Counts,
    Tallied,
    count,
    estimate,
    moments,
    split_half_correlation,
    top_overlap,
)
from orchestrator.models import factory
from orchestrator.proxies import PROXIES, log_probabilities
from orchestrator.registry import File, Fits, InputError
from orchestrator.results import Member, Sweep
from orchestrator.seeds import generator
from orchestrator.specs import (
    CampaignSpec,
    Estimator,
    ForgetSet,
    LocalizationSpec,
    ProxiesSpec,
    Proxy,
    RunSpec,
    ScoresSpec,
    StandInSpec,
    key,
)
from orchestrator.store import Store
from orchestrator.study import CAMPAIGN, Study
from orchestrator.unlearning import METHODS

NUM_PICTURES = 25  # images of the most memorized examples kept with the scores, for the report

PINNED = "files/"  # where users' files are kept in a store

_SCHEMAS = {name: results.TABLES[name].remove(0) for name in ("memorization", "examples")}


@dataclass(frozen=True)
class Plan:
    """The tasks of a study over one data set, in waves, and which objects the store already holds."""

    study: Study
    fingerprint: str
    present: frozenset[str]

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        return [task for task in tasks if any(name not in self.present for name in task.objects)]

    def against(self, store: Store) -> Plan:
        """The same, against what the store holds now."""
        return replace(self, present=_present(store))

    def ready(self, tasks: Iterable[Task]) -> list[Task]:
        """The tasks whose inputs are there: original, localization, memorization scores, where they need them."""
        return [task for task in tasks if all(name in self.present for name in _inputs(task))]

    def stand_ins(self) -> list[Task]:
        """The proxies that forget sets and methods go by in place of a campaign's scores, from one training run."""
        names = [name for name in self.study.scores_used if name != CAMPAIGN]
        specs = [self.study.memorization_spec(self.fingerprint, name) for name in names]
        found = [spec for spec in specs if isinstance(spec, StandInSpec)]
        if not found:
            return []
        return [Task("proxies", ProxiesSpec(original=found[0].original, proxies=tuple(s.proxy for s in found)))]

    @property
    def needs_scores(self) -> bool:
        """Whether a forget set or a method goes by the campaign's scores."""
        return CAMPAIGN in self.study.scores_used

    def rankings(self) -> list[Task]:
        """What forget sets and methods by memorization need: a campaign's blocks, and stand-ins."""
        return [*(self.blocks() if self.needs_scores else []), *self.stand_ins()]

    def blocks(self) -> list[Task]:
        spec = self.study.campaign_spec(self.fingerprint)
        return [Task("block", spec, block) for block in range(self.study.campaign.blocks)]

    def models(self, blocks: Iterable[Task]) -> list[Task]:
        """The subset models that blocks which are not there still need, at least one of each."""
        tasks = []
        for block in blocks:
            assert isinstance(block.spec, CampaignSpec)
            members = [Task("model", block.spec, block.block, member) for member in range(BLOCK_SIZE)]
            tasks += self.missing(members) or members[-1:]  # where all are there, one to put them together
        return tasks

    def originals(self) -> list[Task]:
        return [Task("original", spec) for spec in self.study.originals(self.fingerprint)]

    def references(self) -> list[Task]:
        return [Task("run", spec) for spec in self.study.reference_runs(self.fingerprint)]

    def proxies(self, validation: bool) -> list[Task]:
        """The stand-ins for memorization from the first original's training; some need a validation split."""
        chosen = [Proxy(name=name) for name, entry in PROXIES.items() if validation or "validation" not in entry.inputs]
        return [Task("proxies", ProxiesSpec(original=self.originals()[0].spec, proxies=tuple(chosen)))]

    def localizations(self) -> list[Task]:
        """The distinct localizations of the runs, each base strategy before those that build on it."""
        specs = {key(spec): spec for _, run in self.study.runs(self.fingerprint) if (spec := run.localization)}
        return [Task("localization", spec) for spec in sorted(specs.values(), key=lambda s: s.base is not None)]

    def runs(self) -> list[Task]:
        distinct = {key(run): run for _, run in self.study.runs(self.fingerprint)}
        return [Task("run", run) for run in distinct.values()]

    def sweep(self, provenance: Mapping[str, Any]) -> Sweep:
        """The sweep's own record: all its runs by key, references included."""
        members = [Member(arm, key(run)) for arm, run in self.study.runs(self.fingerprint)]
        members += [Member("reference", key(run)) for run in self.study.reference_runs(self.fingerprint)]
        members = list(dict.fromkeys(members))  # an axis value given twice is one run
        name = results.sweep_key(self.study.recipe, members)
        return Sweep(name, self.study.recipe, tuple(members), self.study.model_dump(mode="json"), provenance)

    def waves(self) -> dict[str, list[Task]]:
        """All tasks but subset models by what they are, in the order in which they must be done."""
        return {
            **({"proxies": stand_ins} if (stand_ins := self.stand_ins()) else {}),
            "originals": self.originals(),
            "references": self.references(),
            "localizations": self.localizations(),
            "runs": self.runs(),
        }

    def counts(self) -> dict[str, Counter[str]]:
        """Per wave, how many tasks are done and missing."""
        waves = {"subset models": self.campaign_counts()} if self.needs_scores else {}
        for name, tasks in self.waves().items():
            missing = len(self.missing(tasks))
            waves[name] = Counter(done=len(tasks) - missing, missing=missing)
        return waves

    def campaign_counts(self) -> Counter[str]:
        """How many subset models are done and missing."""
        missing = self.missing(self.models(self.missing(self.blocks())))
        return Counter(done=self.study.campaign.models - len(missing), missing=len(missing))


def make(study: Study, dataset: Dataset, store: Store) -> Plan:
    """Plan a study against what a store holds now; checks everything that can be known before training.

    Raises InputError for a rule or value that does not fit the data, and for a damaged row among those needed.
    """
    smallest = int(len(dataset.splits["train"]) * study.campaign.fraction)
    if study.training.batch_size > smallest:
        raise InputError(
            f"training.batch_size is {study.training.batch_size}; allowed: at most the {smallest} examples of a subset"
        )
    plan = Plan(study, dataset.fingerprint, _present(store))
    present = plan.present
    for rule in study.forget_sets:
        _check_forget_set(rule, dataset, store.get)
    _check_model(study, dataset)
    for name in {study.scores, *study.scores_used} & set(PROXIES):
        if "validation" in PROXIES[name].inputs and not len(dataset.splits["validation"]):
            raise InputError(f"scores={name} needs a validation split; give the data one (data.num_validation)")
    finished = [key(task.spec) for task in (*plan.references(), *plan.runs()) if task.object_name in present]
    for name in finished:
        results.get_row(store, name)
    results.check_outputs(store, finished)
    needed = [task.object_name for task in (*plan.blocks(), *plan.originals(), *plan.localizations())]
    for block in plan.missing(plan.blocks()):
        needed += [Task("model", block.spec, block.block, member).object_name for member in range(BLOCK_SIZE)]
    results.check_arrays(store, [name for name in needed if name in present])
    return plan


def _present(store: Store) -> frozenset[str]:
    folders = ("campaigns", "exact", "models", "localizations", "proxies", "rows", "scores")
    return frozenset(f"{folder}/{name}" for folder in folders for name in store.names(folder))


def _inputs(task: Task) -> list[str]:
    """The stored objects that a task reads."""
    spec = task.spec
    if not isinstance(spec, RunSpec | LocalizationSpec):
        return []
    found = [] if spec.original is None else [Task("original", spec.original).object_name]
    if spec.forget.scores is not None:
        found.append(scores_object(spec.forget.scores))
    if isinstance(spec, RunSpec) and spec.memorization is not None:
        found.append(scores_object(spec.memorization))
    if isinstance(spec, RunSpec) and spec.localization is not None:
        found.append(Task("localization", spec.localization).object_name)
    return found


def pinned(study: Study, dataset: Dataset, store: Store) -> Study:
    """The study with the files that its forget sets name checked, copied into the store and named by their content."""
    rules = tuple(_pinned_rule(rule, dataset, store) for rule in study.forget_sets)
    return study.model_copy(update={"forget_sets": rules})


def _pinned_rule(rule: ForgetSet, dataset: Dataset, store: Store) -> ForgetSet:
    options = dict(rule.options)
    for name, option in rule.entry.options.items():
        if not option.has_mark(File) or options[name].startswith(PINNED):
            continue
        path = Path(options[name])
        if not path.is_file():
            raise InputError(f"forget file {str(path)!r} does not exist; set forget_sets.{rule.name}.{name} to a file")
        _check_forget_set(rule, dataset, lambda given: Path(given).read_bytes())  # errors name the user's own path
        content = path.read_bytes()
        options[name] = f"{PINNED}{hashlib.sha256(content).hexdigest()[:32]}{path.suffix}"
        if not store.exists(options[name]):
            store.put(options[name], content)
    return ForgetSet(name=rule.name, options=options)


def _check_forget_set(rule: ForgetSet, dataset: Dataset, files: Callable[[str], bytes]) -> None:
    """Draw the set once on stand-in scores: what it refuses, it refuses before anything is trained."""
    available = {
        "labels": dataset.split_labels("train"),
        "true_labels": dataset.split_true_labels("train"),
        "class_names": dataset.class_names,
        "memorization": np.zeros(len(dataset.splits["train"])),
        "rng": np.random.default_rng(0),
        "files": files,
    }
    rule.entry(available, rule.options)


def _check_model(study: Study, dataset: Dataset) -> None:
    """Make the model once: it must take images of this size, and budgets and options must fit it."""
    make = factory(study.model.name, study.model.options, dataset.image_shape, dataset.num_classes)
    model = make(generator(0, "check"))
    for arm in study.methods.values():
        options = METHODS[arm.method].options
        for option in options.values():
            for fits in option.marks(Fits):
                for value in arm.options.get(option.name, (option.default,)):
                    fits.check(model, value)
    entries = sum(parameter.numel() for parameter in model.parameters())
    for budget in {budget for arm in study.methods.values() for budget in arm.budget if budget is not None}:
        num_selected(budget, entries)


# ---- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoresSummary:
    """What a campaign came to: its scores key, fit, and reliability (rank correlation between its halves)."""

    scores_key: str
    models: int
    in_accuracy: float
    hard_in_accuracy: float | None  # None: no example is mostly wrong outside its subsets
    test_accuracy: float
    split_half: float | None  # None: a single block has no halves
    model_seconds: float
    standard_error: float | None = None  # mean over examples; None: from before it was kept
    top_overlap: float | None = None  # of the 5 % most memorized by either half
    estimator: str = "correctness"
    stopping: str | None = None  # the target that the scores met, at which the campaign stopped; None: no such look

    @property
    def passes_gate(self) -> bool:
        """In-subset accuracy 99.5 % overall, and 97 % on examples with an out-accuracy below one half."""
        return self.in_accuracy >= 0.995 and (self.hard_in_accuracy is None or self.hard_in_accuracy >= 0.97)


def scores(store: Store, spec: ScoresSpec, dataset: Dataset) -> ScoresSummary:
    """The stored summary of these scores; scores that are not there are estimated from the campaign's blocks."""
    name = f"scores/{key(spec)}.parquet"
    if not store.exists(name):
        return _compute_scores(store, spec, dataset)
    metadata = results.get_table(store, name).schema.metadata or {}
    if b"setting" not in metadata:  # from before scores said what they are of
        return _compute_scores(store, spec, dataset)
    return ScoresSummary(**json.loads(metadata[b"summary"]))


@dataclass
class Tally:
    """What the blocks of a campaign add up to, read one after another; even and odd ones are its halves."""

    store: Store
    campaign: CampaignSpec
    dataset: Dataset
    estimator: Estimator = "correctness"
    blocks: int = 0
    _halves: list[Tallied | None] = field(default_factory=lambda: [None, None])
    _correct: Counts | None = None
    _test: list[float] = field(default_factory=list)
    _seconds: float = 0.0

    def add(self) -> None:
        """Read the next block from the store."""
        arrays = results.unpack(self.store, Task("block", self.campaign, self.blocks).object_name)
        labels, membership = self.dataset.split_labels("train"), arrays["membership"].astype(bool)
        correct = count(membership, arrays["train"].argmax(axis=2) == labels)
        self._correct = correct if self._correct is None else self._correct + correct
        half: Any = correct
        if self.estimator == "probability":
            half = moments(membership, np.stack([_label_probabilities(part, labels) for part in arrays["train"]]))
        before: Any = self._halves[self.blocks % 2]
        self._halves[self.blocks % 2] = half if before is None else before + half
        self._test.append(float(arrays["test_accuracy"].mean()))
        self._seconds += float(arrays["seconds"].sum())
        self.blocks += 1

    @property
    def can_estimate(self) -> bool:
        """Whether every example was in and out of enough models: one each, for probabilities two."""
        held_out = BLOCK_SIZE - round(self.campaign.fraction * BLOCK_SIZE)
        fewest = self.blocks * min(held_out, BLOCK_SIZE - held_out)
        return fewest >= (2 if self.estimator == "probability" else 1)

    @property
    def seconds(self) -> float:
        """What the models took, in all."""
        return self._seconds

    @property
    def total(self) -> Tallied:
        first: Any
        second: Any
        first, second = self._halves
        assert first is not None, "no block was read"
        total: Tallied = first if second is None else first + second
        return total

    @property
    def spec(self) -> ScoresSpec:
        return ScoresSpec(campaign=self.campaign, blocks=self.blocks, estimator=self.estimator)

    def summary(self) -> ScoresSummary:
        """What the blocks read so far come to."""
        assert self._correct is not None, "no block was read"
        scores, fit, (first, second) = estimate(self.total), estimate(self._correct), self._halves
        hard = fit.out_mean < 0.5  # the gate is of accuracy, whatever the scores are made of
        return ScoresSummary(
            scores_key=key(self.spec),
            models=self.blocks * BLOCK_SIZE,
            in_accuracy=float(self._correct.in_hits.sum() / self._correct.in_total.sum()),
            hard_in_accuracy=float(fit.in_mean[hard].mean()) if hard.any() else None,
            test_accuracy=float(np.mean(self._test)),
            split_half=None if first is None or second is None else split_half_correlation(first, second),
            model_seconds=self._seconds,
            standard_error=float(scores.standard_error.mean()),
            top_overlap=None if first is None or second is None else top_overlap(first, second),
            estimator=self.estimator,
        )


def _label_probabilities(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The given label's probability, float64 [n], from logits [n, classes]."""
    found: np.ndarray = np.exp(log_probabilities(logits)[np.arange(len(labels)), labels])
    return found


def _compute_scores(store: Store, spec: ScoresSpec, dataset: Dataset) -> ScoresSummary:
    tally = Tally(store, spec.campaign, dataset, spec.estimator)
    for _ in range(spec.blocks):
        tally.add()
    return put_scores(tally)


def put_scores(tally: Tally, stopping: str | None = None) -> ScoresSummary:
    """Estimate scores from the blocks read, store them with the images of the most memorized, and sum up.

    `stopping` says which target the scores met where that ended the campaign: their intervals are then nominal.
    """
    store, dataset, summary = tally.store, tally.dataset, replace(tally.summary(), stopping=stopping)
    labels, scores = dataset.split_labels("train"), estimate(tally.total)
    true_labels = dataset.split_true_labels("train")
    columns = {"index": np.arange(len(labels)), "label": labels, "true_label": true_labels, **vars(scores)}
    table = pa.table(columns).select(_SCHEMAS["memorization"].names).cast(_SCHEMAS["memorization"])
    most = np.argsort(-scores.score, kind="stable")[:NUM_PICTURES]
    name = summary.scores_key
    results.put_table(store, f"scores/{name}.examples.parquet", _pictures(dataset, most))
    facts = {"summary": json.dumps(asdict(summary)), "setting": key(tally.campaign.setting)}
    results.put_table(store, f"scores/{name}.parquet", table, facts)
    return summary


def _pictures(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> pa.Table:
    from PIL import Image

    rows, lines = dataset.splits["train"][indices], []
    for index, row in zip(indices, rows, strict=True):
        image = dataset.images[row]
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
        lines.append(
            {
                "index": int(index),
                "label_name": dataset.class_names[dataset.labels[row]],
                "true_label_name": dataset.class_names[dataset.true_labels[row]],
                "png": buffer.getvalue(),
            }
        )
    return pa.Table.from_pylist(lines, schema=_SCHEMAS["examples"])


def overlaps(sets: Mapping[str, np.ndarray]) -> list[tuple[str, str, int]]:
    """How many examples each pair of forget sets shares."""
    names = list(sets)
    return [(a, b, len(np.intersect1d(sets[a], sets[b]))) for i, a in enumerate(names) for b in names[i + 1 :]]
