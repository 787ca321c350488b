"""How long what is missing would take, by what the same data and model took in this store. Trains nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from orchestrator import costs, results
from orchestrator.pipeline import REFERENCE
from orchestrator.registry import canonical_json
from orchestrator.specs import CampaignSpec, LocalizationSpec, ProxiesSpec, RunSpec, Setting, TrainingSpec
from orchestrator.store import Store
from orchestrator.tasks import Task

_NO_TIME = ("lr", "momentum", "weight_decay")  # options that change no run's duration


@dataclass(frozen=True)
class Estimate:
    """Seconds that tasks would take on one worker, and the names of those that nothing was measured for."""

    seconds: float = 0.0
    unknown: tuple[str, ...] = ()

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.seconds + other.seconds, tuple(dict.fromkeys(self.unknown + other.unknown)))


@dataclass
class Rates:
    """What was measured in seconds with one data set and model, on CPUs or on GPUs. An estimate goes by medians.

    steps: of an optimizer step in a training, by what tells on it. runs: of a method, with the options that tell.
    localizations: by strategy. `num_train` examples are trained on.
    """

    num_train: int
    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    runs: dict[str, list[tuple[dict[str, Any], float]]] = field(default_factory=lambda: defaultdict(list))
    localizations: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def count(self) -> int:
        """How many measurements there are."""
        return sum(len(found) for part in (self.steps, self.runs, self.localizations) for found in part.values())

    def of(self, tasks: Iterable[Task]) -> Estimate:
        """What these tasks would take."""
        return sum((self._of(task) for task in tasks), Estimate())

    def _of(self, task: Task) -> Estimate:
        spec = task.spec
        if isinstance(spec, LocalizationSpec):
            return _by(self.localizations.get(spec.strategy.name, []), spec.strategy.name)
        if isinstance(spec, RunSpec) and spec.method.name != REFERENCE:
            return self._run(spec.method.name, _telling(spec.method.options))
        setting = spec.original.setting if isinstance(spec, ProxiesSpec) else spec.setting
        return self._training(setting, spec.fraction if isinstance(spec, CampaignSpec) else 1.0)

    def _training(self, setting: Setting, fraction: float) -> Estimate:
        found = self.steps.get(_kind(setting.training), [])
        steps = num_steps(setting.training, int(self.num_train * fraction))
        return _by([steps * seconds for seconds in found], "training")

    def _run(self, method: str, options: Mapping[str, Any]) -> Estimate:
        """By the runs with equal options, else by all of the method, scaled to as many epochs."""
        found = self.runs.get(method, [])
        alike = [seconds for told, seconds in found if told == options]
        scaled = [seconds * options.get("epochs", 1) / (told.get("epochs") or 1) for told, seconds in found]
        return _by(alike or scaled, method)


def measured(store: Store, setting: Setting, num_train: int, *, on_gpu: bool) -> Rates:
    """What finished runs and campaigns of this data set and model took in a store, under any training recipe."""
    rates = Rates(num_train)
    with ThreadPoolExecutor(16) as threads:
        rows = list(threads.map(lambda name: results.get_row(store, name), sorted(results.row_keys(store))))
    for row in rows:
        if _is_of(row.spec["setting"], setting) and row.provenance["numerics"].startswith("cpu") != on_gpu:
            _take(rates, row)
    for stretch in costs.get_stretches(store):
        if stretch.spec is None or not stretch.models or (stretch.device == "gpu") != on_gpu:
            continue
        if _is_of(stretch.spec["setting"], setting):
            training = TrainingSpec(**stretch.spec["setting"]["training"])
            steps = num_steps(training, int(num_train * stretch.spec["fraction"]))
            rates.steps[_kind(training)].append(stretch.model_seconds / stretch.models / steps)
    return rates


def _is_of(stored: Mapping[str, Any], setting: Setting) -> bool:
    return bool(stored["data"] == setting.data and stored["model"] == setting.model.model_dump(mode="json"))


def _take(rates: Rates, row: results.Row) -> None:
    seconds, method = row.provenance["seconds"], row.spec["method"]
    if row.is_reference and row.measurements.get("steps"):
        training = TrainingSpec(**row.spec["setting"]["training"])
        rates.steps[_kind(training)].append(seconds / row.measurements["steps"])
    else:
        rates.runs[method["name"]].append((_telling(method["options"]), seconds))
    if row.spec["mask"] and row.provenance.get("localization_seconds") is not None:
        rates.localizations[row.spec["mask"]["strategy"]["name"]].append(row.provenance["localization_seconds"])


def num_steps(training: TrainingSpec, examples: int) -> int:
    """Optimizer steps of a training: full batches alone, at least one an epoch."""
    return training.epochs * max(1, examples // training.batch_size)


def _kind(training: TrainingSpec) -> str:
    """What of a training recipe tells on the seconds of a step."""
    return canonical_json([training.batch_size, training.precision, training.augment])


def _telling(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _NO_TIME}


def _by(found: list[float], name: str) -> Estimate:
    return Estimate(median(found)) if found else Estimate(unknown=(name,))
