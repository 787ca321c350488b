"""How the axes of a study are searched: by a grid, at random or by Optuna, and which runs are stopped early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from orchestrator.axes import Axis, Distribution
from orchestrator.data import Outputs, SplitOutputs
from orchestrator.metrics import METRICS
from orchestrator.pipeline import SERIES
from orchestrator.registry import InputError, canonical_json, suggest
from orchestrator.seeds import numpy_generator
from orchestrator.specs import Spec

Direction = Literal["max", "min"]
_DIRECTIONS: Mapping[str, Direction] = {"accuracy": "max", "loss": "min"}  # of metrics for which it goes without saying


class Search(Spec):
    """How values of the axes are chosen; `kind` None is `random` for an arm with a distribution and `grid` for others.

    `samples` draws per cell; `objective` (METRIC/SPLIT, never of the test split) and its `direction` are
    what Optuna goes by, as a mean over the seeds.
    """

    kind: Literal["grid", "random", "optuna"] | None = None
    samples: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)
    objective: str = "accuracy/validation"
    direction: Direction | None = None

    @field_validator("objective")
    @classmethod
    def _known(cls, objective: str) -> str:
        name, slash, split = objective.partition("/")
        if not slash or split not in _SPLITS:
            raise InputError(
                f"search.objective is {objective!r}; allowed: METRIC/SPLIT with a split of {', '.join(_SPLITS)}, "
                "never of test, which is for reporting"
            )
        METRICS[name]  # raises for an unknown one
        return objective

    @property
    def is_maximised(self) -> bool:
        """Whether more is better; InputError for a metric of which nobody has said so."""
        name = self.objective.partition("/")[0]
        direction = self.direction or _DIRECTIONS.get(name)
        if direction is None:
            raise InputError(f"search.objective {self.objective} has no direction; set search.direction to max or min")
        return direction == "max"


_SPLITS = ("validation", "retain", "forget")


class Asha(Spec):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934) among the runs of one cell.

    After `grace` epochs, and `factor` times as many, and so on, a run goes on if its `metric` (a series' name) is in
    the best 1 / `factor` of those that came as far before it, in its cell and with its seeds. Which are stopped depends
    on which came first, so on the number of workers.
    """

    metric: str = "loss"
    direction: Direction = "min"
    grace: int = Field(default=1, ge=1)
    factor: int = Field(default=3, ge=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metric not in SERIES:
            raise InputError(f"scheduler.metric is {self.metric!r}; {suggest(self.metric, SERIES)}")
        return self

    def is_rung(self, epoch: int) -> bool:
        """Whether a run may be stopped after so many epochs."""
        rung = self.grace
        while rung < epoch:
            rung *= self.factor
        return rung == epoch

    def __str__(self) -> str:
        best = "least" if self.direction == "min" else "greatest"
        rungs = f"{self.grace}, {self.grace * self.factor}, ... epochs"
        return f"asha: after {rungs} the 1/{self.factor} of {best} {self.metric} go on"


@dataclass
class Halving:
    """Who goes on under ASHA: what each run of a cell had at each rung, in the order in which they came."""

    rule: Asha
    _rungs: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def stops(self, cell: str, run: str, epoch: int, value: float) -> bool:
        """Take in what a run has after an epoch; whether it is stopped. A second report of a run changes nothing."""
        if not self.rule.is_rung(epoch):
            return False
        rung = self._rungs.setdefault((cell, epoch), {})
        if run in rung:
            return False
        reward = -value if self.rule.direction == "min" else value
        before = list(rung.values())
        rung[run] = reward
        return bool(before) and reward < float(np.percentile(before, (1 - 1 / self.rule.factor) * 100))

    def remember(self, cell: str, run: str, values: Sequence[float]) -> None:
        """Take in the whole series of a run that is over."""
        for epoch, value in enumerate(values, 1):
            self.stops(cell, run, epoch, value)


def draws(axes: Mapping[str, Axis], search: Search, *where: str) -> Iterator[dict[str, Any]]:
    """Draw `search.samples` settings of the axes, distinct where they can be; all, in order, where there are no more.

    A function of the seed, `where` (the arm and cell) and each axis by itself: more samples begin with the same ones,
    and an axis that comes or goes leaves what is drawn of the others.
    """
    axes = {name: axis if isinstance(axis, Distribution) else tuple(listed(axis)) for name, axis in axes.items()}
    total = size(axes)
    if total <= search.samples:
        yield from grid(axes)
        return
    streams = {name: numpy_generator(search.seed, "search", *where, name) for name in axes}
    seen: set[tuple[Any, ...]] = set()
    number = 0
    while number < search.samples:
        drawn = {name: value_at(axis, float(streams[name].random())) for name, axis in axes.items()}
        if math.isinf(total) or tuple(drawn.values()) not in seen:
            seen.add(tuple(drawn.values()))
            number += 1
            yield drawn


def size(axes: Mapping[str, Axis]) -> float:
    """How many settings of the axes there are; infinity where one is a range of real numbers."""
    return math.prod(axis.size if isinstance(axis, Distribution) else len(listed(axis)) for axis in axes.values())


def grid(axes: Mapping[str, Axis]) -> Iterator[dict[str, Any]]:
    """All settings of axes that have finitely many."""
    for values in product(*map(listed, axes.values())):
        yield dict(zip(axes, values, strict=True))


def distinct(settings: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The settings without those that came before."""
    found: dict[str, Mapping[str, Any]] = {}
    for setting in settings:
        found.setdefault(canonical_json(setting), setting)
    return list(found.values())


def num_to_choose(axes: Mapping[str, Axis], chosen: Sequence[Mapping[str, Any]], samples: int) -> int:
    """How many of so many settings are still to be chosen; there are no more than the axes have."""
    total = size(axes)
    if math.isinf(total):
        return max(0, samples - len(chosen))
    return max(0, min(samples, int(total)) - len(distinct(chosen)))


def value_at(axis: Axis, share: float) -> Any:
    """The value of an axis below which a share in [0, 1) lies; the values of a list are equally likely."""
    return axis.at(share) if isinstance(axis, Distribution) else axis[int(share * len(axis))]


def listed(axis: Axis) -> Sequence[Any]:
    """All values of an axis that has finitely many."""
    if not isinstance(axis, Distribution):
        return tuple(dict.fromkeys(axis))
    return range(axis.values[0], axis.values[1] + 1) if axis.is_whole else axis.values


def is_open(axis: Axis) -> bool:
    """Whether there is anything to choose."""
    return isinstance(axis, Distribution) or len(axis) > 1


def objective_of(outputs: Outputs, objective: str) -> float:
    """What Optuna goes by, of one run: computed without the test split, so that nothing of it can take part.

    Raises InputError for a metric that needs the test split, or that says nothing of the split.
    """
    name, _, split = objective.partition("/")
    try:
        found = METRICS[name]({"outputs": {part: of for part, of in outputs.items() if part != "test"}}, {})
        return float(found[split])
    except KeyError as error:
        lacking = f"the split {error} is not there" if error.args[0] != split else f"it has no value for {split}"
        raise InputError(
            f"search.objective is {objective}, and {lacking}; allowed: a metric of validation, retain or forget alone "
            "(data.num_validation gives data a validation split)"
        ) from None


def check_objective(objective: str, splits: Iterable[str]) -> None:
    """Raise InputError where an objective cannot be had from these splits, tried on outputs that are made up."""
    rng = numpy_generator(0, "made-up outputs")
    labels = np.arange(30) % 3
    made = {part: SplitOutputs(rng.normal(size=(30, 3)).astype(np.float16), labels, labels) for part in splits}
    objective_of(made, objective)
