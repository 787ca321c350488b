"""A study: the settings and axes that a recipe returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from orchestrator.arms import CAMPAIGN, Arm, Candidate, check_scores, methods_asking
from orchestrator.axes import Distribution
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.registry import InputError
from orchestrator.search import Asha, Search, is_open
from orchestrator.specs import (
    CampaignSpec,
    DataSource,
    Estimator,
    ForgetSet,
    ForgetSpec,
    Method,
    Model,
    OriginalSpec,
    Proxy,
    RunSpec,
    ScoresSpec,
    Setting,
    Spec,
    StandInSpec,
    TrainingSpec,
    check_fraction,
    key,
)
from orchestrator.tuning import Tuning
from orchestrator.unlearning import METHODS


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


class Study(Spec):
    """An experiment before it is multiplied out.

    Protocol `paired`: data and forget draw are fixed; original and unlearning seed vary together over `seeds`. `del`,
    as in the paper: one original (of seed `original_seed`) and one draw; unlearning varies. `joint`: forget draw,
    original and unlearning vary together, and every draw has references of its own seeds; the data are fixed.

    scores: what forget sets by memorization go by, the `campaign` or the name of a proxy (whose values have a scale of
    their own: a forget set's `centre` must be set with it).

    tuning: how each arm's options are chosen before they are reported; None reports every combination of them.
    first_reference: the seed of the first reference.
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
    search: Search = Search()
    scheduler: Asha | None = None
    tuning: Tuning | None = None
    first_reference: int = Field(default=0, ge=0)

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
                seed=self.first_reference + seed + (forget.draw * self.references if self.protocol == "joint" else 0),
            )
            for forget in self.forget_specs(fingerprint)
            for seed in range(self.references)
        ]

    def searched(self) -> dict[str, Arm]:
        """The arms of which Optuna chooses the settings: those with something to choose."""
        if self.search.kind != "optuna":
            return {}
        return {name: arm for name, arm in self.methods.items() if any(map(is_open, arm.axes().values()))}

    @property
    def caution(self) -> str:
        """What the results depend on beside what the study says; empty for a grid or random draws run to their end."""
        if self.scheduler is not None:
            return f"{self.scheduler}, so which runs have rows depends on which came first"
        if self.search.kind == "optuna":
            return f"Optuna chose settings by {self.search.objective} of the runs that were over when it was asked"
        return ""

    def check_whole(self) -> None:
        """Raise InputError where arms, search and scheduler do not go together; they may be set one after another."""
        for arm in self.methods.values():
            arm.check_whole()
        for name, arm in self.methods.items():
            for axis, values in arm.axes().items() if self.search.kind == "grid" else ():
                if isinstance(values, Distribution):
                    raise InputError(
                        f"methods.{name}.{axis} is {values}, which a grid has no values of; list values, "
                        "or search at random (--search random)"
                    )
            if self.scheduler is not None and not METHODS[arm.method].inputs & {"report", "stages"}:
                raise InputError(
                    f"method {arm.method} reports no {self.scheduler.metric} by epoch, by which runs would be stopped; "
                    f"set methods to some of those that do: {', '.join(methods_asking('report'))}; or --scheduler none"
                )
        if self.search.kind == "optuna":
            self._check_single()

    def check_used(self, fields: Iterable[str]) -> None:
        """Raise InputError where a field of the search is set that nothing goes by."""
        is_asked = self.search.kind == "optuna"
        drawn = is_asked or any(
            arm.is_random(self.search) and any(map(is_open, arm.axes().values())) for arm in self.methods.values()
        )
        for field in fields:
            got = f"search.{field} is {getattr(self.search, field)}, which nothing goes by"
            if field in ("samples", "seed") and not drawn:
                flag = {"samples": "--samples", "seed": "--search-seed"}[field]
                raise InputError(
                    f"{got}, since no method of this study is searched and every setting is run; allowed with "
                    "a distribution (--set 'lr=loguniform(1e-3, 1e-1)'), --search random or --search optuna; "
                    f"else leave {flag} out"
                )
            if field in ("objective", "direction") and not is_asked:
                raise InputError(f"{got} but Optuna; allowed with --search optuna; else leave --{field} out")

    def _check_single(self) -> None:
        """Raise InputError unless Optuna has one cell to search."""
        searched = self.searched()
        cells = [f"{name} {cell.place}" for name, arm in searched.items() for cell in arm.cells()]
        if (number := len(cells) * len(self.forget_sets)) != 1:
            listed = ", ".join(f"{name} {len(list(arm.cells()))}" for name, arm in searched.items()) or "none"
            raise InputError(
                f"Optuna searches one cell, and this sweep has {number} (methods: {listed}; "
                f"forget sets: {len(self.forget_sets)}); set methods, budget and forget_sets to one each, with an axis "
                "of several values; or use --search random"
            )
        if self.scheduler is not None:
            raise InputError("Optuna needs whole runs to go by, and a scheduler stops some; use --scheduler none")
        self.search.is_maximised  # noqa: B018  # raises where nobody has said

    def runs(self, fingerprint: str, suggestions: Sequence[Mapping[str, Any]] = ()) -> list[tuple[str, RunSpec]]:
        """All runs with the name of their arm, in the order of forget sets, arms, axes and seeds.

        `suggestions` are the settings that Optuna has chosen so far, values by axis.
        """
        setting = self.setting(fingerprint)
        drawn = {
            (rule, seed): self.forget_spec(fingerprint, rule, self.draw_of(seed))
            for rule in self.forget_sets
            for seed in self.seeds
        }
        candidates = {name: self._candidates(name, suggestions) for name in self.methods}
        return [
            (
                name,
                RunSpec(
                    setting=setting,
                    forget=drawn[rule, seed],
                    method=method,
                    original_seed=self.original_of(seed) if "model" in method.entry.inputs else None,
                    mask=mask,
                    seed=seed,
                    memorization=None if scores is None else self.memorization_spec(fingerprint, scores),
                    stages=stages,
                ),
            )
            for rule in self.forget_sets
            for name in self.methods
            for method, mask, scores, stages in candidates[name]
            for seed in self.seeds
        ]

    def _candidates(self, name: str, suggestions: Sequence[Mapping[str, Any]]) -> list[Candidate]:
        arm = self.methods[name]
        if name not in self.searched():
            return list(arm.candidates(self.model, self.search, name))
        cells = [arm.at(values) for values in suggestions]
        return [candidate for cell in cells for candidate in cell.candidates(self.model)]
