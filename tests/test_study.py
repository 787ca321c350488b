import json
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.arms import Arm
from orchestrator.overrides import override
from orchestrator.recipes import RECIPES
from orchestrator.registry import InputError
from orchestrator.specs import ForgetSet, ForgetSpec, Model, StandInSpec, Strategy, key
from orchestrator.study import Campaign, Study
from tests import golden

DATA = "0" * 64


@pytest.fixture
def digits() -> Study:
    return RECIPES["digits"].function()


def test_forget_sets_go_by_a_proxy_where_asked(digits: Study) -> None:
    plain, by_proxy = digits, override(digits, ["scores=confidence"])
    before, after = ({spec.rule.name: spec for spec in study.forget_specs(DATA)} for study in (plain, by_proxy))
    assert before["random"] == after["random"]
    found = after["most_memorized"].scores
    assert isinstance(found, StandInSpec)
    assert (found.proxy.name, found.original.seed) == ("confidence", 0)
    assert key(before["most_memorized"]) != key(after["most_memorized"])
    assert ForgetSpec(**after["most_memorized"].model_dump(mode="json")) == after["most_memorized"]
    with pytest.raises(InputError, match="scores is 'confidense'; did you mean 'confidence'"):
        override(digits, ["scores=confidense"])


def test_every_stage_and_ranking_of_a_composed_method_is_an_axis() -> None:
    study = override(
        RECIPES["digits_rum"].function(),
        ["methods=rum,rum_shuffled", "methods.rum.scores=campaign,entropy", "methods.rum.stages.2.lr=0.1,0.2,0.3"],
    )
    runs = [run for arm, run in study.runs(DATA) if arm == "rum"]
    # rankings x fine-tuning's rates x SalUn's rates x forget sets x seeds
    assert len(runs) == len({key(run) for run in runs}) == 2 * 3 * 2 * 2 * 5
    assert [stage.method.name for stage in runs[0].stages] == ["identity", "finetune", "random_labels"]
    assert {run.stages[1].method.options["lr"] for run in runs} == {0.1, 0.2, 0.3}
    assert {run.stages[2].mask.budget for run in runs if run.stages[2].mask} == {0.5}
    by = [run.memorization for run in runs]
    assert {spec.proxy.name if isinstance(spec, StandInSpec) else None for spec in by} == {"entropy", None}
    assert all(run.memorization is None for arm, run in study.runs(DATA) if arm == "rum_shuffled")
    assert study.scores_used == ("campaign", "entropy")
    random = override(study, ["forget_sets=random", "methods.rum.scores=entropy"])
    assert random.scores_used == ("entropy",), "no campaign is needed"


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["methods=rum"], None),
        (["methods.rum.stages.4.lr=0.1"], "unknown field 'methods.rum.stages.4.lr'; allowed: stages.1|2|3.FIELD"),
        (["methods.rum.stages.2.rate=0.1"], "unknown field 'methods.rum.stages.2.rate'"),
        (["methods.rum.stages=finetune,nothing"], "unknown method 'nothing'"),
        (["methods.rum.stages=finetune,retrain"], "method retrain cannot be a stage"),
        (["methods.rum.scores=entropie"], "scores is 'entropie'; did you mean 'entropy'"),
        (["methods.finetune.scores=entropy"], "method finetune does not go by memorization scores; those that do: rum"),
        (["methods.finetune.stages=identity"], "method finetune has no stages; those that have: rum, rum_shuffled"),
        (["methods.rum.stages.3.strategy=none"], "method random_labels has a budget but no strategy"),
    ],
)
def test_bad_stages_are_answered_in_one_sentence(assignments: list[str], said: str | None) -> None:
    study = RECIPES["digits_rum"].function()
    if said is None:
        override(study, assignments)
        with pytest.raises(InputError, match="method rum needs stages"):
            override(RECIPES["digits"].function(), assignments)
        return
    with pytest.raises(InputError, match=re.escape(said)):
        override(study, assignments).runs(DATA)


# ---- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_its_keys(name: str) -> None:
    """Where a change is meant: `python -m tests.golden`, and a word in the commit."""
    pinned = json.loads(Path(golden.FILE).read_text(encoding="utf-8"))
    assert golden.keys_of(RECIPES[name].function()) == pinned[name]


def test_the_pinned_recipes_are_those_that_there_are() -> None:
    assert set(json.loads(Path(golden.FILE).read_text(encoding="utf-8"))) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json_and_says_its_own_name(name: str) -> None:
    study = RECIPES[name].function()
    again = Study.model_validate_json(study.model_dump_json())
    assert again == study
    assert [key(run) for _, run in again.runs(DATA)] == [key(run) for _, run in study.runs(DATA)]
    assert study.recipe == name


@pytest.mark.parametrize("name", RECIPES)
def test_no_two_runs_of_a_recipe_share_a_key(name: str) -> None:
    study = RECIPES[name].function()
    runs = [key(run) for _, run in study.runs(DATA)] + [key(run) for run in study.reference_runs(DATA)]
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_every_control(name: str) -> None:
    arms = RECIPES[name].function().methods
    assert {arm.method for arm in arms.values()} >= {"identity", "retrain_short"}
    controls = {(a.base, a.method) for a in arms.values() if a.strategy and a.strategy.name == "random_within_tensor"}
    assert (arms["del"].strategy, arms["del"].method) in controls
    assert RECIPES[name].function().references >= 5


def test_the_runs_of_digits_by_hand(digits: Study) -> None:
    # per forget set and seed. identity and retrain_short: 1 each. del and its control: 2 rates x 5 budgets each.
    # salun: 2 rates x 5 budgets. finetune, neg_grad_plus and random_labels: 2 rates each
    expected = {
        "identity": 1,
        "retrain_short": 1,
        "del": 10,
        "random_within_tensor": 10,
        "salun": 10,
        "finetune": 2,
        "neg_grad_plus": 2,
        "random_labels": 2,
    }
    runs = digits.runs(DATA)
    names = [name for name, _ in runs]
    assert {name: names.count(name) for name in names} == {name: 9 * count for name, count in expected.items()}
    assert len(runs) == 38 * 3 * 3 == 342


def test_the_grid_is_the_product_of_the_axes(digits: Study) -> None:
    changed = override(digits, ["methods=del", "forget_sets=random", "lr=0.1,0.2,0.3", "budget=0.1,0.4", "seeds=4,9"])
    axes = set()
    for name, run in changed.runs(DATA):
        assert name == "del"
        assert run.mask is not None
        assert run.original_seed == run.seed
        axes.add((run.method.options["lr"], run.mask.budget, run.seed))
    assert len(changed.runs(DATA)) == len(axes) == 12
    assert axes == {(lr, budget, seed) for lr in (0.1, 0.2, 0.3) for budget in (0.1, 0.4) for seed in (4, 9)}


def test_references_have_seeds_of_their_own_number(digits: Study) -> None:
    changed = override(digits, ["references=7", "seeds=3,100"])
    references = changed.reference_runs(DATA)
    assert len(references) == 7 * 3
    for forget in changed.forget_specs(DATA):
        assert [run.seed for run in references if run.forget == forget] == list(range(7))
    assert all(run.is_reference and run.original_seed is None and run.mask is None for run in references)


def all_keys(study: Study) -> set[str]:
    runs = [run for _, run in study.runs(DATA)] + study.reference_runs(DATA)
    return {key(spec) for spec in [*runs, *study.originals(DATA)]}


@pytest.mark.parametrize(
    "more", ["references=9", "seeds=0,1,2,3", "budget=0.05,0.1,0.2,0.3,0.5,0.7", "lr=0.003,0.01,0.03,0.1"]
)
def test_longer_axes_keep_the_keys_there_were(digits: Study, more: str) -> None:
    first = override(digits, ["lr=0.01,0.1"])
    assert all_keys(first) < all_keys(override(first, [more]))


def test_a_campaign_grows_without_another_key(digits: Study) -> None:
    grown = override(digits, ["campaign.models=400"])
    assert key(grown.campaign_spec(DATA)) == key(digits.campaign_spec(DATA))
    assert key(grown.scores_spec(DATA)) != key(digits.scores_spec(DATA))
    pairs = list(zip(digits.runs(DATA), grown.runs(DATA), strict=True))
    for (_, before), (_, after) in pairs:
        assert (key(before) == key(after)) == (before.forget.rule.name != "most_memorized")


def test_only_a_rule_that_asks_for_scores_depends_on_the_campaign(digits: Study) -> None:
    with_scores = {forget.rule.name for forget in digits.forget_specs(DATA) if forget.scores is not None}
    assert with_scores == {"most_memorized"}


def test_a_draw_is_part_of_drawn_forget_sets_alone(digits: Study) -> None:
    specs = override(digits, ["forget_draw=3"]).forget_specs(DATA)
    assert {spec.rule.name: spec.draw for spec in specs} == {"random": 3, "mislabelled": 0, "most_memorized": 0}


def test_how_data_is_named_does_not_enter_a_key(digits: Study) -> None:
    noisier = override(digits, ["data.label_noise=0.2"])
    assert golden.keys_of(noisier) == golden.keys_of(digits)
    assert noisier.runs("1" * 64)[0][1] != digits.runs(DATA)[0][1]


# ---- overrides -----------------------------------------------------------------------------------------------------

GOOD: list[tuple[list[str], str, Any]] = [
    ([], "seeds", (0, 1, 2)),
    (["seeds=5"], "seeds", (5,)),
    (["seeds=1,0"], "seeds", (1, 0)),
    (["references=8"], "references", 8),
    (["forget_draw=2"], "forget_draw", 2),
    (["data.label_noise=0"], "data.options.label_noise", 0.0),
    (["model=resnet9"], "model.name", "resnet9"),
    (["model=resnet9", "model.width=8"], "model.options.width", 8),
    (["training.epochs=3"], "training.epochs", 3),
    (["training.precision=bf16"], "training.precision", "bf16"),
    (["campaign.models=30"], "campaign.blocks", 3),
    (["campaign.fraction=0.5"], "campaign.fraction", 0.5),
    (["forget_sets.random.fraction=0.2"], "forget_sets.0.options.fraction", 0.2),
    (["forget_sets.most_memorized.count=9", "forget_sets=most_memorized"], "forget_sets.0.options.count", 9),
    (["forget_sets=random", "forget_sets=mislabelled,random"], "forget_sets.0.name", "mislabelled"),
    (["methods=finetune,identity"], "methods.finetune.options.lr", (0.03, 0.1)),
    (["methods.del.lr=0.5"], "methods.del.options.lr", (0.5,)),
    (["methods.del.lr=0.5"], "methods.finetune.options.lr", (0.03, 0.1)),
    (["methods.del.budget=0.4,1"], "methods.del.budget", (0.4, 1.0)),
    (["methods.del.budget=0.4"], "methods.salun.budget", (0.05, 0.1, 0.2, 0.3, 0.5)),
    (["methods.del.granularity=param"], "methods.del.granularity", "param"),
    (["methods.del.strategy=gradient"], "methods.del.strategy.name", "gradient"),
    (["methods.salun.redraw=true,false"], "methods.salun.options.redraw", (True, False)),
    (["lr=0.2"], "methods.neg_grad_plus.options.lr", (0.2,)),
    (["lr=0.2"], "methods.identity.options", {}),
    (["budget=0.25"], "methods.salun.budget", (0.25,)),
    (["budget=0.25"], "methods.finetune.budget", ()),
    (["epochs=2", "methods.salun.epochs=3"], "methods.salun.options.epochs", (3,)),
    (["methods.salun.epochs=3", "epochs=2"], "methods.salun.options.epochs", (2,)),
    (["alpha=0.5,0.9"], "methods.neg_grad_plus.options.alpha", (0.5, 0.9)),
    (
        ["methods.finetune.strategy=gradient", "methods.finetune.budget=0.1"],
        "methods.finetune.strategy.name",
        "gradient",
    ),
    (
        ["methods.finetune.budget=0.1", "seeds=1", "methods.finetune.strategy=gradient"],
        "methods.finetune.budget",
        (0.1,),
    ),
    (
        ["methods.del.strategy=none", "methods.del.budget=0.1", "methods.del.strategy=gradient"],
        "methods.del.base",
        None,
    ),
    (["methods.del.strategy=random_within_tensor", "methods.del.base=gradient"], "methods.del.base.name", "gradient"),
    (["methods=reset_and_finetune"], "methods.reset_and_finetune.strategy", None),
]


def at(value: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(value, tuple):
            value = value[int(part)]
        else:
            value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.parametrize(("assignments", "path", "expected"), GOOD)
def test_an_override_sets_what_it_names(digits: Study, assignments: list[str], path: str, expected: Any) -> None:
    before = digits.model_dump_json()
    changed = override(digits, assignments)
    assert at(changed, path) == expected
    assert type(at(changed, path)) is type(expected)
    assert len(changed.runs(DATA)) > 0
    assert digits.model_dump_json() == before, "a study is never changed in place"


BAD: list[tuple[str, str]] = [
    ("epochs", "--set takes field=value; got 'epochs'"),
    ("=3", "--set takes field=value; got '=3'"),
    ("refrences=3", "unknown field 'refrences'; did you mean 'references'?"),
    ("recipe=mine", "unknown field 'recipe'"),
    ("references=0", "references is '0'"),
    ("references=-1", "references is '-1'"),
    ("references=many", "references is 'many'"),
    ("references.x=1", "unknown field 'references.x'"),
    ("forget_draw=1.5", "forget_draw is '1.5'"),
    ("seeds=", "seeds"),
    ("seeds=a", "seeds is 'a'"),
    ("seeds=1,1", "seeds are 1,1; allowed: distinct whole numbers from 0"),
    ("seeds=-1", "seeds are -1"),
    ("seeds=1.5", "seeds is '1.5'"),
    ("data=digit", "unknown data set 'digit'; did you mean 'digits'?"),
    ("data=image_parquet", "data set image_parquet needs the option train"),
    ("data.noise=0.1", "data set digits has no option 'noise'; did you mean 'label_noise'?"),
    ("data.label_noise=much", "option label_noise of data set digits is 'much'; allowed: a finite number"),
    ("data.label_noise=nan", "option label_noise of data set digits is 'nan'"),
    ("data.label_noise.x=1", "unknown field 'data.label_noise.x'"),
    ("model=vgg", "unknown model 'vgg'"),
    ("model.width=1.5", "option width of model small_cnn is '1.5'; allowed: a whole number"),
    ("model.depth=3", "model small_cnn has no option 'depth'"),
    ("training=fast", "unknown field 'training'"),
    ("training.epoch=3", "unknown field 'training.epoch'; did you mean 'epochs'?"),
    ("training.epochs=0", "epochs is '0'"),
    ("training.epochs=2.5", "epochs is '2.5'"),
    ("training.learning_rate=0", "learning_rate is '0'"),
    ("training.learning_rate=inf", "learning_rate is 'inf'"),
    ("training.momentum=1", "momentum is '1'"),
    ("training.precision=fp8", "precision is 'fp8'"),
    ("campaign.models=0", "models is '0'"),
    ("campaign.models=15", "campaign.models is 15; allowed: a multiple of 10"),
    ("campaign.fraction=0.75", "campaign.fraction is 0.75; allowed: 0.1, 0.2, ... 0.9"),
    ("campaign.fraction=1", "campaign.fraction is 1"),
    ("campaign.fraction=nan", "fraction is 'nan'"),
    ("forget_sets=", "unknown forget set ''"),
    ("forget_sets=randon", "unknown forget set 'randon'; did you mean 'random'?"),
    ("forget_sets=random,random", "forget_sets are random,random; allowed: one or more distinct names"),
    ("forget_sets.randon.fraction=1", "unknown field 'forget_sets.randon.fraction'; did you mean 'random'?"),
    ("forget_sets.random.share=1", "forget set random has no option 'share'"),
    ("forget_sets.random.fraction=x", "option fraction of forget set random is 'x'"),
    ("methods=", "methods is ''"),
    ("methods=salum", "unknown method 'salum'; did you mean 'salun'?"),
    ("methods=del,nope", "unknown method 'nope'"),
    ("methods.sallun.lr=1", "unknown field 'methods.sallun.lr'; did you mean 'salun'?"),
    ("methods.del=1", "unknown field 'methods.del'"),
    ("methods.del.epoch=1", "unknown field 'methods.del.epoch'; did you mean 'epochs'?"),
    ("methods.del.lr=fast", "option lr of method reset_and_finetune is 'fast'"),
    ("methods.del.lr=", "option lr of method reset_and_finetune is ''"),
    ("methods.del.lr=0.1,,0.2", "option lr of method reset_and_finetune is ''"),
    ("methods.del.lr.x=1", "unknown field 'methods.del.lr.x'"),
    ("methods.del.redraw=true", "unknown field 'methods.del.redraw'"),
    ("methods.salun.redraw=maybe", "option redraw of method random_labels is 'maybe'; allowed: true or false"),
    ("methods.del.epochs=2.5", "option epochs of method reset_and_finetune is '2.5'"),
    ("methods.del.strategy=gradients", "unknown strategy 'gradients'; did you mean 'gradient'?"),
    ("methods.del.strategy=random_within_tensor", "strategy random_within_tensor needs base strategy"),
    ("methods.del.base=gradient", "strategy weighted_gradient takes no base strategy"),
    ("methods.random_within_tensor.base=none", "strategy random_within_tensor needs base strategy"),
    ("methods.finetune.strategy=gradient", "strategy gradient has no budget; set budget to shares in (0, 1]"),
    ("methods.finetune.budget=0.1", "method finetune has a budget but no strategy"),
    ("methods.finetune.base=gradient", "method finetune takes no base strategy"),
    ("methods.identity.strategy=gradient", "method identity chooses its own parameters"),
    ("methods.identity.budget=0.1", "method identity chooses its own parameters"),
    ("methods.del.strategy=none", "method reset_and_finetune has a budget but no strategy"),
    ("methods.del.granularity=layer", "granularity is 'layer'"),
    ("lr=fast", "is 'fast'"),
    ("lr=nan", "is 'nan'"),
    ("rl=0.1", "unknown field 'rl'"),
    ("budget=0", "budget is 0.0; allowed: a share of the parameter entries in (0, 1]"),
    ("budget=-0.1", "budget is -0.1"),
    ("budget=1.01", "budget is 1.01"),
    ("budget=0.1,2", "budget is 2.0"),
    ("budget=nan", "budget is 'nan'"),
    ("budget=all", "budget is 'all'"),
    ("budget=", "budget is ''"),
    ("budget.del=0.1", "unknown field 'budget.del'"),
]


@pytest.mark.parametrize(("assignment", "said"), BAD)
def test_a_bad_override_is_answered_in_one_sentence(digits: Study, assignment: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        override(digits, [assignment])
    assert "\n" not in str(caught.value)


def listed_fields() -> list[str]:
    """The fields that the error for an unknown one lists."""
    with pytest.raises(InputError) as caught:
        override(RECIPES["digits"].function(), ["nothing_like_it=1"])
    return str(caught.value).rpartition("allowed: ")[2].split(", ")


def test_an_error_lists_fields_of_every_part() -> None:
    expected = {"budget", "lr", "redraw", "training.epochs", "campaign.models", "data.label_noise", "model.width"}
    assert expected <= set(listed_fields())


@pytest.mark.parametrize("field", listed_fields())
def test_every_field_that_an_error_lists_is_known(digits: Study, field: str) -> None:
    with pytest.raises(InputError, match=r"^(?!unknown field)"):
        override(digits, [f"{field}=no such value"])


# ---- arms ----------------------------------------------------------------------------------------------------------


def test_an_arm_multiplies_its_options_and_budgets() -> None:
    arm = Arm(
        method="reset_and_finetune",
        options={"lr": (0.1, "0.2"), "epochs": (5,)},
        strategy=Strategy(name="gradient"),
        budget=(0.1, 0.5),
        granularity="param",
    )
    assert [(m.options["lr"], m.options["epochs"], m.options["momentum"]) for m in arm.methods()] == [
        (0.1, 5, 0.9),
        (0.2, 5, 0.9),
    ]
    masks = list(arm.masks(Model(name="small_cnn")))
    assert [mask.budget for mask in masks if mask] == [0.1, 0.5]
    assert {mask.granularity for mask in masks if mask} == {"param"}
    assert list(Arm(method="finetune").masks(Model(name="small_cnn"))) == [None]


@pytest.mark.parametrize(("model", "meant"), [("resnet18", "released"), ("vit_small_data", "all"), ("vit", "all")])
def test_the_released_h_of_a_transformer_is_the_plain_mean(model: str, meant: str) -> None:
    study = override(RECIPES["ablation_criteria"].function(), ["data=svhn", f"model={model}"])
    assert {run.mask.h for _, run in study.runs(DATA) if run.mask is not None} == {meant}
    given = override(study, ["methods.del.h=5"])
    assert {run.mask.h for arm, run in given.runs(DATA) if arm == "del" and run.mask is not None} == {5}


@pytest.mark.parametrize(("recipe", "as_released"), [("svhn_vit_iid", True), ("svhn_vit_iid_joint", False)])
def test_protocol_del_deviates_as_the_released_code_does_and_joint_does_not(recipe: str, as_released: bool) -> None:
    study = RECIPES[recipe].function()
    masks = [run.mask for _, run in study.runs(DATA) if run.mask is not None]
    found = {part.options["as_released"] for mask in masks for part in (mask.base or mask.strategy,)}
    assert found == {as_released}
    schedules = {run.method.options["schedule"] for _, run in study.runs(DATA) if "schedule" in run.method.options}
    assert schedules == {study.training.schedule} == {"epoch" if as_released else "step"}
    assert {rule.options["as_released"] for rule in study.forget_sets} == {as_released}


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (Arm(method="finetune", budget=(0.1,)), "has a budget but no strategy"),
        (Arm(method="finetune", strategy=Strategy(name="gradient")), "strategy gradient has no budget"),
        (Arm(method="finetune", base=Strategy(name="gradient")), "takes no base"),
        (Arm(method="finetune", strategy=Strategy(name="random_within_tensor"), budget=(0.1,)), "needs base"),
    ],
)
def test_an_arm_that_is_not_whole_has_no_runs(digits: Study, arm: Arm, said: str) -> None:
    fields = {name: getattr(digits, name) for name in Study.model_fields}
    study = Study(**fields | {"methods": {"mine": arm}})
    with pytest.raises(InputError, match=said):
        study.runs(DATA)


def test_a_study_refuses_what_could_not_be_told_apart(digits: Study) -> None:
    fields = {name: getattr(digits, name) for name in Study.model_fields}
    rules = (ForgetSet(name="random"), ForgetSet(name="random", options={"fraction": 0.2}))
    with pytest.raises(ValueError, match="distinct names"):
        Study(**fields | {"forget_sets": rules})
    with pytest.raises(ValueError, match="distinct whole numbers"):
        Study(**fields | {"seeds": (0, 0)})


def test_a_campaign_counts_its_blocks() -> None:
    assert Campaign().blocks == 20
    with pytest.raises(ValueError, match="multiple of 10"):
        Campaign(models=25)


# ---- protocols -----------------------------------------------------------------------------------------------------


def test_the_protocol_of_the_paper_has_one_original_and_one_draw(digits: Study) -> None:
    study = override(digits, ["protocol=del", "seeds=3,4,5", "original_seed=7", "forget_sets=random"])
    runs = [run for _, run in study.runs(DATA) if run.original_seed is not None]
    assert {(run.forget.draw, run.original_seed) for run in runs} == {(0, 7)}
    assert {run.seed for run in runs} == {3, 4, 5}
    assert [original.seed for original in study.originals(DATA)] == [7]
    assert len(study.reference_runs(DATA)) == 5


def test_the_joint_protocol_varies_draw_original_and_unlearning_together(digits: Study) -> None:
    study = override(digits, ["protocol=joint", "seeds=1,2", "forget_sets=random,mislabelled"])
    runs = [run for _, run in study.runs(DATA) if run.original_seed is not None]
    by_set = {
        name: {(run.forget.draw, run.original_seed, run.seed) for run in runs if run.forget.rule.name == name}
        for name in ("random", "mislabelled")
    }
    assert by_set["random"] == {(1, 1, 1), (2, 2, 2)}
    assert by_set["mislabelled"] == {(0, 1, 1), (0, 2, 2)}, "what draws nothing has one draw"
    references = [(run.forget.rule.name, run.forget.draw, run.seed) for run in study.reference_runs(DATA)]
    drawn = [(draw, seed) for name, draw, seed in references if name == "random"]
    assert len(drawn) == 10
    assert len({seed for _, seed in drawn}) == 10, "the references of another draw have seeds of their own"


def test_the_default_protocol_is_unchanged_by_the_others(digits: Study) -> None:
    assert digits.protocol == "paired"
    assert {key(run) for _, run in override(digits, ["protocol=paired"]).runs(DATA)} == {
        key(run) for _, run in digits.runs(DATA)
    }


def test_what_selects_a_mask_can_be_set(digits: Study) -> None:
    study = override(
        digits,
        [
            "methods=del",
            "methods.del.h=all",
            "methods.del.train_head=false",
            "methods.del.freeze_statistics=yes",
            "methods.del.strategy.batch_size=7",
        ],
    )
    mask = study.runs(DATA)[0][1].mask
    assert mask is not None
    assert (mask.h, mask.train_head, mask.freeze_statistics) == ("all", False, True)
    assert mask.strategy.options["batch_size"] == 7
    own = override(
        digits, ["methods=del", "methods.del.strategy=critmem", "methods.del.budget=own,0.1", "methods.del.h=3"]
    )
    assert [run.mask.budget for _, run in own.runs(DATA)[:4] if run.mask] == [None, None, None, 0.1]
    with pytest.raises(InputError, match="strategy weighted_gradient has no budget of its own"):
        override(digits, ["methods.del.budget=own"])
    with pytest.raises(InputError, match="granularity of strategy critmem is param; allowed: channel"):
        override(digits, ["methods.del.strategy=critmem", "methods.del.granularity=param"])
    with pytest.raises(InputError, match=r"h is '?-1'?; allowed"):
        override(digits, ["methods.del.h=-1"])


def test_a_function_without_defaults_takes_its_options_from_what_follows(digits: Study) -> None:
    study = override(digits, ["forget_sets=file,random", "seeds=0", "forget_sets.file.path=mine.csv"])
    assert [(rule.name, rule.options.get("path")) for rule in study.forget_sets] == [
        ("file", "mine.csv"),
        ("random", None),
    ]
    moved = override(digits, ["data=image_parquet", "data.train=a.parquet", "data.test=b.parquet", "data.num_train=9"])
    assert (moved.data.options["train"], moved.data.options["num_train"]) == ("a.parquet", 9)
    with pytest.raises(InputError, match="forget set file needs the option path"):
        override(digits, ["forget_sets=file"])
    with pytest.raises(InputError, match="data set image_parquet needs the option test"):
        override(digits, ["data=image_parquet", "data.train=a.parquet"])
