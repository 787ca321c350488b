"""A study: the settings and axes that a recipe returns, and the `--set` overrides that they check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

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
    Named,
    OriginalSpec,
    Proxy,
    RunSpec,
    ScoresSpec,
    Setting,
    Spec,
    StandInSpec,
    Strategy,
    TrainingSpec,
    check_fraction,
    check_granularity,
    key,
)
from orchestrator.unlearning import METHODS

T = TypeVar("T")
N = TypeVar("N", bound=Named)


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
    `freeze_statistics` see localization.TopH, localization.Ranking.mask and training.Mask.
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
        for budget in self.budget:
            if budget is not None and not 0 < budget <= 1:
                raise InputError(f"budget is {budget}; allowed: a share of the parameter entries in (0, 1]")
        object.__setattr__(self, "h", coerce(self.h, TopH, "h"))
        return self

    def check_whole(self) -> None:
        """Raise InputError where strategy, base and budget do not go together; they may be set one after another."""
        if self.strategy is None and self.budget:
            raise InputError(f"method {self.method} has a budget but no strategy; set its strategy too")
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
        if scores != CAMPAIGN and scores not in PROXIES:
            raise InputError(f"scores is {scores!r}; {suggest(scores, (CAMPAIGN, *PROXIES))}")
        return scores

    def setting(self, fingerprint: str) -> Setting:
        return Setting(data=fingerprint, model=self.model, training=self.training)

    def campaign_spec(self, fingerprint: str) -> CampaignSpec:
        return CampaignSpec(setting=self.setting(fingerprint), fraction=self.campaign.fraction, seed=self.campaign.seed)

    def scores_spec(self, fingerprint: str) -> ScoresSpec:
        return ScoresSpec(
            campaign=self.campaign_spec(fingerprint), blocks=self.campaign.blocks, estimator=self.campaign.estimator
        )

    def memorization_spec(self, fingerprint: str) -> ScoresSpec | StandInSpec:
        """What forget sets go by."""
        if self.scores == CAMPAIGN:
            return self.scores_spec(fingerprint)
        original = OriginalSpec(setting=self.setting(fingerprint), seed=self.original_of(self.seeds[0]))
        return StandInSpec(original=original, proxy=Proxy(name=self.scores))

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
            scores=self.memorization_spec(fingerprint) if "memorization" in rule.entry.inputs else None,
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
                ),
            )
            for rule in self.forget_sets
            for name, arm in self.methods.items()
            for method in arm.methods()
            for mask in arm.masks(self.model)
            for seed in self.seeds
        ]


# ---- overrides -----------------------------------------------------------------------------------------------------


class _ValueError(InputError):
    """A value that its field does not allow; `allowed` says what would be."""

    def __init__(self, place: str, value: object, allowed: str) -> None:
        self.allowed = allowed
        super().__init__(f"{place} is {value!r}; allowed: {allowed}")


def checked(build: Callable[[], T]) -> T:
    """Build a spec; what pydantic or a registry finds wrong becomes one InputError sentence."""
    try:
        return build()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        cause = (first.get("ctx") or {}).get("error")
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from None
        allowed = first["msg"].removeprefix("Input should be ").partition(", unable")[0]
        raise _ValueError(place, first["input"], allowed[0].lower() + allowed[1:]) from None


def override(study: Study, assignments: Iterable[str]) -> Study:
    """Apply `field=value` texts in turn; see `assign` for what a field may be.

    A function named anew that has options without a default takes them from the texts that follow.
    """
    texts, changed = list(assignments), study
    for place, text in enumerate(texts):
        changed = assign(changed, text, dict(_split(later) for later in texts[place + 1 :]))
    for arm in changed.methods.values():
        arm.check_whole()  # not before: a strategy may be set before its budget
    return changed


def _split(assignment: str) -> tuple[str, str]:
    path, _, text = assignment.partition("=")
    return path, text


def assign(study: Study, assignment: str, later: Mapping[str, str] | None = None) -> Study:
    """Apply one `field=value`; `later` holds the values that follow by field.

    Fields of the study and of its parts (`references`, `seeds`, `training.epochs`, `campaign.models`), options of its
    functions (`data.train`, `model.width`, `forget_sets.random.fraction`), which `methods` and `forget_sets` take part,
    one arm's axes (`methods.del.lr=0.03,0.1`, `.budget`, `.strategy`, `.granularity`), or an axis of all arms that
    have it (`lr=0.1`, `budget=0.1,0.3`). Raises InputError with what, got and allowed.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise InputError(f"--set takes field=value; got {assignment!r}")
    try:
        return _assigned(study, path, text, later or {})
    except _ValueError as error:
        raise InputError(f"{path} is {text!r}; allowed: {error.allowed}") from None


def _assigned(study: Study, path: str, text: str, later: Mapping[str, str]) -> Study:
    field, *rest = path.split(".")
    changes: Any
    if field in ("data", "model"):
        changes = _named(getattr(study, field), rest, text, path, later)
    elif field in ("training", "campaign"):
        changes = _part(getattr(study, field), rest, text, path)
    elif field == "forget_sets":
        changes = _forget_sets(study.forget_sets, rest, text, path, later)
    elif field == "methods":
        changes = _arms(study.methods, rest, text, path)
    elif field == "seeds" and not rest:
        changes = text.split(",")
    elif field in ("references", "forget_draw", "original_seed", "protocol", "scores") and not rest:
        changes = text
    elif not rest and _arms_with(study, field):
        arms = _arms_with(study, field)
        field, changes = (
            "methods",
            {name: _arm(arm, path, text, path) if name in arms else arm for name, arm in study.methods.items()},
        )
    else:
        raise InputError(f"unknown field {path!r}; {suggest(path, _fields(study))}")
    changed: Study = _rebuild(study, field, changes)
    return changed


def _rebuild(spec: Any, field: str, value: Any) -> Any:
    fields = {name: getattr(spec, name) for name in type(spec).model_fields}
    return checked(lambda: type(spec)(**fields | {field: value}))


def _fields(study: Study) -> list[str]:
    """The fields that `--set` knows, for error messages."""
    named = [f"{part}.{option}" for part in ("data", "model") for option in getattr(study, part).entry.options]
    parts = [f"{p}.{field}" for p in ("training", "campaign") for field in type(getattr(study, p)).model_fields]
    axes = {option for arm in study.methods.values() for option in METHODS[arm.method].options}
    plain = [
        "data",
        "model",
        "references",
        "seeds",
        "protocol",
        "scores",
        "forget_draw",
        "original_seed",
        "forget_sets",
        "methods",
    ]
    return [*plain, "budget", *named, *parts, *sorted(axes)]


def _new(kind: type[N], name: str, prefix: str, later: Mapping[str, str]) -> N:
    """A function by name, its options without a default taken from the values that follow."""
    needed = [option.name for option in kind.registry[name].options.values() if option.is_required]
    given = {option: later[f"{prefix}.{option}"] for option in needed if f"{prefix}.{option}" in later}
    return checked(lambda: kind(name=name, options=given))


def _named(named: N, rest: list[str], text: str, path: str, later: Mapping[str, str] | None = None) -> N:
    kind = type(named)
    if not rest:
        return _new(kind, text, path, later or {})
    if len(rest) > 1:
        raise InputError(f"unknown field {path!r}; {suggest(rest[0], named.entry.options)}")
    return checked(lambda: kind(name=named.name, options={**named.options, rest[0]: text}))


def _part(part: Any, rest: list[str], text: str, path: str) -> Any:
    if len(rest) != 1 or rest[0] not in type(part).model_fields:
        raise InputError(f"unknown field {path!r}; {suggest('.'.join(rest), type(part).model_fields)}")
    return _rebuild(part, rest[0], text)


def _forget_sets(
    rules: tuple[ForgetSet, ...], rest: list[str], text: str, path: str, later: Mapping[str, str]
) -> tuple[ForgetSet, ...]:
    by_name = {rule.name: rule for rule in rules}
    if not rest:
        return tuple(by_name.get(name) or _new(ForgetSet, name, f"{path}.{name}", later) for name in text.split(","))
    if rest[0] not in by_name:
        raise InputError(f"unknown field {path!r}; {suggest(rest[0], by_name)}")
    return tuple(_named(rule, rest[1:], text, path) if rule.name == rest[0] else rule for rule in rules)


def _arms(arms: Mapping[str, Arm], rest: list[str], text: str, path: str) -> dict[str, Arm]:
    if not rest:
        chosen = {}
        for name in filter(None, text.split(",")):
            if name not in arms and name not in METHODS:
                raise InputError(f"unknown method {name!r}; {suggest(name, {*arms, *METHODS})}")
            chosen[name] = arms[name] if name in arms else checked(lambda n=name: Arm(method=n))  # type: ignore[misc]
        if not chosen:
            raise InputError(f"methods is {text!r}; {suggest(text, {*arms, *METHODS})}")
        return chosen
    if rest[0] not in arms:
        raise InputError(f"unknown field {path!r}; {suggest(rest[0], arms)}")
    return {name: _arm(arm, ".".join(rest[1:]), text, path) if name == rest[0] else arm for name, arm in arms.items()}


def _arm(arm: Arm, field: str, text: str, path: str) -> Arm:
    options = METHODS[arm.method].options
    part, _, option = field.partition(".")
    if field == "budget":
        budgets = [None if share == "own" else share for share in text.split(",")]
        changed: Arm = _rebuild(arm, "budget", budgets)
    elif field in ("granularity", "h", "train_head", "freeze_statistics"):
        changed = _rebuild(arm, field, text)
    elif field in ("strategy", "base"):
        changed = _rebuild(arm, field, None if text == "none" else checked(lambda: Strategy(name=text)))
    elif part in ("strategy", "base") and getattr(arm, part) is not None:
        changed = _rebuild(arm, part, _named(getattr(arm, part), [option], text, path))
    elif field in options:
        changed = _rebuild(arm, "options", {**arm.options, field: tuple(text.split(","))})
    else:
        raise InputError(f"unknown field {path!r}; {suggest(field, [*options, *set(Arm.model_fields) - _FIXED])}")
    return changed


_FIXED = {"method", "options"}  # fields of an arm that --set does not name


def _arms_with(study: Study, axis: str) -> set[str]:
    if axis == "budget":
        return {name for name, arm in study.methods.items() if arm.strategy is not None}
    return {name for name, arm in study.methods.items() if axis in METHODS[arm.method].options}
