"""A study: the settings and axes that a recipe returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from orchestrator.localization import TopH, has_own_budget
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.models import is_transformer
from orchestrator.proxies import PROXIES
from orchestrator.registry import InputError, coerce, suggest
from orchestrator.specs import (
    CampaignSpec,
    DataSource,
    Estimator,
    ForgetSet,
    ForgetSpec,
    MaskSpec,
    Method,
    Model,
    OriginalSpec,
    Proxy,
    RunSpec,
    ScoresSpec,
    Setting,
    Spec,
    StageSpec,
    StandInSpec,
    Strategy,
    TrainingSpec,
    check_fraction,
    check_granularity,
    check_stage,
    key,
)
from orchestrator.unlearning import METHODS

CAMPAIGN = "campaign"


class Campaign(Spec):
    """How many subset models, on which share of the training set, and what of them scores are made of."""

    models: int = Field(default=200, ge=BLOCK_SIZE)
    fraction: float = 0.7
    seed: int = 0
    estimator: Estimator = "correctness"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.models % BLOCK_SIZE:
            raise InputError(f"campaign.models is {self.models}; allowed: a multiple of {BLOCK_SIZE}")
        check_fraction(self.fraction)
        if self.estimator == "probability" and self.blocks == 1 and self.fraction in (0.1, 0.9):
            raise InputError("scores of probabilities need two models on each side: set campaign.models to 20 or more")
        return self

    @property
    def blocks(self) -> int:
        return self.models // BLOCK_SIZE


class Arm(Spec):
    """A named combination of strategy, granularity and method; every list in it is an axis of the grid.

    A budget of None (`own` on the command line) is the one that the strategy ends at. For `h`, `train_head` and
    `freeze_statistics` see localization.TopH, localization.Ranking.mask and training.Mask. `stages` are those of a
    composed method, the least memorized part's first; `scores` is what its parts go by, `campaign` or proxies.
    """

    method: str
    options: Mapping[str, tuple[Any, ...]] = Field(default_factory=dict)
    strategy: Strategy | None = None
    base: Strategy | None = None
    granularity: Literal["param", "channel"] = "channel"
    budget: tuple[float | None, ...] = ()
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
        coerced = {}
        for name, values in self.options.items():
            if name not in entry.options:
                raise InputError(f"method {self.method} has no option {name!r}; {suggest(name, entry.options)}")
            coerced[name] = tuple(entry.coerce(name, value) for value in values)
        object.__setattr__(self, "options", coerced)
        if (self.strategy is not None or self.budget) and "mask" not in entry.inputs:
            raise InputError(f"method {self.method} chooses its own parameters: it takes no strategy or budget")
        if self.stages and "stages" not in entry.inputs:
            raise InputError(f"method {self.method} has no stages; those that have: {', '.join(_asking('stages'))}")
        if self.scores and "memorization" not in entry.inputs:
            by = ", ".join(_asking("memorization"))
            raise InputError(f"method {self.method} does not go by memorization scores; those that do: {by}")
        for budget in self.budget:
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
            if None in self.budget and not has_own_budget(self.strategy.entry):
                raise InputError(f"strategy {self.strategy.name} has no budget of its own; allowed: shares in (0, 1]")

    def methods(self) -> Iterator[Method]:
        """Every combination of the options."""
        for values in product(*self.options.values()):
            yield Method(name=self.method, options=dict(zip(self.options, values, strict=True)))

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
        for budget in self.budget:
            yield MaskSpec(
                strategy=self.strategy,
                base=self.base,
                granularity=self.granularity,
                budget=budget,
                train_head=self.train_head,
                h="all" if self.h == "released" and is_transformer(model.entry) else self.h,
                freeze_statistics=self.freeze_statistics,
            )


def _asking(name: str) -> list[str]:
    return [method for method, entry in METHODS.items() if name in entry.inputs]


def check_scores(name: str) -> str:
    """The name of what goes by memorization: the campaign, or a proxy; InputError for another."""
    if name != CAMPAIGN and name not in PROXIES:
        raise InputError(f"scores is {name!r}; {suggest(name, (CAMPAIGN, *PROXIES))}")
    return name


class Study(Spec):
    """An experiment before it is multiplied out.

    Protocol `paired`: data and forget draw are fixed; original and unlearning seed vary together over `seeds`. `del`,
    as in the paper: one original (of seed `original_seed`) and one draw; unlearning varies. `joint`: forget draw,
    original and unlearning vary together, and every draw has references of its own seeds; the data are fixed.

    scores: what forget sets by memorization go by, the `campaign` or the name of a proxy (whose values have a scale of
    their own: a forget set's `centre` must be set with it).
    """

    recipe: str
    data: DataSource
    model: Model
    training: TrainingSpec
    campaign: Campaign = Campaign()
    forget_sets: tuple[ForgetSet, ...]
    scores: str = "campaign"
    protocol: Literal["paired", "del", "joint"] = "paired"
    forget_draw: int = Field(default=0, ge=0)
    original_seed: int = Field(default=0, ge=0)
    references: int = Field(default=5, ge=1)
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: Mapping[str, Arm]

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise InputError(f"seeds are {','.join(map(str, seeds)) or 'none'}; allowed: distinct whole numbers from 0")
        return seeds

    @field_validator("forget_sets")
    @classmethod
    def _unrepeated(cls, forget_sets: tuple[ForgetSet, ...]) -> tuple[ForgetSet, ...]:
        names = [rule.name for rule in forget_sets]
        if not names or len(set(names)) < len(names):
            raise InputError(f"forget_sets are {','.join(names) or 'none'}; allowed: one or more distinct names")
        return forget_sets

    @field_validator("scores")
    @classmethod
    def _known(cls, scores: str) -> str:
        return check_scores(scores)

    def setting(self, fingerprint: str) -> Setting:
        return Setting(data=fingerprint, model=self.model, training=self.training)

    def campaign_spec(self, fingerprint: str) -> CampaignSpec:
        return CampaignSpec(setting=self.setting(fingerprint), fraction=self.campaign.fraction, seed=self.campaign.seed)

    def scores_spec(self, fingerprint: str) -> ScoresSpec:
        return ScoresSpec(
            campaign=self.campaign_spec(fingerprint), blocks=self.campaign.blocks, estimator=self.campaign.estimator
        )

    def memorization_spec(self, fingerprint: str, scores: str) -> ScoresSpec | StandInSpec:
        """The scores of the campaign, or what a proxy gives for the first original."""
        if scores == CAMPAIGN:
            return self.scores_spec(fingerprint)
        original = OriginalSpec(setting=self.setting(fingerprint), seed=self.original_of(self.seeds[0]))
        return StandInSpec(original=original, proxy=Proxy(name=scores))

    @property
    def scores_used(self) -> tuple[str, ...]:
        """What forget sets and methods go by, without repetition: `campaign`, or names of proxies."""
        drawn = any("memorization" in rule.entry.inputs for rule in self.forget_sets)
        methods = [name for arm in self.methods.values() for name in arm.memorization() if name is not None]
        return tuple(dict.fromkeys([*([self.scores] if drawn else []), *methods]))

    def draw_of(self, seed: int) -> int:
        """The forget draw that goes with a seed."""
        return seed if self.protocol == "joint" else self.forget_draw

    def original_of(self, seed: int) -> int:
        """The seed of the original that goes with a seed."""
        return self.original_seed if self.protocol == "del" else seed

    def forget_spec(self, fingerprint: str, rule: ForgetSet, draw: int) -> ForgetSpec:
        """A forget set as drawn; a rule that draws nothing has one draw."""
        return ForgetSpec(
            rule=rule,
            draw=draw if "rng" in rule.entry.inputs else 0,
            scores=self.memorization_spec(fingerprint, self.scores) if "memorization" in rule.entry.inputs else None,
        )

    def forget_specs(self, fingerprint: str) -> list[ForgetSpec]:
        """The distinct drawn forget sets, in the order of rules and seeds."""
        specs = [
            self.forget_spec(fingerprint, rule, self.draw_of(seed)) for rule in self.forget_sets for seed in self.seeds
        ]
        return list({key(spec): spec for spec in specs}.values())

    def originals(self, fingerprint: str) -> list[OriginalSpec]:
        distinct = dict.fromkeys(self.original_of(seed) for seed in self.seeds)
        return [OriginalSpec(setting=self.setting(fingerprint), seed=seed) for seed in distinct]

    def reference_runs(self, fingerprint: str) -> list[RunSpec]:
        return [
            RunSpec(
                setting=self.setting(fingerprint),
                forget=forget,
                method=Method(name="retrain"),
                original_seed=None,
                seed=seed + (forget.draw * self.references if self.protocol == "joint" else 0),
            )
            for forget in self.forget_specs(fingerprint)
            for seed in range(self.references)
        ]

    def runs(self, fingerprint: str) -> list[tuple[str, RunSpec]]:
        """All runs of the grid with the name of their arm, in the order of forget sets, arms, axes and seeds."""
        setting = self.setting(fingerprint)
        drawn = {
            (rule.name, seed): self.forget_spec(fingerprint, rule, self.draw_of(seed))
            for rule in self.forget_sets
            for seed in self.seeds
        }
        return [
            (
                name,
                RunSpec(
                    setting=setting,
                    forget=drawn[rule.name, seed],
                    method=method,
                    original_seed=self.original_of(seed) if "model" in method.entry.inputs else None,
                    mask=mask,
                    seed=seed,
                    memorization=None if scores is None else self.memorization_spec(fingerprint, scores),
                    stages=stages,
                ),
            )
            for rule in self.forget_sets
            for name, arm in self.methods.items()
            for method in arm.methods()
            for mask in arm.masks(self.model)
            for scores in arm.memorization()
            for stages in arm.composed(self.model)
            for seed in self.seeds
        ]
