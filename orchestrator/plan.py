"""Specs and store -> tasks that are missing, what is cached. Knows no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from orchestrator import checks, results, selections
from orchestrator.arms import CAMPAIGN
from orchestrator.arrays import check_whole
from orchestrator.data import Dataset
from orchestrator.experiment import forget_indices
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.progress import last_attempts, stopped_series
from orchestrator.proxies import PROXIES
from orchestrator.registry import InputError
from orchestrator.results import Member, Role, Sweep
from orchestrator.search import check_objective
from orchestrator.selections import Selections
from orchestrator.specs import (
    CampaignSpec,
    ForgetSet,
    LocalizationSpec,
    ProxiesSpec,
    Proxy,
    RunSpec,
    StandInSpec,
    key,
    keys,
)
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.tasks import Task, scores_object
from orchestrator.unlearning import METHODS

_OTHERS = ("validation", "test")  # splits beside the two parts of the training set


@dataclass(frozen=True)
class Plan:
    """The tasks of a study over one data set, in waves, and which objects the store already holds.

    `suggestions`: the settings that Optuna has chosen so far, values by axis. `stopped`: the objects of runs that a
    scheduler has stopped early, which are not begun again under one.
    keys: the runs of the study's grid that are wanted; None: all. tuning: the plan by which the others' settings are
    chosen, on stand-ins of the forget sets by name. selections: what was chosen; None before it is.
    """

    study: Study
    fingerprint: str
    present: frozenset[str]
    suggestions: tuple[Mapping[str, Any], ...] = ()
    stopped: frozenset[str] = frozenset()
    keys: frozenset[str] | None = None
    tuning: Plan | None = None
    stand_ins_of: Mapping[str, ForgetSet] = field(default_factory=dict)
    selections: Selections | None = None

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        known = self.present | self.stopped
        return [task for task in tasks if any(name not in known for name in task.objects)]

    @property
    def halted(self) -> list[Task]:
        """The runs without a row that a scheduler has stopped early, and that are not begun again under one."""
        return self._halted(self.runs()) if self.stopped else []

    def _halted(self, tasks: Iterable[Task]) -> list[Task]:
        stopped = self.stopped - self.present
        return [task for task in tasks if any(name in stopped for name in task.objects)]

    def failed_before(self, store: Store) -> list[Task]:
        """The runs that are missing and whose last try failed: they are tried again."""
        missing = {key(task.spec): task for task in self.missing([*self.references(), *self.runs()])}
        last = last_attempts(store, missing)
        return [task for name, task in missing.items() if name in last and last[name].status == "failed"]

    def foreseen(self, store: Store) -> Plan:
        """The plan settled already where no tuning run is missing but such as failed before: as if they fail again."""
        if self.tuning is None or not self.undecided:
            return self
        missing = self.tuning.missing([*self.tuning.references(), *self.tuning.runs()])
        return self.settled(store) if len(missing) == len(self.tuning.failed_before(store)) else self

    def against(self, store: Store) -> Plan:
        """The same, against what the store holds now."""
        plan = replace(self, present=_present(store))
        drawn = ("_runs", "_run_tasks")  # which the store does not change, and which take seconds where they are many
        vars(plan).update({name: value for name, value in vars(self).items() if name in drawn})
        return plan

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

    def named_runs(self) -> list[tuple[str, RunSpec]]:
        """The runs of the study that are wanted, with the names of their arms."""
        runs = self.study.runs(self.fingerprint, self.suggestions)
        return runs if self.keys is None else [(arm, run) for arm, run in runs if key(run) in self.keys]

    def waiting(self) -> list[Task]:
        """As many runs as there will be of settings that are not chosen yet, each at a missing one if there is any."""
        if self.tuning is None or self.selections is not None:
            return []
        several = (c for c in selections.cells(self.study.runs(self.fingerprint)).values() if len(c) > 1)
        alike = [[Task("run", run) for run in runs] for c in several for runs in zip(*c.values(), strict=True)]
        return [next(iter(self.missing(tasks)), tasks[0]) for tasks in alike]

    @property
    def undecided(self) -> int:
        """How many runs are wanted whose settings are not chosen yet."""
        return len(self.waiting())

    def settled(self, store: Store) -> Plan:
        """The plan with the settings chosen from what its tuning runs came to; those that failed are not waited for."""
        if self.tuning is None:
            return self
        chosen = selections.select(self.study, self.tuning.study, self.stand_ins_of, self.fingerprint, store)
        runs = self.study.runs(self.fingerprint)
        fixed = {key(run) for arm, run in runs if selections.cell_of(arm, run) not in chosen}
        decided = {name for names in selections.settled(chosen, runs).values() for name in names}
        return replace(self, keys=frozenset(fixed | decided), selections=chosen)

    def localizations(self) -> list[Task]:
        """The distinct localizations of the runs, each base strategy before those that build on it."""
        runs = self.study.runs(self.fingerprint) if self.undecided else [(arm, run) for arm, _, run in self._runs]
        found = [spec for _, run in runs if (spec := run.localization)]
        specs = dict(zip(keys(found), found, strict=True))
        return [Task("localization", spec) for spec in sorted(specs.values(), key=lambda s: s.base is not None)]

    def runs(self) -> list[Task]:
        return list(self._run_tasks)

    @cached_property
    def _run_tasks(self) -> list[Task]:
        return [Task.of_run(run, name) for name, run in {name: run for _, name, run in self._runs}.items()]

    @cached_property
    def _runs(self) -> list[tuple[str, str, RunSpec]]:
        """All runs of the study: arm, key, spec."""
        named = self.named_runs()
        names = keys([run for _, run in named])
        return [(arm, name, run) for (arm, run), name in zip(named, names, strict=True)]

    def sweep(self, provenance: Mapping[str, Any]) -> Sweep:
        """The sweep's own record: all its runs by key, references included.

        A sweep that is tuned is known by all that could come of it, so that its name does not depend on the choice.
        """
        study, kept = self.study, {name for _, name, _ in self._runs}
        every = self._runs
        if self.keys is not None:
            every = [(arm, key(run), run) for arm, run in study.runs(self.fingerprint, self.suggestions)]
        references = [Member("reference", key(run)) for run in study.reference_runs(self.fingerprint)]
        # an axis value given twice is one run
        members = list(dict.fromkeys([*(Member(arm, name) for arm, name, _ in every), *references]))
        tuning = [] if self.tuning is None else self.tuning.members("tuning")
        by = selections.settled(self.selections or {}, [(arm, run) for arm, _, run in every])
        confirmed, always = {run for names in by.values() for run in names}, set(references)
        roles = [
            replace(member, role="confirmed" if member.key in confirmed else "reported")
            for member in members
            if member.key in kept or member in always
        ]
        return Sweep(
            self._key([*members, *tuning]),
            study.recipe,
            (*tuning, *roles),
            study.model_dump(mode="json"),
            provenance,
            self.suggestions,
            study.caution,
            {selection: tuple(names) for selection, names in by.items()},
            self.undecided,
        )

    def members(self, role: Role) -> list[Member]:
        """All runs in a role, references included."""
        found = [Member(arm, name, role) for arm, name, _ in self._runs]
        return list(dict.fromkeys([*found, *(Member("reference", key(task.spec), role) for task in self.references())]))

    def _key(self, members: Iterable[Member]) -> str:
        """The sweep's name: by its runs, or by how they are chosen where they are not known before.

        The number of samples is no part of it, so that a search can be asked for more.
        """
        study = self.study
        if study.tuning is not None and self.tuning is not None:
            return results.sweep_key(study.recipe, members, study.tuning.criterion, study.tuning.entry.version)
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
        """Per wave, how many tasks are done, missing, and stopped early."""
        waves = {"subset models": self.campaign_counts()} if self.needs_scores else {}
        for name, tasks in self.waves().items():
            missing, halted = len(self.missing(tasks)), len(self._halted(tasks))
            waves[name] = Counter(done=len(tasks) - missing - halted, missing=missing, stopped=halted)
        missing = len(self.missing(self.waiting()))
        waves["runs"] += Counter(done=self.undecided - missing, missing=missing)
        if self.tuning is None:
            return waves
        tuning = {n if n == "subset models" else f"tuning {n}": c for n, c in self.tuning.counts().items()}
        return {**tuning, **waves}

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
    sizes = {rule.name: checks.check_forget_set(rule, dataset, store.get) for rule in study.forget_sets}
    for rule in study.forget_sets:
        checks.check_stages(study, rule, sizes[rule.name])
    checks.check_model(study, dataset)
    for name in {study.scores, *study.scores_used} & set(PROXIES):
        if "validation" in PROXIES[name].inputs and not len(dataset.splits["validation"]):
            raise InputError(f"scores={name} needs a validation split; give the data one (data.num_validation)")
    rows = [task.object_name for task in (*plan.references(), *plan.runs())]
    finished = [PurePosixPath(name).stem for name in rows if name in present]
    for name in finished:
        results.get_row(store, name)
    results.check_outputs(store, finished)
    needed = [task.object_name for task in (*plan.blocks(), *plan.originals(), *plan.localizations())]
    for block in plan.missing(plan.blocks()):
        needed += [Task("model", block.spec, block.block, member).object_name for member in range(BLOCK_SIZE)]
    check_whole(store, [name for name in needed if name in present])
    if study.searched():
        check_objective(study.search.objective, ["forget", "retain", *(s for s in _OTHERS if len(dataset.splits[s]))])
    if study.scheduler is not None:
        names = {key(task.spec): task.object_name for task in plan.missing(plan.runs())}
        plan = replace(plan, stopped=frozenset(names[run] for run in stopped_series(store, list(names))))
    return plan if study.tuning is None else _tuned(plan, sizes, dataset, store)


def _tuned(plan: Plan, sizes: Mapping[str, int], dataset: Dataset, store: Store) -> Plan:
    """A plan with the plan by which its settings are chosen; settled where the store holds all that is chosen by.

    Without that plan where every cell has one setting, and there is nothing to choose.
    """
    study, total = plan.study, len(dataset.splits["train"])
    assert study.tuning is not None
    selections.check(study)
    if not len(dataset.splits["validation"]):
        raise InputError(f"tuning by {study.tuning.criterion} needs a validation split; set data.num_validation")
    rules = {rule.name: selections.stand_in(study.tuning, rule, sizes[rule.name], total) for rule in study.forget_sets}
    tuning = make(selections.tuning_study(study, rules), dataset, store)
    _check_stand_ins(study, tuning, dataset, store)
    single = [c for c in selections.cells(study.runs(plan.fingerprint)).values() if len(c) == 1]
    fixed = frozenset(key(run) for candidates in single for runs in candidates.values() for run in runs)
    if fixed == {key(task.spec) for task in plan.runs()}:
        return plan
    tuning = replace(tuning, keys=selections.tuned_runs(tuning.study.runs(plan.fingerprint)))
    wanted = [*tuning.references(), *tuning.runs()]
    selections.require_disjoint(
        (key(task.spec) for task in wanted), (key(task.spec) for task in (*plan.references(), *plan.runs()))
    )
    made = replace(plan, tuning=tuning, stand_ins_of=rules, keys=fixed)
    return made if tuning.missing(wanted) else made.settled(store)


def _check_stand_ins(study: Study, tuning: Plan, dataset: Dataset, store: Store) -> None:
    """Raise InputError where a set that settings are chosen on is one that is reported."""
    reported = study.forget_specs(dataset.fingerprint)
    for stand in tuning.study.forget_specs(dataset.fingerprint):
        for spec in reported:
            known = stand.scores is None and spec.scores is None
            drawn = [forget_indices(dataset, each, None, store) for each in (stand, spec)] if known else []
            if key(stand) == key(spec) or (known and np.array_equal(drawn[0], drawn[1])):
                raise InputError(
                    f"forget set {spec.rule.name} would be tuned on itself; set tuning.draw, or "
                    f"tuning.forget_sets.{spec.rule.name} to another rule"
                )


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


def overlaps(sets: Mapping[str, np.ndarray]) -> list[tuple[str, str, int]]:
    """How many examples each pair of forget sets shares."""
    names = list(sets)
    return [(a, b, len(np.intersect1d(sets[a], sets[b]))) for i, a in enumerate(names) for b in names[i + 1 :]]
