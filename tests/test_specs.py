import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import Field, ValidationError

from orchestrator.registry import Entry
from orchestrator.specs import (
    CampaignSpec,
    ForgetSet,
    ForgetSpec,
    LocalizationSpec,
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
    canonical,
    key,
)
from orchestrator.training import Training

TRAINING = TrainingSpec(learning_rate=0.1, epochs=20, batch_size=64, warmup=0.2)
SETTING = Setting(data="f" * 64, model=Model(name="small_cnn"), training=TRAINING)
CAMPAIGN = CampaignSpec(setting=SETTING)
SCORES = ScoresSpec(campaign=CAMPAIGN, blocks=4)
FORGET = ForgetSpec(rule=ForgetSet(name="most_memorized", options={"count": 20}), draw=2, scores=SCORES)
WEIGHTED = Strategy(name="weighted_gradient")
MASK = MaskSpec(
    strategy=Strategy(name="random_within_tensor"), base=WEIGHTED, granularity="channel", budget=0.3, train_head=True
)
RUN = RunSpec(
    setting=SETTING,
    forget=FORGET,
    method=Method(name="reset_and_finetune", options={"lr": 0.03}),
    original_seed=0,
    mask=MASK,
    seed=1,
)
LOCALIZATION = RUN.localization
assert LOCALIZATION is not None
IDENTITY, FINETUNE = Method(name="identity"), Method(name="finetune", options={"lr": 0.1})
COMPOSED = RunSpec(
    setting=SETTING,
    forget=FORGET,
    method=Method(name="rum"),
    original_seed=0,
    seed=1,
    memorization=SCORES,
    stages=(StageSpec(method=IDENTITY), StageSpec(method=FINETUNE, mask=MASK)),
)
SPECS: list[Spec] = [TRAINING, SETTING, CAMPAIGN, SCORES, FORGET, MASK, RUN, LOCALIZATION, WEIGHTED, RUN.method]
SPECS += [COMPOSED, COMPOSED.stages[1]]


def other(spec: Spec, path: tuple[str, ...], value: Any) -> Any:
    """A spec that differs in one field, however deep."""
    first, *rest = path
    inner = getattr(spec, first)
    if rest and isinstance(inner, Spec):
        value = other(inner, tuple(rest), value)
    elif rest:
        value = {**inner, rest[0]: value}
    return type(spec)(**{name: getattr(spec, name) for name in type(spec).model_fields} | {first: value})


CHANGES: list[tuple[tuple[str, ...], Any]] = [
    (("setting", "data"), "e" * 64),
    (("setting", "model", "name"), "resnet9"),
    (("setting", "model", "options", "width"), 17),
    (("setting", "training", "learning_rate"), 0.2),
    (("setting", "training", "epochs"), 21),
    (("setting", "training", "batch_size"), 32),
    (("setting", "training", "momentum"), 0.8),
    (("setting", "training", "weight_decay"), 1e-4),
    (("setting", "training", "warmup"), 0.1),
    (("setting", "training", "final"), 0.02),
    (("setting", "training", "precision"), "bf16"),
    (("setting", "training", "schedule"), "epoch"),
    (("setting", "training", "augment"), "crop_flip"),
    (("forget", "rule"), ForgetSet(name="mislabelled")),
    (("forget", "rule", "options", "count"), 21),
    (("forget", "rule", "options", "unflipped"), False),
    (("forget", "draw"), 3),
    (("forget", "scores", "blocks"), 5),
    (("forget", "scores", "estimator"), "probability"),
    (("forget", "scores", "campaign", "fraction"), 0.5),
    (("forget", "scores", "campaign", "seed"), 1),
    (("method",), Method(name="finetune", options={"lr": 0.03})),
    (("method", "options", "lr"), 0.031),
    (("method", "options", "epochs"), 31),
    (("original_seed",), 5),
    (("seed",), 2),
    (("mask",), None),
    (("mask", "strategy"), Strategy(name="gradient")),
    (("mask", "base"), Strategy(name="gradient")),
    (("mask", "base", "options", "batch_size"), 64),
    (("mask", "granularity"), "param"),
    (("mask", "budget"), 0.31),
    (("mask", "train_head"), False),
    (("mask", "h"), "all"),
    (("mask", "h"), 5),
    (("mask", "h"), 0.5),
    (("mask", "freeze_statistics"), True),
]


def fields_on(path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The kinds of specs and their fields that a path leads through."""
    spec: Any = RUN
    for name in path:
        if not isinstance(spec, Spec):
            return
        yield type(spec).__name__, name
        spec = getattr(spec, name)


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=[".".join(path) for path, _ in CHANGES])
def test_every_identity_field_is_in_the_key(path: tuple[str, ...], value: Any) -> None:
    assert key(other(RUN, path, value)) != key(RUN)


def test_the_changes_above_leave_no_field_out() -> None:
    kinds = (RunSpec, Setting, TrainingSpec, ForgetSpec, ScoresSpec, CampaignSpec, MaskSpec)
    declared = {(kind.__name__, name) for kind in kinds for name in kind.model_fields}
    changed = {step for path, _ in CHANGES for step in fields_on(path)}
    # a campaign's setting is a Setting, whose fields are changed above; what a composed method has follows
    assert declared - changed == {("CampaignSpec", "setting"), ("RunSpec", "memorization"), ("RunSpec", "stages")}


def test_the_key_of_a_composed_run_holds_its_stages_and_what_they_go_by() -> None:
    first, second = COMPOSED.stages
    changes: list[dict[str, Any]] = [
        {},
        {"memorization": SCORES.model_copy(update={"blocks": 5})},
        {"memorization": StandInSpec(original=COMPOSED.original, proxy=Proxy(name="entropy"))},
        {"memorization": StandInSpec(original=COMPOSED.original, proxy=Proxy(name="confidence"))},
        {"stages": (second, first)},
        {"stages": (first, first)},
        {"stages": (first, second, second)},
        {"stages": (first, StageSpec(method=FINETUNE))},
        {"stages": (first, other(second, ("mask", "budget"), 0.5))},
        {"stages": (first, other(second, ("method", "options", "lr"), 0.2))},
    ]
    whole = {name: getattr(COMPOSED, name) for name in RunSpec.model_fields}
    assert len({key(RunSpec(**whole | change)) for change in changes}) == len(changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memorization": None}, "method rum needs memorization scores"),
        ({"stages": ()}, "method rum needs stages"),
        ({"method": FINETUNE}, "method finetune takes no memorization scores"),
        ({"method": FINETUNE, "memorization": None}, "method finetune takes no stages"),
        ({"method": Method(name="rum_shuffled")}, "method rum_shuffled takes no memorization scores"),
    ],
)
def test_a_run_has_what_its_method_asks_for(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunSpec(**{name: getattr(COMPOSED, name) for name in RunSpec.model_fields} | changes)


@pytest.mark.parametrize("name", ["retrain", "rum", "rum_shuffled"])
def test_what_does_not_start_from_a_model_is_no_stage(name: str) -> None:
    with pytest.raises(ValidationError, match=f"method {name} cannot be a stage"):
        StageSpec(method=Method(name=name))


def test_the_keys_of_all_changes_differ() -> None:
    keys = [key(other(RUN, path, value)) for path, value in CHANGES]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in keys)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_a_spec_survives_json(spec: Spec) -> None:
    again = type(spec).model_validate_json(spec.model_dump_json())
    assert again == spec
    assert key(again) == key(spec)
    assert hash(again) == hash(spec)
    assert type(spec).model_validate(spec.model_dump(mode="json")) == spec


def backwards(value: Any) -> Any:
    return {name: backwards(part) for name, part in reversed(value.items())} if isinstance(value, dict) else value


def test_the_order_of_fields_and_options_does_not_matter() -> None:
    turned = backwards(RUN.model_dump(mode="json"))
    assert next(iter(turned)) == list(RunSpec.model_fields)[-1]
    assert key(RunSpec.model_validate(turned)) == key(RUN)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            Method(name="finetune", options={"weight_decay": 0}),
            Method(name="finetune", options={"weight_decay": "-0.0"}),
        ),
        (Method(name="finetune", options={"lr": 1}), Method(name="finetune", options={"lr": "1.0"})),
        (Method(name="finetune", options={"epochs": 10.0}), Method(name="finetune")),
        (Model(name="small_cnn", options={"width": "16"}), Model(name="small_cnn")),
        (TRAINING, other(TRAINING, ("weight_decay",), -0.0)),
        (other(TRAINING, ("learning_rate",), 1), other(TRAINING, ("learning_rate",), 1.0)),
        (other(MASK, ("budget",), 1), other(MASK, ("budget",), 1.0)),
    ],
)
def test_one_value_has_one_key(first: Spec, second: Spec) -> None:
    assert key(first) == key(second)


def test_kinds_of_specs_do_not_share_keys() -> None:
    class Depth(Spec):
        size: int

    class Width(Spec):
        size: int

    assert key(Depth(size=1)) != key(Width(size=1))


NAMED = {"reset_and_finetune", "small_cnn", "most_memorized", "random_within_tensor", "weighted_gradient"}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_functions_version_is_in_every_key_that_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(RUN)
    registries = [kind.registry for kind in (Method, Model, ForgetSet, Strategy)]
    (registry,) = [registry for registry in registries if name in registry]
    bumped: Entry[Any] = replace(registry[name], version="other")
    monkeypatch.setitem(registry._entries, name, bumped)
    assert key(RUN) != before


def test_a_version_is_not_in_keys_that_do_not_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(RUN)
    monkeypatch.setitem(Method.registry._entries, "finetune", replace(Method.registry["finetune"], version="2"))
    assert key(RUN) == before


class Before(Spec):
    size: int


class Grown(Spec):
    size: int
    depth: int = Field(default=3, json_schema_extra={"unhashed_at": 3})
    mask: MaskSpec | None = Field(default=None, json_schema_extra={"unhashed_at": None})


def test_a_field_added_later_keeps_old_keys() -> None:
    assert canonical(Grown(size=1)) == canonical(Before(size=1)) == {"size": 1}
    grown = [Grown(size=1), Grown(size=1, depth=4), Grown(size=1, mask=MASK), Grown(size=1, depth=4, mask=MASK)]
    assert len({key(spec) for spec in grown}) == 4
    assert key(Grown(size=1, depth=3)) == key(Grown(size=1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf"])
@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (TRAINING, ("learning_rate",)),
        (TRAINING, ("weight_decay",)),
        (CAMPAIGN, ("fraction",)),
        (MASK, ("budget",)),
        (RUN, ("method", "options", "lr")),
        (RUN, ("seed",)),
    ],
)
def test_what_is_not_finite_is_refused(spec: Spec, path: tuple[str, ...], value: float | str) -> None:
    with pytest.raises(ValidationError):
        other(spec, path, value)


def test_what_has_no_canonical_form_is_refused() -> None:
    class Loose(Spec):
        content: Any

    for content in ({1, 2}, object(), b"bytes", lambda: None):
        with pytest.raises(TypeError, match="no canonical form"):
            key(Loose(content=content))
    with pytest.raises(ValueError, match="not JSON compliant"):
        key(Loose(content=math.nan))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Method(name="fintune"), "unknown method 'fintune'; did you mean 'finetune'"),
        (lambda: Method(name="finetune", options={"rl": 1}), "method finetune has no option 'rl'"),
        (lambda: Method(name="finetune", options={"lr": "fast"}), "option lr of method finetune is 'fast'"),
        (lambda: other(CAMPAIGN, ("fraction",), 0.75), "campaign.fraction is 0.75; allowed: 0.1, 0.2, ... 0.9"),
        (lambda: other(CAMPAIGN, ("fraction",), 1.0), "campaign.fraction is 1.0"),
        (lambda: other(RUN, ("original_seed",), None), "method reset_and_finetune needs original"),
        (
            lambda: RunSpec(setting=SETTING, forget=FORGET, method=Method(name="retrain"), original_seed=1, seed=0),
            "method retrain takes no original",
        ),
        (
            lambda: other(RUN, ("method",), Method(name="identity")),
            "method identity chooses its own parameters: it takes no strategy or budget",
        ),
        (lambda: other(MASK, ("budget",), 0), "greater than 0"),
        (lambda: other(MASK, ("budget",), 1.01), "less than or equal to 1"),
        (lambda: other(MASK, ("granularity",), "layer"), "'param' or 'channel'"),
        (lambda: TrainingSpec(learning_rate=0.1, epochs=1, batch_size=1, dropout=0.5), "Extra inputs"),  # type: ignore[call-arg]
        (lambda: other(TRAINING, ("epochs",), 1.5), "integer"),
    ],
)
def test_specs_that_make_no_sense_are_refused(build: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        build()


def test_specs_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RUN.seed = 5


def test_a_training_spec_builds_the_training_it_says() -> None:
    assert TRAINING.build() == Training(0.1, 20, 64, 0.9, 0.0, 0.2, 0.01, "fp32")


def test_budget_granularity_and_method_share_one_localization() -> None:
    twins = [
        other(RUN, ("mask", "budget"), 0.5),
        other(RUN, ("mask", "granularity"), "param"),
        other(RUN, ("mask", "train_head"), False),
        other(RUN, ("method",), Method(name="finetune")),
    ]
    assert {key(twin.localization) for twin in twins} == {key(RUN.localization)}  # type: ignore[arg-type]


def test_only_a_strategy_that_draws_has_a_localization_seed() -> None:
    drawn, fixed = RUN.localization, other(RUN, ("mask",), MaskSpec(strategy=WEIGHTED, granularity="param", budget=0.1))
    assert drawn is not None
    assert drawn.seed == RUN.seed
    assert fixed.localization == LocalizationSpec(
        original=OriginalSpec(setting=SETTING, seed=0), forget=FORGET, strategy=WEIGHTED
    )
    assert other(RUN, ("mask",), None).localization is None


def test_a_label_names_what_differs_from_the_defaults() -> None:
    assert Method(name="finetune").label == "finetune"
    assert Method(name="finetune", options={"lr": 0.03, "epochs": 5}).label == "finetune(lr=0.03, epochs=5)"


def test_only_retraining_is_a_reference() -> None:
    retrain = RunSpec(setting=SETTING, forget=FORGET, method=Method(name="retrain"), original_seed=None, seed=0)
    assert retrain.is_reference
    assert retrain.original is None
    assert not RUN.is_reference
