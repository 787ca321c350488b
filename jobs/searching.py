"""What a sweep decides on the way: which settings Optuna tries next, and which runs ASHA stops early."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.progress import console
from jobs.session import Session
from orchestrator import results
from orchestrator.axes import Distribution
from orchestrator.plan import Plan
from orchestrator.progress import Progress, Watch, put_stopped, stopped_series
from orchestrator.registry import canonical_json
from orchestrator.results import Sweep
from orchestrator.search import Asha, Halving, distinct, num_to_choose, objective_of
from orchestrator.specs import RunSpec, key
from orchestrator.store import Store
from orchestrator.suggestions import suggest
from orchestrator.tasks import Task


@dataclass
class Asking:
    """Optuna's choices for one sweep, asked one at a time; each is in the sweep's record before its runs are begun."""

    session: Session
    sweep: Sweep
    plan: Plan
    known: Callable[[list[str]], None] = field(default=lambda _: None)  # hears of a choice's runs that are there
    _values: dict[str, float] = field(default_factory=dict)  # objective of a finished run, by its key

    @property
    def num_left(self) -> int:
        """How many settings are still to be chosen."""
        return _num_left(self.plan)

    def begin(self, known: Callable[[list[str]], None]) -> Plan:
        """The plan with something to do in it, if anything is left: what is chosen first needs no worker to choose."""
        self.known = known
        while self.num_left and not self.plan.missing(self.plan.runs()):
            self.ask()
        return self.plan

    def ask(self) -> list[Task]:
        """Choose one more setting by what has come of the others, record it, and return its missing runs."""
        study, chosen = self.plan.study, self.plan.suggestions
        (arm,) = study.searched().values()
        tried = [(values, value) for values in chosen if (value := self.value_of(values)) is not None]
        found = suggest(
            arm.axes(),
            tried,
            chosen=chosen,
            seed=study.search.seed,
            is_maximised=study.search.is_maximised,
        )
        self.plan = replace(self.plan, suggestions=(*chosen, found))
        members = self.plan.sweep({}).members
        self.sweep = replace(self.sweep, members=members, suggestions=self.plan.suggestions)
        results.put_sweep(self.session.store, self.sweep)
        runs = self._runs(found)
        missing = [task for task in runs if not self.session.store.exists(task.object_name)]
        self.known([key(task.spec) for task in runs if task not in missing])
        return missing

    def tasks(self, first: Sequence[Task]) -> Iterator[Task]:
        """The runs that are missing of what was chosen before, then those of new choices; each once."""
        given = {key(task.spec) for task in first}
        yield from first
        while self.num_left:
            for task in self.ask():
                if key(task.spec) not in given:  # the same setting may be chosen while its runs are on their way
                    given.add(key(task.spec))
                    yield task

    def value_of(self, values: Mapping[str, Any]) -> float | None:
        """The objective of a setting, a mean over its seeds; None where a run of it is not there."""
        found = [self._objective(key(task.spec)) for task in self._runs(values)]
        known = [value for value in found if value is not None]
        return None if len(known) < len(found) else math.fsum(known) / len(known)

    def _runs(self, values: Mapping[str, Any]) -> list[Task]:
        (name,) = self.plan.study.searched()
        runs = self.plan.study.runs(self.plan.fingerprint, [values])
        return [Task("run", run) for arm, run in runs if arm == name]

    def _objective(self, run: str) -> float | None:
        if run not in self._values and self.session.store.exists(f"rows/{run}.json"):
            outputs = results.get_outputs(self.session.store, run)
            self._values[run] = objective_of(outputs, self.plan.study.search.objective)
        return self._values.get(run)

    def print_best(self) -> None:
        """Say which setting came out best, and that its objective is that of the best of many."""
        search = self.plan.study.search
        chosen = distinct(self.plan.suggestions)
        tried = [(value, values) for values in chosen if (value := self.value_of(values)) is not None]
        if not tried:
            return
        value, values = (max if search.is_maximised else min)(tried, key=lambda pair: pair[0])
        (arm,) = self.plan.study.searched().values()
        chosen_from = {name for name, axis in arm.axes().items() if isinstance(axis, Distribution) or len(axis) > 1}
        said = ", ".join(f"{name}={setting}" for name, setting in values.items() if name in chosen_from)
        seeds = len(self.plan.study.seeds)
        console.print(
            f"best {search.objective} of {len(tried)} settings: {value:.4f} (mean of {seeds} seeds) at {said}. "
            "It was chosen by these runs: report it on other seeds.",
            highlight=False,
        )


def _num_left(plan: Plan) -> int:
    (arm,) = plan.study.searched().values()
    return num_to_choose(arm.axes(), plan.suggestions, plan.study.search.samples)


def print_plan(session: Session) -> None:
    """What a dry run says of choices that are still to be made, and of runs that were stopped."""
    plan, study = session.plan, session.study
    if study.searched():
        left = _num_left(plan)
        console.print(
            f"Optuna has chosen {len(distinct(plan.suggestions))} settings and will choose {left} more: "
            f"{left * len(study.seeds)} runs beside those above",
            highlight=False,
        )
    if halted := len(_halted(plan)):
        console.print(f"{halted} runs were stopped early before, and stay so under a scheduler", highlight=False)


def cell_of(run: RunSpec) -> str:
    """What the runs that ASHA holds against one another have in common: all but options, seeds included."""
    said = run.model_dump(mode="json", exclude={"setting": True, "method": {"options"}})
    for stage in said["stages"]:
        del stage["method"]["options"]
    return canonical_json(said)


def watching(store: Store, rule: Asha, plan: Plan, hear: Callable[[Sequence[Progress]], None]) -> Watch[Task, Progress]:
    """ASHA over the runs of a sweep, each against those of its cell; `hear` is told of each that is stopped.

    Those that are over, whole or stopped before, take part.
    """
    halving, cells = Halving(rule), {key(run): cell_of(run) for _, run in plan.named_runs()}
    present = [run for run in cells if f"rows/{run}.json" in plan.present]
    for run in present:
        halving.remember(cells[run], run, results.get_row(store, run).series.get(rule.metric, [])[:-1])
    for run, series in stopped_series(store, list(cells)).items():
        halving.remember(cells[run], run, series.get(rule.metric, []))

    def stops(task: Task, progress: Progress) -> bool:
        run = key(task.spec)
        return halving.stops(cells[run], run, progress.epoch, progress.series[rule.metric])

    def stopped(task: Task, reports: list[Progress]) -> None:
        assert isinstance(task.spec, RunSpec)
        put_stopped(store, task.spec, reports, str(rule))
        hear(reports)

    return Watch(stops, stopped)


def _halted(plan: Plan) -> list[Task]:
    return plan.halted + ([] if plan.tuning is None else plan.tuning.halted)


def print_stopped(plan: Plan, now: int) -> None:
    """Say how many runs were stopped early, those of tuning included, and what that means."""
    if plan.study.scheduler is not None:
        total = len(plan.runs()) + (0 if plan.tuning is None else len(plan.tuning.runs()))
        console.print(
            f"{now} runs were stopped early now and {len(_halted(plan))} before, of {total}; "
            "--scheduler none runs them to their end",
            highlight=False,
        )
