"""An arm: a combination of localization and method, the axes in it, and the candidates that they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from orchestrator import search
from orchestrator.axes import Distribution, fitted, parse
from orchestrator.localization import TopH, has_own_budget
from orchestrator.models import is_transformer
from orchestrator.proxies import PROXIES
from orchestrator.registry import InputError, PositiveShare, canonical_json, coerce, suggest
from orchestrator.search import Search
from orchestrator.specs import MaskSpec, Method, Model, Spec, StageSpec, Strategy, check_granularity, check_stage
from orchestrator.unlearning import METHODS

CAMPAIGN = "campaign"


def _parsed(value: object) -> object:
    return (parse(value) or value) if isinstance(value, str) else value


Drawn = Annotated[Distribution, BeforeValidator(_parsed), PlainSerializer(str, return_type=str)]


class Candidate(NamedTuple):
    """One setting of an arm: what its runs for each forget set and seed have in common."""

    method: Method
    mask: MaskSpec | None
    scores: str | None
    stages: tuple[StageSpec, ...]


class Arm(Spec):
    """A named combination of strategy, granularity and method; every list or distribution in it is an axis.

    A budget of None (`own` on the command line) is the one that the strategy ends at. For `h`, `train_head` and
    `freeze_statistics` see localization.TopH, localization.Ranking.mask and training.Mask. `stages` are those of a
    composed method, the least memorized part's first; `scores` is what its parts go by, `campaign` or proxies.
    """

    method: str
    options: Mapping[str, tuple[Any, ...] | Drawn] = Field(default_factory=dict)
    strategy: Strategy | None = None
    base: Strategy | None = None
    granularity: Literal["param", "channel"] = "channel"
    budget: tuple[float | None, ...] | Drawn = ()
    h: int | float | str = "released"
    train_head: bool = True
    freeze_statistics: bool = False
    stages: tuple[Arm, ...] = ()
    scores: tuple[str, ...] = ()

    @field_validator("scores")
    @classmethod
    def _known(cls, scores: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_scores(name) for name in scores)

    @model_validator(mode="after")
    def _check(self) -> Self:
        entry = METHODS[self.method]
        coerced: dict[str, tuple[Any, ...] | Distribution] = {}
        for name, values in self.options.items():
            if name not in entry.options:
                raise InputError(f"method {self.method} has no option {name!r}; {suggest(name, entry.options)}")
            if isinstance(values, Distribution):
                coerced[name] = fitted(values, entry.options[name].annotation, f"option {name} of method {self.method}")
            else:
                coerced[name] = tuple(entry.coerce(name, value) for value in values)
        object.__setattr__(self, "options", coerced)
        if (self.strategy is not None or self.budget) and "mask" not in entry.inputs:
            raise InputError(f"method {self.method} chooses its own parameters: it takes no strategy or budget")
        if self.stages and "stages" not in entry.inputs:
            raise InputError(
                f"method {self.method} has no stages; those that have: {', '.join(methods_asking('stages'))}"
            )
        if self.scores and "memorization" not in entry.inputs:
            by = ", ".join(methods_asking("memorization"))
            raise InputError(f"method {self.method} does not go by memorization scores; those that do: {by}")
        if isinstance(self.budget, Distribution):
            object.__setattr__(self, "budget", fitted(self.budget, PositiveShare | None, "budget"))
        for budget in self.budgets:
            if budget is not None and not 0 < budget <= 1:
                raise InputError(f"budget is {budget}; allowed: a share of the parameter entries in (0, 1]")
        object.__setattr__(self, "h", coerce(self.h, TopH, "h"))
        return self

    def check_whole(self) -> None:
        """Raise InputError where strategy, base and budget do not go together; they may be set one after another."""
        if self.strategy is None and self.budget:
            raise InputError(f"method {self.method} has a budget but no strategy; set its strategy too")
        if not self.stages and "stages" in METHODS[self.method].inputs:
            raise InputError(
                f"method {self.method} needs stages; set its stages to methods, that for the least memorized first"
            )
        for stage in self.stages:
            check_stage(stage.method)
            stage.check_whole()
        if self.strategy is not None and not self.budget:
            raise InputError(f"strategy {self.strategy.name} has no budget; set budget to shares in (0, 1]")
        wanted = self.strategy is not None and "base" in self.strategy.entry.inputs
        if wanted != (self.base is not None):
            name = f"strategy {self.strategy.name}" if self.strategy is not None else f"method {self.method}"
            raise InputError(f"{name} {'needs' if wanted else 'takes no'} base strategy")
        if self.strategy is not None:
            check_granularity(self.strategy, self.granularity)
            if None in self.budgets and not has_own_budget(self.strategy.entry):
                raise InputError(f"strategy {self.strategy.name} has no budget of its own; allowed: shares in (0, 1]")

    @property
    def budgets(self) -> tuple[float | None, ...]:
        """The budgets that are known: those of a list, and those that a distribution ends at or chooses from."""
        return self.budget.values if isinstance(self.budget, Distribution) else self.budget

    def axes(self) -> dict[str, tuple[Any, ...] | Distribution]:
        """What is chosen within a cell: options, a budget that is drawn, and those of the stages (`stages.1.lr`)."""
        own = dict(self.options) | ({"budget": self.budget} if isinstance(self.budget, Distribution) else {})
        for place, stage in enumerate(self.stages, 1):
            own |= {f"stages.{place}.{name}": axis for name, axis in stage.axes().items()}
        return own

    @property
    def is_drawn(self) -> bool:
        """Whether an axis is a distribution, which a grid has no values of."""
        return any(isinstance(axis, Distribution) for axis in self.axes().values())

    def at(self, values: Mapping[str, Any]) -> Arm:
        """The arm with each of its axes at one value."""
        changed: dict[str, Any] = {"options": {name: (values[name],) for name in self.options}}
        if isinstance(self.budget, Distribution):
            changed["budget"] = (values["budget"],)
        changed["stages"] = tuple(
            stage.at({name: values[f"stages.{place}.{name}"] for name in stage.axes()})
            for place, stage in enumerate(self.stages, 1)
        )
        return self.model_copy(update=changed)

    def cells(self) -> Iterator[Arm]:
        """The arm at each of its cells: one budget that is listed, of the stages too, and one ranking of scores."""
        budgets: list[tuple[float | None, ...] | Distribution] = [self.budget]
        if not isinstance(self.budget, Distribution) and self.budget:
            budgets = [(one,) for one in self.budget]
        rankings: list[tuple[str, ...]] = [(one,) for one in self.scores] or [()]
        for budget, scores, stages in product(budgets, rankings, product(*(stage.cells() for stage in self.stages))):
            yield self.model_copy(update={"budget": budget, "scores": scores, "stages": stages})

    @property
    def place(self) -> str:
        """The text that names a cell to what is drawn in it: all of the arm but its axes."""
        drawn = {"options", "stages"} | ({"budget"} if isinstance(self.budget, Distribution) else set())
        own = self.model_dump(mode="json", exclude=drawn, exclude_defaults=True)
        return canonical_json([own, *(stage.place for stage in self.stages)])

    def methods(self, chosen: Search | None = None, name: str = "") -> Iterator[Method]:
        """The candidates: every combination of the options, or what a random search draws in the (only) cell `self`."""
        if chosen is not None and self.is_random(chosen):
            drawn = search.draws(self.axes(), chosen, name, self.place)
            yield from dict.fromkeys(method for values in drawn for method in self.at(values).methods())
            return
        if self.is_drawn:
            raise InputError(f"method {self.method} has an axis that is a distribution: a grid has no values of it")
        for values in product(*map(search.listed, self.options.values())):
            yield Method(name=self.method, options=dict(zip(self.options, values, strict=True)))

    def is_random(self, chosen: Search) -> bool:
        """Whether a search draws the candidates."""
        return chosen.kind == "random" or (chosen.kind is None and self.is_drawn)

    def candidates(self, model: Model, chosen: Search | None = None, name: str = "") -> Iterator[Candidate]:
        """Every setting: those of the grid, or `samples` draws in each cell, of all axes together."""
        if chosen is not None and self.is_random(chosen):
            for cell in self.cells():
                for values in search.draws(cell.axes(), chosen, name, cell.place):
                    yield from cell.at(values).candidates(model)
            return
        for method in self.methods():
            for mask in self.masks(model):
                for scores in self.memorization():
                    for stages in self.composed(model):
                        yield Candidate(method, mask, scores, stages)

    def memorization(self) -> tuple[str | None, ...]:
        """What each run's parts go by; None for a method that does not ask."""
        if "memorization" not in METHODS[self.method].inputs:
            return (None,)
        return self.scores or (CAMPAIGN,)

    def composed(self, model: Model) -> Iterator[tuple[StageSpec, ...]]:
        """Every combination of the stages' options and masks."""
        each = [[(m, mask) for m in stage.methods() for mask in stage.masks(model)] for stage in self.stages]
        for chosen in product(*each):
            yield tuple(StageSpec(method=method, mask=mask) for method, mask in chosen)

    def masks(self, model: Model) -> Iterator[MaskSpec | None]:
        """Every budget, or None where the arm has no strategy. The released `h` of a transformer is `all`."""
        self.check_whole()
        if self.strategy is None:
            yield None
            return
        for budget in self.budgets:
            yield MaskSpec(
                strategy=self.strategy,
                base=self.base,
                granularity=self.granularity,
                budget=budget,
                train_head=self.train_head,
                h="all" if self.h == "released" and is_transformer(model.entry) else self.h,
                freeze_statistics=self.freeze_statistics,
            )


def methods_asking(name: str) -> list[str]:
    """The methods that ask for an input."""
    return [method for method, entry in METHODS.items() if name in entry.inputs]


def check_scores(name: str) -> str:
    """The name of what goes by memorization: the campaign, or a proxy; InputError for another."""
    if name != CAMPAIGN and name not in PROXIES:
        raise InputError(f"scores is {name!r}; {suggest(name, (CAMPAIGN, *PROXIES))}")
    return name
