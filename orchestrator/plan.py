"""Specs and store -> tasks that are missing, what is cached. Knows no Ray."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import results
from orchestrator.arms import CAMPAIGN
from orchestrator.axes import Distribution
from orchestrator.data import Dataset
from orchestrator.experiment import Task, scores_object
from orchestrator.localization import num_selected
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.models import factory
from orchestrator.progress import stopped_series
from orchestrator.proxies import PROXIES
from orchestrator.registry import File, Fits, InputError
from orchestrator.results import Member, Sweep
from orchestrator.search import check_objective
from orchestrator.seeds import generator
from orchestrator.specs import (
    CampaignSpec,
    ForgetSet,
    LocalizationSpec,
    ProxiesSpec,
    Proxy,
    RunSpec,
    StandInSpec,
    key,
)
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.unlearning import METHODS

_OTHERS = ("validation", "test")  # splits beside the two parts of the training set
PINNED = "files/"  # where users' files are kept in a store


@dataclass(frozen=True)
class Plan:
    """The tasks of a study over one data set, in waves, and which objects the store already holds.

    `suggestions`: the settings that Optuna has chosen so far, values by axis. `stopped`: the objects of runs that a
    scheduler has stopped early, which are not begun again under one.
    """

    study: Study
    fingerprint: str
    present: frozenset[str]
    suggestions: tuple[Mapping[str, Any], ...] = ()
    stopped: frozenset[str] = frozenset()

    def named_runs(self) -> list[tuple[str, RunSpec]]:
        """All runs but references, with the name of their arm."""
        return self.study.runs(self.fingerprint, self.suggestions)

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        known = self.present | self.stopped
        return [task for task in tasks if any(name not in known for name in task.objects)]

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
        specs = {key(spec): spec for _, run in self.named_runs() if (spec := run.localization)}
        return [Task("localization", spec) for spec in sorted(specs.values(), key=lambda s: s.base is not None)]

    def runs(self) -> list[Task]:
        distinct = {key(run): run for _, run in self.named_runs()}
        return [Task("run", run) for run in distinct.values()]

    def sweep(self, provenance: Mapping[str, Any]) -> Sweep:
        """The sweep's own record: all its runs by key, references included."""
        members = [Member(arm, key(run)) for arm, run in self.named_runs()]
        members += [Member("reference", key(run)) for run in self.study.reference_runs(self.fingerprint)]
        members = list(dict.fromkeys(members))  # an axis value given twice is one run
        said = self.study.model_dump(mode="json")
        name, caution = self._key(members), self.study.caution
        return Sweep(name, self.study.recipe, tuple(members), said, provenance, self.suggestions, caution)

    def _key(self, members: Iterable[Member]) -> str:
        """The sweep's name: by its runs, or by how they are chosen where they are not known before.

        The number of samples is no part of it, so that a search can be asked for more.
        """
        study = self.study
        if not study.searched():
            return results.sweep_key(study.recipe, members)
        parts = study.model_dump(mode="json", exclude_defaults=True, exclude={"data": True, "search": {"samples"}})
        arms = [each for arm in study.methods.values() for each in (arm, *arm.stages)]
        versions = {arm.method: METHODS[arm.method].version for arm in arms}
        return results.search_key(study.recipe, [self.fingerprint, parts, versions])

    def suggested(self, store: Store) -> Plan:
        """The same, with what the sweep's record has of Optuna's choices."""
        if not self.study.searched():
            return self
        record = results.get_sweep(store, self._key(()))
        return self if record is None else replace(self, suggestions=record.suggestions)

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
    plan = Plan(study, dataset.fingerprint, _present(store)).suggested(store)
    present = plan.present
    for rule in study.forget_sets:
        _check_stages(study, rule, _check_forget_set(rule, dataset, store.get))
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
    if study.searched():
        check_objective(study.search.objective, ["forget", "retain", *(s for s in _OTHERS if len(dataset.splits[s]))])
    if study.scheduler is None:
        return plan
    names = {key(task.spec): task.object_name for task in plan.missing(plan.runs())}
    return replace(plan, stopped=frozenset(names[run] for run in stopped_series(store, list(names))))


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


def _check_forget_set(rule: ForgetSet, dataset: Dataset, files: Callable[[str], bytes]) -> int:
    """Draw the set once on stand-in scores, for its size: what it refuses, it refuses before anything is trained."""
    available = {
        "labels": dataset.split_labels("train"),
        "true_labels": dataset.split_true_labels("train"),
        "class_names": dataset.class_names,
        "memorization": np.zeros(len(dataset.splits["train"])),
        "rng": np.random.default_rng(0),
        "files": files,
    }
    return len(rule.entry(available, rule.options))


def _check_stages(study: Study, rule: ForgetSet, size: int) -> None:
    """Raise InputError where a method has more stages than a forget set has examples."""
    for name, arm in study.methods.items():
        if len(arm.stages) > size:
            raise InputError(
                f"method {name} has {len(arm.stages)} stages and forget set {rule.name} has {size} examples; "
                "allowed: a stage for each example at most"
            )


def _check_model(study: Study, dataset: Dataset) -> None:
    """Make the model once: it must take images of this size, and budgets and options must fit it."""
    make = factory(study.model.name, study.model.options, dataset.image_shape, dataset.num_classes)
    model = make(generator(0, "check"))
    arms = [each for arm in study.methods.values() for each in (arm, *arm.stages)]
    for arm in arms:
        options = METHODS[arm.method].options
        for option in options.values():
            for fits in option.marks(Fits):
                axis = arm.options.get(option.name, (option.default,))
                for value in axis.values if isinstance(axis, Distribution) else axis:
                    fits.check(model, value)
    entries = sum(parameter.numel() for parameter in model.parameters())
    for budget in {budget for arm in arms for budget in arm.budgets if budget is not None}:
        num_selected(budget, entries)


def overlaps(sets: Mapping[str, np.ndarray]) -> list[tuple[str, str, int]]:
    """How many examples each pair of forget sets shares."""
    names = list(sets)
    return [(a, b, len(np.intersect1d(sets[a], sets[b]))) for i, a in enumerate(names) for b in names[i + 1 :]]
