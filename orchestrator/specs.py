"""Specs: frozen models that say what a thing IS, and nothing of how or where it is computed; key(spec) names it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from orchestrator.data import DATASETS, Augment
from orchestrator.forget_sets import FORGET_SETS
from orchestrator.localization import STRATEGIES, TopH, granularities, has_own_budget
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.models import MODELS
from orchestrator.proxies import PROXIES
from orchestrator.registry import Added, Entry, InputError, Registry, canonical_json, coerce
from orchestrator.training import Training
from orchestrator.unlearning import METHODS


class Spec(BaseModel):
    """Base of all specs: immutable, and without fields that nobody declared.

    A field added after a release declares `json_schema_extra={"unhashed_at": value}`, the value at which it stays
    out of the hash, so that keys made before it hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Named(Spec):
    """A registered function by name, with its options resolved (defaults filled in, types coerced)."""

    registry: ClassVar[Registry[Any]]

    name: str
    options: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        object.__setattr__(self, "options", self.entry.resolve(self.options))
        return self

    @property
    def entry(self) -> Entry[Any]:
        return self.registry[self.name]

    @property
    def label(self) -> str:
        """The name, with the options that differ from their defaults."""
        changed = [
            f"{name}={_plain(value)}"
            for name, value in self.options.items()
            if value != self.entry.options[name].default
        ]
        return self.name + (f"({', '.join(changed)})" if changed else "")

    def __hash__(self) -> int:
        return hash((type(self), canonical_json(canonical(self))))


class DataSource(Named):
    """Where a data set comes from: provenance, never part of a key (the fingerprint of its arrays is)."""

    registry = DATASETS


class Model(Named):
    """An architecture."""

    registry = MODELS


class ForgetSet(Named):
    """A rule that says which training examples are to be forgotten."""

    registry = FORGET_SETS


class Strategy(Named):
    """A localization strategy."""

    registry = STRATEGIES


class Method(Named):
    """An unlearning method."""

    registry = METHODS


class Proxy(Named):
    """A cheap stand-in for memorization."""

    registry = PROXIES


class TrainingSpec(Spec):
    """How originals, references and subset models are trained; see training.Training."""

    learning_rate: float = Field(gt=0)
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)
    final: float = Field(default=0.01, ge=0, le=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    schedule: Literal["step", "epoch"] = Field(default="step", json_schema_extra={"unhashed_at": "step"})
    augment: Augment = Field(default="none", json_schema_extra={"unhashed_at": "none"})

    def build(self) -> Training:
        return Training(**self.model_dump())


class Setting(Spec):
    """Data (by fingerprint), architecture and training recipe: what every model of an experiment shares."""

    data: str
    model: Model
    training: TrainingSpec


class CampaignSpec(Spec):
    """The subset models of one memorization estimate. Their number is not part of it: a campaign grows by blocks."""

    setting: Setting
    fraction: float = 0.7
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_fraction(self.fraction)
        return self


def check_fraction(fraction: float) -> None:
    """Raise InputError unless a subset fraction is a whole number of tenths, between 1 and 9."""
    if fraction not in [k / BLOCK_SIZE for k in range(1, BLOCK_SIZE)]:
        raise InputError(f"campaign.fraction is {fraction}; allowed: 0.1, 0.2, ... 0.9")


Estimator = Literal["correctness", "probability"]
"""What of a subset model a score is the difference of: right or wrong (0/1), or the given label's probability."""


class ScoresSpec(Spec):
    """Memorization scores from the first `blocks` blocks of a campaign."""

    campaign: CampaignSpec
    blocks: int = Field(ge=1)
    estimator: Estimator = "correctness"


class InfluenceSpec(Spec):
    """Pairs of training and test examples with an influence of at least `threshold`, of the models behind `scores`.

    `memorization`: the least score of the training examples that are looked at; None: all are.
    """

    scores: ScoresSpec
    threshold: float = Field(default=0.15, gt=0, le=1)
    memorization: float | None = 0.25


class OriginalSpec(Spec):
    """A model trained on the whole training set."""

    setting: Setting
    seed: int


class SingleSpec(Spec):
    """One training for exact scores: on the whole training set, or on all but the example left out."""

    setting: Setting
    left_out: int | None = Field(ge=0)
    seed: int = Field(ge=0)


class ExactSpec(Spec):
    """Exact scores of some training examples, from `seeds` trainings with all examples and as many without each one."""

    setting: Setting
    indices: tuple[int, ...]
    seeds: int = Field(ge=2)

    @field_validator("indices")
    @classmethod
    def _sorted(cls, indices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(indices))

    @property
    def singles(self) -> list[SingleSpec]:
        """The trainings, seed by seed: the first of each has all examples, and serves every one of them."""
        return [
            SingleSpec(setting=self.setting, left_out=left_out, seed=seed)
            for seed in range(self.seeds)
            for left_out in (None, *self.indices)
        ]


class ProxiesSpec(Spec):
    """Stand-ins for memorization from one training run, that of an original; each is stored by itself."""

    original: OriginalSpec
    proxies: tuple[Proxy, ...]

    @property
    def each(self) -> tuple[StandInSpec, ...]:
        return tuple(StandInSpec(original=self.original, proxy=proxy) for proxy in self.proxies)


class StandInSpec(Spec):
    """One proxy of a training run, in place of memorization scores."""

    original: OriginalSpec
    proxy: Proxy


class ForgetSpec(Spec):
    """One drawn forget set; `scores` (of a campaign, or a stand-in) only where its rule asks for memorization."""

    rule: ForgetSet
    draw: int = 0
    scores: ScoresSpec | StandInSpec | None = None


class LocalizationSpec(Spec):
    """The scores of one strategy for one original and forget set; all budgets share them.

    `granularity` is None for strategies whose scores do not depend on it.
    """

    original: OriginalSpec
    forget: ForgetSpec
    strategy: Strategy
    base: Strategy | None = None
    seed: int | None = None
    granularity: Literal["param", "channel"] | None = Field(default=None, json_schema_extra={"unhashed_at": None})

    @property
    def base_spec(self) -> LocalizationSpec | None:
        """The scores that the strategy builds on."""
        if self.base is None:
            return None
        inputs = self.base.entry.inputs
        return LocalizationSpec(
            original=self.original,
            forget=self.forget,
            strategy=self.base,
            seed=self.seed if "generator" in inputs else None,
            granularity=self.granularity if "granularity" in inputs else None,
        )


class MaskSpec(Spec):
    """How a run's mask is selected; see localization.rank and Ranking.mask. A budget of None is the strategy's own."""

    strategy: Strategy
    base: Strategy | None = None
    granularity: Literal["param", "channel"]
    budget: float | None = Field(gt=0, le=1)
    train_head: bool = True
    h: str | int | float = Field(default="released", json_schema_extra={"unhashed_at": "released"})
    freeze_statistics: bool = Field(default=False, json_schema_extra={"unhashed_at": False})

    @model_validator(mode="after")
    def _check(self) -> Self:
        object.__setattr__(self, "h", coerce(self.h, TopH, "h"))
        check_granularity(self.strategy, self.granularity)
        if self.budget is None and not has_own_budget(self.strategy.entry):
            raise InputError(f"strategy {self.strategy.name} has no budget of its own; set budget to shares in (0, 1]")
        return self


def check_granularity(strategy: Strategy, granularity: str) -> None:
    """Raise InputError where a strategy cannot be selected from at a granularity."""
    allowed = granularities(strategy.entry)
    if granularity not in allowed:
        raise InputError(f"granularity of strategy {strategy.name} is {granularity}; allowed: {', '.join(allowed)}")


class StageSpec(Spec):
    """One stage of a composed method: a method that starts from a model, and its mask."""

    method: Method
    mask: MaskSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_stage(self.method.name)
        _check_mask(self.method, self.mask)
        return self


def check_stage(method: str) -> None:
    """Raise InputError for a method that cannot be a stage of another."""
    inputs = METHODS[method].inputs
    if "model" not in inputs or "stages" in inputs:
        raise InputError(
            f"method {method} cannot be a stage: a stage starts from the model that the one before has left, "
            "and has no stages of its own"
        )


def _check_mask(method: Method, mask: MaskSpec | None) -> None:
    if mask is not None and "mask" not in method.entry.inputs:
        raise InputError(f"method {method.name} chooses its own parameters: it takes no strategy or budget")


class RunSpec(Spec):
    """One run: an unlearning method on one original and forget set; a reference is one with the method `retrain`.

    `memorization`: what a method that asks for it is given, of a campaign or a stand-in. `stages`: those of a composed
    method.
    """

    setting: Setting
    forget: ForgetSpec
    method: Method
    original_seed: int | None
    mask: MaskSpec | None = None
    seed: int
    memorization: ScoresSpec | StandInSpec | None = Field(default=None, json_schema_extra={"unhashed_at": None})
    stages: tuple[StageSpec, ...] = Field(default=(), json_schema_extra={"unhashed_at": []})

    @model_validator(mode="after")
    def _check(self) -> Self:
        inputs = self.method.entry.inputs
        for name, is_given in (
            ("model", self.original_seed is not None),
            ("memorization", self.memorization is not None),
            ("stages", bool(self.stages)),
        ):
            if (name in inputs) != is_given:
                said = {"model": "original", "memorization": "memorization scores"}.get(name, name)
                raise InputError(f"method {self.method.name} {'needs' if name in inputs else 'takes no'} {said}")
        _check_mask(self.method, self.mask)
        return self

    @property
    def original(self) -> OriginalSpec | None:
        return None if self.original_seed is None else OriginalSpec(setting=self.setting, seed=self.original_seed)

    @property
    def localization(self) -> LocalizationSpec | None:
        if self.mask is None or self.original is None:
            return None
        random = "generator" in self.mask.strategy.entry.inputs
        parts = [part for part in (self.mask.strategy, self.mask.base) if part is not None]
        depends = any("granularity" in part.entry.inputs for part in parts)
        return LocalizationSpec(
            original=self.original,
            forget=self.forget,
            strategy=self.mask.strategy,
            base=self.mask.base,
            seed=self.seed if random else None,
            granularity=self.mask.granularity if depends else None,
        )

    @property
    def is_reference(self) -> bool:
        return self.method.name == "retrain"


def canonical(value: object, known: dict[int, object] | None = None) -> object:
    """A spec as plain JSON values, with the versions of the registered functions that it names.

    `known` keeps the specs in it that were met, by their identity: for as long as nobody lets go of them.
    """
    if known is None or not isinstance(value, Spec):
        return _canonical(value, known)
    if id(value) not in known:
        known[id(value)] = _canonical(value, known)
    return known[id(value)]


def _canonical(value: object, known: dict[int, object] | None) -> object:
    if isinstance(value, Named):
        declared = value.entry.options
        hashed = {
            n: o for n, o in value.options.items() if not (declared[n].has_mark(Added) and o == declared[n].default)
        }
        return {"name": value.name, "version": value.entry.version, "options": canonical(hashed, known)}
    if isinstance(value, Spec):
        fields = type(value).model_fields
        parts = {name: (getattr(value, name), fields[name].json_schema_extra) for name in fields}
        return {
            name: canonical(part, known)
            for name, (part, extra) in parts.items()
            if not (isinstance(extra, dict) and "unhashed_at" in extra and extra["unhashed_at"] == _as_json(part))
        }
    if isinstance(value, Mapping):
        return {str(name): canonical(part, known) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [canonical(part, known) for part in value]
    if isinstance(value, float):
        return value + 0.0  # -0.0 + 0.0 is 0.0: one form for zero
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{value!r} has no canonical form")


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def key(spec: Spec) -> str:
    """The name of what a spec says: the first 128 bits of the SHA-256 of its kind and its canonical JSON, in hex."""
    return keys([spec])[0]


def keys(specs: Sequence[Spec]) -> list[str]:
    """The keys of many specs; what they share is looked at once."""
    known: dict[int, object] = {}
    texts = (canonical_json([type(spec).__name__, canonical(spec, known)]) for spec in specs)
    return [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
