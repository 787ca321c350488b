"""Random draws, Optuna's choices and ASHA's decisions, as functions: without Ray, and by themselves."""

import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from ray.tune.schedulers.async_hyperband import _Bracket

from jobs.deadline import Deadline, seconds_of
from jobs.searching import Asking, cell_of
from orchestrator import results
from orchestrator.arms import Arm
from orchestrator.axes import Axis, choice, loguniform, uniform
from orchestrator.data import SplitOutputs
from orchestrator.overrides import override
from orchestrator.plan import Plan
from orchestrator.progress import but_last
from orchestrator.recipes import RECIPES
from orchestrator.registry import InputError
from orchestrator.search import (
    Asha,
    Halving,
    Search,
    check_objective,
    distinct,
    draws,
    num_to_choose,
    objective_of,
)
from orchestrator.specs import RunSpec, key
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.suggestions import suggest

DATA = "0" * 64
SPACE: dict[str, Axis] = {"lr": loguniform(1e-3, 1e-1), "epochs": uniform(1, 10), "redraw": (True, False)}


def studied(*assignments: str) -> Study:
    return override(RECIPES["digits"].function(), assignments)


def settings(study: Study, arm: str) -> list[tuple[float, float | None]]:
    """The rate and budget of each setting of an arm, without repetition, in order."""
    runs = [run for name, run in study.runs(DATA) if name == arm]
    return list(dict.fromkeys((run.method.options["lr"], run.mask and run.mask.budget) for run in runs))


# ---- random draws --------------------------------------------------------------------------------------------------


def test_draws_are_these_and_more_samples_begin_with_them() -> None:
    golden = [
        {"lr": 0.05571, "epochs": 10, "redraw": True},
        {"lr": 0.0123, "epochs": 9, "redraw": False},
        {"lr": 0.0246, "epochs": 2, "redraw": False},
    ]
    found = [list(draws(SPACE, Search(samples=n), "del", "cell")) for n in (3, 20)]
    assert found[0] == golden
    assert found[1][:3] == golden
    assert list(draws(SPACE, Search(samples=3, seed=1), "del", "cell")) != golden
    assert list(draws(SPACE, Search(samples=3), "del", "another")) != golden


def test_an_axis_that_goes_leaves_the_draws_of_the_others() -> None:
    whole = list(draws(SPACE, Search(samples=9), "del"))
    part = list(draws({"epochs": SPACE["epochs"], "lr": SPACE["lr"]}, Search(samples=9), "del"))
    assert part == [{"epochs": drawn["epochs"], "lr": drawn["lr"]} for drawn in whole]


def test_finite_axes_are_drawn_without_repetition_and_then_whole() -> None:
    axes: dict[str, Axis] = {"a": (1, 2, 2, 3), "b": choice("x", "y")}
    for samples, expected in ((4, 4), (6, 6), (50, 6)):
        found = [tuple(drawn.items()) for drawn in draws(axes, Search(samples=samples), "del")]
        assert len(set(found)) == len(found) == expected
    narrow: dict[str, Axis] = {"momentum": uniform(0.9990, 0.9999)}  # ten values of four digits: they repeat
    assert len(list(draws(narrow, Search(samples=30), "del"))) == 30


def test_a_cell_has_its_own_draws_the_same_for_every_forget_set_and_seed() -> None:
    study = studied(
        "methods=del,identity", "budget=0.1,0.3", "methods.del.lr=loguniform(1e-3, 1e-1)", "search.samples=4"
    )
    cells: dict[tuple[str, float, int], list[float]] = {}
    for arm, run in study.runs(DATA):
        if arm == "del":
            assert run.mask is not None
            assert run.mask.budget is not None
            cells.setdefault((run.forget.rule.name, run.mask.budget, run.seed), []).append(run.method.options["lr"])
    assert len(cells) == 3 * 2 * 3
    assert all(len(set(rates)) == len(rates) == 4 for rates in cells.values())
    assert {tuple(rates) for (_, budget, _), rates in cells.items() if budget == 0.1} == {
        tuple(cells["random", 0.1, 0])
    }
    assert set(cells["random", 0.1, 0]).isdisjoint(cells["random", 0.3, 0])
    assert len([arm for arm, _ in study.runs(DATA) if arm == "identity"]) == 3 * 3


def test_draws_do_not_depend_on_the_other_arms_or_on_other_budgets() -> None:
    drawn = "methods.del.lr=loguniform(1e-3, 1e-1)"
    alone = studied("methods=del", "budget=0.1,0.3", drawn)
    among = studied("methods=salun,finetune,del,identity", "methods.del.budget=0.3,0.1,0.5", drawn, "lr=0.1", drawn)
    more = studied("methods=del", "budget=0.1,0.3", drawn, "search.samples=25")
    assert (
        {s for s in settings(among, "del") if s[1] != 0.5} == set(settings(alone, "del")) < set(settings(more, "del"))
    )
    keys = [{key(run) for arm, run in study.runs(DATA) if arm == "del"} for study in (alone, more)]
    assert keys[0] < keys[1]


def test_a_budget_and_the_options_of_stages_are_drawn_together_with_the_rest() -> None:
    study = studied("methods=del", "lr=loguniform(1e-3, 1e-1)", "budget=uniform(0.05, 0.5)", "search.samples=7")
    found = settings(study, "del")
    assert len(found) == 7
    assert len({budget for _, budget in found}) == 7
    assert all(budget is not None and 0.05 <= budget <= 0.5 for _, budget in found)
    rum = override(
        RECIPES["digits_rum"].function(),
        [
            "methods=rum",
            "methods.rum.scores=campaign",
            "methods.rum.stages.3.lr=uniform(0.01, 0.1)",
            "methods.rum.stages.2.lr=uniform(0.01, 0.1)",
        ],
    )
    stages = {tuple(stage.method.options.get("lr") for stage in run.stages) for _, run in rum.runs(DATA)}
    assert len(stages) == 10
    assert len({found[1] for found in stages}) == len({found[2] for found in stages}) == 10


def test_lists_are_a_grid_unless_a_random_search_is_asked_for() -> None:
    drawn = "methods.finetune.lr=uniform(0.01, 0.1)"
    mixed = studied("methods=del,finetune", "methods.del.lr=0.1,0.2", "budget=0.1", drawn, "search.samples=3")
    assert settings(mixed, "del") == [(0.1, 0.1), (0.2, 0.1)]
    assert len(settings(mixed, "finetune")) == 3
    asked = override(mixed, ["search.kind=random", "methods.del.lr=0.1,0.2,0.3,0.4,0.5"])
    assert len(settings(asked, "del")) == 3
    assert {rate for rate, _ in settings(asked, "del")} < {0.1, 0.2, 0.3, 0.4, 0.5}


def test_two_arms_of_one_kind_have_draws_of_their_own() -> None:
    study = studied("methods=del", "budget=0.1", "lr=loguniform(1e-3, 1e-1)")
    twins = Study(**{**dict(study), "methods": {"del": study.methods["del"], "again": study.methods["del"]}})
    assert settings(twins, "del") == settings(study, "del")
    assert set(settings(twins, "del")).isdisjoint(settings(twins, "again"))


def test_methods_yields_the_candidates_of_a_cell() -> None:
    arm = Arm(method="finetune", options={"lr": loguniform(1e-3, 1e-1), "epochs": (2, 5)})
    found = list(arm.methods(Search(samples=6), "finetune"))
    assert len({method.label for method in found}) == 6
    assert {method.options["epochs"] for method in found} <= {2, 5}
    with pytest.raises(InputError, match="a grid has no values of it"):
        list(arm.methods())
    assert len(list(Arm(method="finetune", options={"lr": (0.1, 0.2)}).methods(Search(), "finetune"))) == 2


def test_a_study_with_distributions_survives_json_and_says_them_as_text() -> None:
    study = studied("methods=del,identity", "lr=loguniform(1e-3, 1e-1)", "methods.del.budget=choice(0.1, 0.3)")
    said = study.model_dump(mode="json")
    assert said["methods"]["del"]["options"]["lr"] == "loguniform(0.001, 0.1)"
    assert said["methods"]["del"]["budget"] == "choice(0.1, 0.3)"
    again = Study.model_validate_json(study.model_dump_json())
    assert [key(run) for _, run in again.runs(DATA)] == [key(run) for _, run in study.runs(DATA)]


def test_what_does_not_go_together_is_refused_in_one_sentence() -> None:
    drawn = "methods.del.lr=loguniform(1e-3, 1e-1)"
    for assignments, said in (
        ([drawn, "search.kind=grid"], "methods.del.lr is loguniform(0.001, 0.1), which a grid has no values of; list"),
        (["lr=uniform(0.3, 0.1)"], "low below high"),
        (["methods.del.budget=uniform(0.1, 1.5)"], "budget is '1.5'; allowed: a finite number above 0 to 1"),
        (["search.kind=optuna", "methods=del", "forget_sets=random"], "has 5 (methods: del 5; forget sets: 1)"),
        (["search.kind=optuna", "methods=identity"], "has 0 (methods: none; forget sets: 3)"),
        (["search.objective=accuracy/test"], "never of test"),
        (["search.objective=accuracie/validation"], "did you mean 'accuracy'"),
        (["scheduler=asha"], "method identity reports no loss by epoch"),
        (["scheduler.metric=los", "scheduler=asha"], "did you mean 'loss'"),
        (["scheduler.grace=2"], "scheduler.grace is set to 2 and no scheduler is; allowed: with --scheduler asha"),
        (["search.samples=3"], "search.samples is 3, which nothing goes by, since no method of this study is searched"),
        (["search.seed=3", "search.kind=random", "methods=identity"], "else leave --search-seed out"),
        ([drawn, "search.samples=3", "methods=finetune"], "search.samples is 3, which nothing goes by"),
        ([drawn, "search.objective=loss/validation"], "goes by but Optuna; allowed with --search optuna"),
        (["search.kind=random", "search.direction=min"], "else leave --direction out"),
        (["scheduler=hyperband"], "allowed: asha, none"),
        (["search.sample=3"], "did you mean 'samples'"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            studied(*assignments)
    one = ["search.kind=optuna", "methods=finetune", "forget_sets=random"]
    with pytest.raises(InputError, match=r"has no direction; set search\.direction"):
        studied(*one, "search.objective=membership_auc/forget")
    with pytest.raises(InputError, match="Optuna needs whole runs"):
        studied(*one, "scheduler=asha")


def test_what_a_scheduler_goes_by_may_come_before_it_and_beside_one_that_is_none() -> None:
    asked = studied("methods=finetune", "scheduler.grace=2", "scheduler.factor=4", "scheduler=asha")
    assert asked.scheduler == Asha(grace=2, factor=4)
    assert studied("scheduler.grace=2", "scheduler=none").scheduler is None


def test_a_value_is_held_against_the_methods_that_are_kept_alone() -> None:
    everything = RECIPES["cifar10_small_del"].function
    with pytest.raises(InputError, match="option alpha of method neg_grad_plus is 1900"):
        override(everything(), ["alpha=1900"])
    kept = override(everything(), ["alpha=1900", "methods=influence,identity"])
    assert [run.method.options["alpha"] for name, run in kept.runs(DATA) if name == "influence"] == [1900.0] * 6
    with pytest.raises(InputError, match="unknown field 'alpho'"):
        override(everything(), ["alpho=1900", "methods=influence"])


def test_an_axis_reaches_the_stages_that_have_it() -> None:
    made = override(
        RECIPES["digits_rum"].function(),
        ["methods=rum_del,finetune", "lr=0.07", "budget=0.25", "methods.rum_del.stages.2.lr=0.02"],
    )
    stages = {tuple(s.method.options.get("lr") for s in run.stages) for name, run in made.runs(DATA) if run.stages}
    assert stages == {(None, 0.02, 0.07)}
    masks = {s.mask.budget for _, run in made.runs(DATA) for s in run.stages if s.mask is not None}
    assert masks == {0.25}
    assert {run.method.options["lr"] for name, run in made.runs(DATA) if name == "finetune"} == {0.07}


# ---- Optuna --------------------------------------------------------------------------------------------------------


def goodness(values: dict[str, float]) -> float:
    return -abs(np.log10(values["lr"]) + 1.5) + 0.1 * values["epochs"]


def tried(number: int, seed: int) -> list[tuple[dict[str, float], float]]:
    history: list[tuple[dict[str, float], float]] = []
    for _ in range(number):
        found = suggest(SPACE, history, chosen=[values for values, _ in history], seed=seed, is_maximised=True)
        history.append((found, goodness(found)))
    return history


def test_suggestions_are_a_function_of_history_number_and_seed_and_get_better() -> None:
    history = tried(24, seed=0)
    for place in (0, 11, 23):  # as in a process that knows nothing but the record
        chosen = [values for values, _ in history[:place]]
        assert suggest(SPACE, history[:place], chosen=chosen, seed=0, is_maximised=True) == history[place][0]
    assert [values for values, _ in tried(3, seed=1)] != [values for values, _ in history[:3]]
    assert suggest(SPACE, [], chosen=[history[0][0]], seed=0, is_maximised=True) != history[0][0]
    early, late = ([value for _, value in part] for part in (history[:10], history[14:]))
    assert np.median(late) > np.median(early)
    assert {type(value) for values, _ in history for value in values.values()} == {float, int, bool}
    for values, _ in history:
        assert FloatDistribution(1e-3, 1e-1)._contains(values["lr"])
        assert values["lr"] == float(f"{values['lr']:.4g}")


def test_settings_of_a_finite_space_are_suggested_once_each_and_then_no_more() -> None:
    axes: dict[str, Axis] = {"epochs": uniform(1, 3), "order": choice("a", "b"), "lr": (0.1,)}
    history: list[tuple[dict[str, Any], float]] = []
    while num_to_choose(axes, [values for values, _ in history], samples=50):
        chosen = [values for values, _ in history]
        found = suggest(axes, history, chosen=chosen, seed=0, is_maximised=True)
        history.append((found, -float(found["epochs"])))  # one best value: TPE would ask for it again and again
        assert len(history) <= 6
    assert {(values["epochs"], values["order"]) for values, _ in history} == set(product((1, 2, 3), "ab"))
    repeats = [values for values, _ in history[:2] for _ in range(4)]  # of a record from before
    assert distinct(repeats) == [history[0][0], history[1][0]]
    assert [num_to_choose(axes, repeats, samples) for samples in (1, 2, 5, 50)] == [0, 0, 3, 4]
    assert [num_to_choose(SPACE, repeats, samples) for samples in (4, 9)] == [0, 1], "real numbers do not run out"


@pytest.mark.parametrize(
    ("axis", "settings", "chosen"), [("epochs=2,3,4", 3, 3), ("momentum=uniform(0.9990, 0.9993)", 4, 12)]
)
def test_a_setting_is_handed_out_once(axis: str, settings: int, chosen: int, tmp_path: Path) -> None:
    """Also one that is chosen again while its runs are on their way: nothing is ever finished here."""
    options = ["methods=finetune", "forget_sets=random", "seeds=0,1", "lr=0.1", "epochs=5", axis]
    given = studied("search.kind=optuna", "search.samples=12", *options)
    plan = Plan(given, DATA, frozenset())
    store: Any = SimpleNamespace(store=Store(str(tmp_path)))
    asking = Asking(store, plan.sweep({}), plan)
    keys = [key(task.spec) for task in asking.tasks([])]
    assert len(keys) == len(set(keys)) == settings * 2
    assert len(asking.plan.suggestions) == chosen
    (record,) = results.get_sweeps(store.store)
    assert record.suggestions == asking.plan.suggestions
    assert {member.key for member in record.members if member.arm == "finetune"} == set(keys)


ONE = (
    "search.kind=optuna",
    "methods=identity,finetune",
    "forget_sets=random",
    "seeds=0,1",
    "lr=loguniform(1e-3, 1e-1)",
)


def test_a_searched_sweep_is_named_by_its_space_and_seed_not_by_samples_or_runs() -> None:
    def name(*more: str, suggestions: tuple[dict[str, object], ...] = ()) -> str:
        return Plan(studied(*ONE, *more), DATA, frozenset(), suggestions).sweep({}).key

    first = {"lr": 0.01, "epochs": 5, "batch_size": 64}
    assert name() == name("search.samples=99") == name(suggestions=(first,))
    changes = ("search.seed=1", "lr=uniform(0.001, 0.1)", "search.objective=accuracy/retain", "seeds=0,2")
    assert len({name(), *(name(change) for change in changes)}) == 5
    runs = Plan(studied(*ONE), DATA, frozenset(), (first,)).named_runs()
    assert [(arm, run.method.options.get("lr")) for arm, run in runs] == [("identity", None)] * 2 + [
        ("finetune", 0.01)
    ] * 2
    grid = Plan(studied("methods=identity"), DATA, frozenset()).sweep({})
    assert grid.key == results.sweep_key("digits", grid.members), "sweeps whose runs are known keep their names"


def outputs(seed: int, *without: str) -> dict[str, SplitOutputs]:
    rng = np.random.default_rng(seed)
    made = {}
    for split in ("forget", "retain", "validation", "test"):
        labels = rng.integers(0, 3, 40)
        made[split] = SplitOutputs(rng.normal(size=(40, 3)).astype(np.float16), labels, labels)
    return {split: part for split, part in made.items() if split not in without}


def test_an_objective_cannot_see_the_test_split() -> None:
    whole = outputs(0)
    expected = float((whole["validation"].predictions == whole["validation"].labels).mean())
    assert objective_of(whole, "accuracy/validation") == expected
    poisoned = {**whole, "test": outputs(1)["test"]}
    assert objective_of(poisoned, "loss/validation") == objective_of(whole, "loss/validation")
    splits = ("forget", "retain", "validation", "test")
    check_objective("accuracy/forget", splits)
    for objective in ("membership_auc/forget", "published_svc_entropy/forget"):  # attacks on forget against test
        with pytest.raises(InputError, match="'test' is not there"):
            check_objective(objective, splits)
    with pytest.raises(InputError, match="no value for validation"):
        check_objective("accuracy/validation", ("forget", "retain", "test"))


# ---- ASHA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grace", "factor", "direction"), [(1, 2, "min"), (2, 3, "max"), (3, 4, "min")])
def test_halving_decides_as_rays_own_does(grace: int, factor: int, direction: str) -> None:
    rule = Asha(grace=grace, factor=factor, direction=direction)
    ours, theirs = Halving(rule), _Bracket(grace, 10_000, factor, 0)
    rng = np.random.default_rng(grace)
    going, ended, decisions = {f"run {n}": 0 for n in range(60)}, 0, 0
    while going and decisions < 3000:
        run = str(rng.choice(list(going)))
        going[run] += 1
        value, epoch = float(rng.normal()), going[run]
        reward = -value if direction == "min" else value
        stops = ours.stops("cell", run, epoch, value)
        assert stops == (theirs.on_result(SimpleNamespace(trial_id=run), epoch, reward) == "STOP")
        decisions, ended = decisions + 1, ended + stops
        if stops:
            del going[run]
    assert ended > 30


def test_halving_by_hand_and_what_is_remembered_takes_part() -> None:
    rule = Asha(grace=2, factor=2)
    halving = Halving(rule)
    assert [halving.stops("a", "1", epoch, 9.0) for epoch in (1, 2, 3)] == [False, False, False]
    assert halving.stops("a", "2", 2, 10.0), "worse than the better half of {9}"
    assert not halving.stops("b", "3", 2, 99.0), "another cell"
    assert not halving.stops("a", "4", 2, 8.0)
    assert not halving.stops("a", "5", 2, 9.0), "the median of 8, 9 and 10"
    assert halving.stops("a", "6", 2, 9.5)
    again = Halving(rule)
    for run, values in (("1", [7.0, 9.0, 9.0]), ("2", [0.0, 10.0]), ("4", [0.0, 8.0]), ("5", [0.0, 9.0])):
        again.remember("a", run, values)
    assert again.stops("a", "6", 2, 9.5)


def test_runs_are_held_against_those_with_their_seeds_and_forget_set() -> None:
    study = studied(
        "methods=finetune,del", "forget_sets=random,mislabelled", "budget=0.1,0.3", "seeds=0,1", "lr=0.1,0.2"
    )
    cells: dict[str, list[RunSpec]] = {}
    for _, run in study.runs(DATA):
        cells.setdefault(cell_of(run), []).append(run)
    assert len(cells) == (1 + 2) * 2 * 2
    assert all([run.method.options["lr"] for run in runs] == [0.1, 0.2] for runs in cells.values())


def test_the_last_epoch_is_never_told() -> None:
    run = studied("methods=finetune", "epochs=3").runs(DATA)[0][1]
    for spec in (run, None):  # None stands for a method that does not say how many epochs it has
        told: list[int] = []
        tell = but_last(lambda epoch, _, told=told: told.append(epoch), spec)  # type: ignore[misc]
        for epoch in (1, 2, 3):
            tell(epoch, {"loss": 0.0})
        assert told == [1, 2]


# ---- time ----------------------------------------------------------------------------------------------------------


def test_a_time_budget_is_hours_or_has_a_unit() -> None:
    said = {"1.5": 5400, "2h": 7200, "30m": 1800, "45s": 45, ".5m": 30}
    assert {text: seconds_of(text) for text in said} == said
    assert {seconds_of(text) for text in ("0", "-1", "soon", "", "3d", "m")} == {None}


def test_nothing_is_taken_after_the_deadline() -> None:
    taken: list[int] = []

    def items():  # type: ignore[no-untyped-def]
        for item in range(5):
            taken.append(item)
            yield item

    assert list(Deadline().within(items())) == [0, 1, 2, 3, 4]
    assert list(Deadline(at=0.0).within(items())) == []
    assert taken == [0, 1, 2, 3, 4]
