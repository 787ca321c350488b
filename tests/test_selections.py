"""Search, then confirm: what a setting is chosen by, and what can never have a part in it. Outputs are made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

from analysis import load, report, tables
from jobs import searching, sweep, work
from jobs.session import Options, open_session
from jobs.work import Cost
from orchestrator import export, plan, results, selections
from orchestrator.costs import Outcome
from orchestrator.criteria import CRITERIA
from orchestrator.data import DATASETS, Dataset, SplitOutputs
from orchestrator.overrides import override
from orchestrator.plan import Plan
from orchestrator.recipes import RECIPES
from orchestrator.registry import InputError
from orchestrator.results import Attempt, Row
from orchestrator.specs import RunSpec, key
from orchestrator.store import Sketch, Store
from orchestrator.study import Study
from tests.commands import rows, run

SMALL = ["methods=identity,finetune,del", "budget=0.1", "finetune.lr", "seeds=0,1", "tuning.seeds=100,101,102"]
SMALL = [f"methods.{text}=0.01,0.03,0.1,0.3" if text == "finetune.lr" else text for text in SMALL]
SIZE = 40  # examples of a made split: accuracies are fortieths

Accuracies = Mapping[str, float]
Made = Callable[[RunSpec], Accuracies]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    entry = DATASETS["digits"]
    data: Dataset = entry({}, entry.resolve({"label_noise": 0.05}))
    return data


def study(*texts: str) -> Study:
    return override(RECIPES["digits_tuned"].function(), [*SMALL, *texts])


def outputs(accuracies: Accuracies) -> dict[str, SplitOutputs]:
    """Outputs of ten classes with these accuracies."""
    made = {}
    for split, accuracy in accuracies.items():
        labels = np.arange(SIZE) % 10
        said = np.where(np.arange(SIZE) < round(accuracy * SIZE), labels, (labels + 1) % 10)
        made[split] = SplitOutputs(np.eye(10, dtype=np.float16)[said] * 9, labels, labels)
    return made


def pretend(store: Store, runs: Iterable[RunSpec], made: Made) -> None:
    """Store runs as if they had been performed."""
    facts = {"data": "digits", "model": "small_cnn", "seconds": 1.0, "numerics": "made", "git_commit": None}
    for spec in runs:
        row = Row(key(spec), spec.model_dump(mode="json"), {}, {}, {}, {}, (), facts | {"finished_at": 1.0})
        results.put_outputs(store, row.key, outputs(made(spec)))
        results.put_row(store, row)


def level(spec: RunSpec) -> dict[str, float]:
    """Made accuracies, in fortieths: DEL forgets well at .1, fine-tuning best at .03; every seed is a little other."""
    rate = {0.01: 0, 0.03: 1, 0.1: 2, 0.2: 3, 0.3: 3}.get(spec.method.options.get("lr", -1), 0)
    forget = {"retrain": 0.5, "identity": 1.0, "finetune": [0.9, 0.6, 0.7, 0.9][rate]}
    forget["reset_and_finetune"] = [0.9, 0.1, 0.55, 0.75][rate]
    shift = (spec.seed % 3) / SIZE
    return {"forget": forget[spec.method.name] - shift, "retain": 1.0 - shift, "validation": 0.9, "test": 0.9}


def planned(given: Study, dataset: Dataset, store: Store, made: Made = level) -> Plan:
    """The plan of a study whose tuning runs are all there."""
    tuning = plan.make(given, dataset, store).tuning
    assert tuning is not None
    pretend(
        store, (task.spec for task in (*tuning.references(), *tuning.runs()) if isinstance(task.spec, RunSpec)), made
    )
    return plan.make(given, dataset, store)


def chosen(settled: Plan) -> dict[tuple[str, str], float | None]:
    """The chosen rates by arm and forget set."""
    assert settled.selections is not None
    return {
        (cell.arm, cell.rule.name): None if s.chosen is None else s.candidates[s.chosen].options["lr"]
        for cell, s in settled.selections.items()
    }


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_the_choice_is_the_best_mean_criterion_worked_out_by_hand(dataset: Dataset, tmp_path: Path) -> None:
    settled = planned(study(), dataset, Store(str(tmp_path)))
    assert settled.selections is not None
    assert chosen(settled) == {
        ("finetune", "random"): 0.03, ("finetune", "mislabelled"): 0.03,
        ("del", "random"): 0.1, ("del", "mislabelled"): 0.1,
    }  # fmt: skip
    selection = next(s for cell, s in settled.selections.items() if cell.arm == "finetune")
    shifts, references = [(s % 3) / SIZE for s in (100, 101, 102)], [(10_000 + r) % 3 / SIZE for r in range(3)]
    by_hand = [
        np.mean([(1 - abs(0.6 - a - (0.5 - b))) * (1 - abs(b - a)) for b in references]) for a in shifts
    ]  # validation is equal
    assert selection.candidates[1].values == pytest.approx(by_hand)
    assert [len(c.values) for c in selection.candidates] == [3] * 4
    assert len(selection.references) == 3


def test_settings_that_tie_go_by_their_order(dataset: Dataset, tmp_path: Path) -> None:
    def flat(spec: RunSpec) -> Accuracies:
        return {"forget": 0.5, "retain": 1.0, "validation": 0.9, "test": 0.9}

    settled = planned(study(), dataset, Store(str(tmp_path / "a")), flat)
    assert set(chosen(settled).values()) == {0.01, 0.03}, "the first of finetune and of del"
    turned = study("methods.finetune.lr=0.3,0.1,0.03,0.01")
    assert chosen(planned(turned, dataset, Store(str(tmp_path / "b")), flat))["finetune", "random"] == 0.3


def test_neither_the_test_split_nor_a_reported_run_can_change_a_choice(dataset: Dataset, tmp_path: Path) -> None:
    before = planned(study(), dataset, Store(str(tmp_path / "plain")))
    store = Store(str(tmp_path / "poisoned"))
    pretend(store, (spec for _, spec in study().runs(dataset.fingerprint)), lambda spec: _worst(level(spec)))
    pretend(store, study().reference_runs(dataset.fingerprint), lambda spec: _worst(level(spec)))

    def poisoned(spec: RunSpec) -> Accuracies:
        rate = spec.method.options.get("lr", 0)
        return level(spec) | {"test": 0.0 if rate in (0.03, 0.1) else 1.0}

    after = planned(study(), dataset, store, poisoned)
    assert after.selections is not None
    assert before.selections is not None
    assert list(after.selections.values()) == list(before.selections.values())
    assert after.keys == before.keys


def _worst(accuracies: Accuracies) -> Accuracies:
    return {split: 1 - value for split, value in accuracies.items()}


def test_a_tuning_run_shares_no_seed_set_or_model_with_what_is_reported(dataset: Dataset, tmp_path: Path) -> None:
    for protocol in ("paired", "del", "joint"):
        made = plan.make(study(f"protocol={protocol}", "tuning.draw=7"), dataset, Store(str(tmp_path)))
        assert made.tuning is not None
        ours, theirs = (p.study for p in (made, made.tuning))
        ours_runs = [*ours.reference_runs(made.fingerprint), *(spec for _, spec in ours.runs(made.fingerprint))]
        their_runs = [*theirs.reference_runs(made.fingerprint), *(spec for _, spec in made.tuning.named_runs())]
        for part in (key, lambda s: key(s.forget), lambda s: key(s.original) if s.original else s, lambda s: s.seed):
            assert not {*map(str, map(part, ours_runs))} & {*map(str, map(part, their_runs))}, protocol


def test_one_failed_seed_takes_a_setting_out_and_names_it(dataset: Dataset, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    tuning = plan.make(study(), dataset, store).tuning
    assert tuning is not None
    specs = [t.spec for t in (*tuning.references(), *tuning.runs()) if isinstance(t.spec, RunSpec)]

    def fails(spec: RunSpec) -> bool:
        rate, on_random = spec.method.options.get("lr"), spec.forget.rule.label == "random"
        return on_random and (spec.method.name, rate, spec.seed) == ("finetune", 0.03, 101)

    pretend(store, (spec for spec in specs if not fails(spec)), level)
    (victim,) = filter(fails, specs)
    results.put_attempt(store, Attempt(key(victim), victim.model_dump(mode="json"), "failed", "loss is NaN"))
    made = plan.make(study(), dataset, store)
    assert made.selections is None, "it is tried again before anything is chosen"
    assert made.undecided == 2 * 2 * 2
    settled = made.settled(store)
    assert settled.selections is not None
    assert chosen(settled)["finetune", "random"] == 0.1
    assert chosen(settled)["finetune", "mislabelled"] == 0.03
    found = next(s for s in settled.selections.values() if (s.arm, s.forget_set) == ("finetune", "random"))
    assert [c.error for c in found.candidates] == [None, "loss is NaN", None, None]
    assert settled.undecided == 0


def test_a_setting_that_failed_before_is_counted_and_what_its_failing_again_leaves_is_there(
    dataset: Dataset, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    tuning = plan.make(study(), dataset, store).tuning
    assert tuning is not None
    specs = [t.spec for t in (*tuning.references(), *tuning.runs()) if isinstance(t.spec, RunSpec)]
    *others, victim, waiting = specs
    pretend(store, others, level)
    results.put_attempt(store, Attempt(key(victim), victim.model_dump(mode="json"), "failed", "loss is NaN"))
    some = plan.make(study(), dataset, store)
    assert some.foreseen(store).undecided == 2 * 2 * 2, "one was never tried: nobody knows what will be chosen"
    pretend(store, [waiting], level)
    made = plan.make(study(), dataset, store)
    assert made.tuning is not None
    assert [task.spec for task in made.tuning.failed_before(store)] == [victim]
    assert made.undecided == 2 * 2 * 2, "it is tried again before anything is chosen"
    foreseen = made.foreseen(Sketch(store.root))
    assert not store.names("selections"), "a dry run stored a choice"
    pretend(store, [spec for _, spec in foreseen.named_runs()], level)
    counts = plan.make(study(), dataset, store).foreseen(store).counts()
    assert (counts["tuning runs"]["missing"], counts["runs"]["missing"], counts["runs"]["done"]) == (1, 0, 4 + 8)
    results.put_attempt(store, Attempt(key(victim), victim.model_dump(mode="json"), "interrupted", "killed"))
    assert made.tuning.failed_before(store) == []


def test_what_failed_again_is_said_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    failed = [Outcome("run", name, 0, 0.0, 0.0, 0.0, 0.0, "loss is NaN", name) for name in ("a", "b")]
    once_more = "2 failed, 1 of them not for the first time; the first: loss is NaN."
    for again, said in (({"b", "c"}, once_more), (set[str](), "2 failed; the first: loss is NaN.")):
        with pytest.raises(typer.Exit) as end:
            work.conclude(work.Cost(failed, again=again))
        assert end.value.exit_code == 1
        assert said in " ".join(capsys.readouterr().out.split())


def test_tuning_runs_that_there_was_no_time_for_are_left(tmp_path: Path) -> None:
    """Worked by hand for two forget sets, two tuned arms of four and three rates, and `identity`."""
    session = open_session(Options("digits_tuned", [*SMALL, "methods.del.lr=0.03,0.1,0.2"], str(tmp_path)))
    tuning = session.plan.tuning
    assert tuning is not None
    runs = [task.spec for task in tuning.runs() if isinstance(task.spec, RunSpec)]
    tuned = 3 + 2 * 3 + 2 * 3 + 2 * (4 + 3) * 3  # originals, references, localizations, runs
    reported = 2 + 2 * 5 + 2 * 2 + 2 * 2 * 2  # originals, references, identity, and those that are not known yet
    assert sweep._num_left(session, Cost(), None) == tuned + reported
    pretend(session.store, runs[:1], level)
    assert sweep._num_left(session, Cost(), None) == tuned + reported - 1
    pretend(session.store, runs, level)
    assert sweep._num_left(session, Cost(), None) == 2 * 3 + reported, "finished runs need no original"


def test_runs_of_settings_that_optuna_has_not_chosen_are_left_by_seed(tmp_path: Path) -> None:
    one = [
        "methods=finetune",
        "forget_sets=random",
        "seeds=0,1",
        "references=2",
        "methods.finetune.lr=loguniform(1e-3, 1e-1)",
    ]
    words = [*one, "search.kind=optuna", "search.objective=loss/validation", "search.samples=3"]
    session = open_session(Options("digits", words, str(tmp_path)))
    asking = searching.Asking(session, sweep._record(session), session.plan)
    asking.ask()
    assert (
        sweep._num_left(session, Cost(), asking) == 2 + 2 + 2 * 3
    )  # originals, references, three settings on two seeds


def test_a_cell_whose_settings_all_failed_is_not_reported(dataset: Dataset, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    tuning = plan.make(study(), dataset, store).tuning
    assert tuning is not None
    specs = [t.spec for t in (*tuning.references(), *tuning.runs()) if isinstance(t.spec, RunSpec)]
    pretend(store, (s for s in specs if s.method.name != "finetune"), level)
    settled = plan.make(study(), dataset, store).settled(store)
    arms = {arm for arm, _ in settled.named_runs()}
    assert arms == {"identity", "del"}
    assert chosen(settled)["finetune", "random"] is None
    assert settled.selections is not None
    reason = next(s.reason for s in settled.selections.values() if s.arm == "finetune")
    assert "none of 4 settings" in reason


def test_a_criterion_without_references_trains_none(dataset: Dataset, tmp_path: Path) -> None:
    made = plan.make(study("tuning.criterion=forget_as_unseen"), dataset, Store(str(tmp_path)))
    assert made.tuning is not None
    assert made.tuning.references() == []
    settled = planned(study("tuning.criterion=forget_as_unseen"), dataset, Store(str(tmp_path)))
    assert chosen(settled)["finetune", "random"] == 0.01, "nearest to the original's accuracy on validation, .9"
    assert settled.selections is not None
    assert {s.references for s in settled.selections.values()} == {()}


def test_criteria_are_what_they_say() -> None:
    ours, other = ({"forget": 0.5, "retain": 0.9, "validation": 0.8}, {"forget": 0.7, "retain": 1.0, "validation": 0.9})
    given = {"outputs": outputs(ours), "references": [outputs(other), outputs(ours)], "original": outputs(other)}
    assert CRITERIA["tug_of_war_validation"](given, {}) == pytest.approx((0.8 * 0.9 * 0.9 + 1) / 2)
    assert CRITERIA["forget_as_unseen"](given, {}) == pytest.approx(0.6 * 0.9 * 0.9)


# ---- what is refused, and what stands in -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["tuning.seeds=1,100"], "tuning.seeds has 1, which the study reports"),
        (["tuning.draw=0"], "tuning.draw is 0, which the study reports"),
        (["protocol=joint", "tuning.draw=1"], "tuning.draw is 1, which the study reports"),
        (["protocol=del", "original_seed=100"], "tuning.seeds has 100, which the study reports"),
        (["tuning.forget_sets.mislabelled=mislabelled"], "would be tuned on itself"),
        (["tuning.criterion=accuracy"], "unknown criterion 'accuracy'"),
        (["tuning.forget_sets.whole_class=random"], "unknown field"),
        (["tuning=none", "tuning.draw=3"], "set tuning.criterion first"),
        (["tuning=forget_as_unseen"], "allowed: none; to tune, set tuning.criterion=forget_as_unseen"),
        (["tuning.criterion=forget_as_unseen", "tuning.references=7"], "asks for no references"),
        (["tuning.references=7", "tuning.criterion=forget_as_unseen"], "asks for no references"),
        (["methods=finetune", "tuning.criterion=forget_as_unseen"], "the method identity reports"),
        (["methods.del.budget=uniform(0.1, 0.3)"], "each draw is a cell of its own"),
        (["methods=finetune", "forget_sets=random", "search.kind=optuna"], "Optuna chooses settings by the runs that"),
    ],
)
def test_tuning_by_what_is_reported_is_refused(texts: list[str], said: str, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        plan.make(study(*texts), dataset, Store(str(tmp_path)))


def test_several_options_of_a_stage_are_refused_where_settings_are_tuned(dataset: Dataset, tmp_path: Path) -> None:
    staged = ["tuning.criterion=tug_of_war_validation", "forget_sets=random", "methods.rum.stages.2.lr=0.01,0.03"]
    tuned = override(RECIPES["digits_rum"].function(), staged)
    with pytest.raises(InputError, match=r"methods\.rum\.stages\.2 has several values of lr"):
        plan.make(tuned, dataset, Store(str(tmp_path)))


def test_data_without_a_validation_split_are_refused_with_the_remedy(dataset: Dataset, tmp_path: Path) -> None:
    bare = replace(dataset, splits={**dataset.splits, "validation": np.array([], dtype=np.int64)})
    with pytest.raises(InputError, match=r"needs a validation split; set data\.num_validation"):
        plan.make(study(), bare, Store(str(tmp_path)))


def test_what_draws_nothing_is_tuned_on_a_random_set_of_its_size(dataset: Dataset, tmp_path: Path) -> None:
    given = study("forget_sets=random,mislabelled,whole_class", "forget_sets.whole_class.label=3")
    released = override(given, ["forget_sets.random.as_released=true", "tuning.forget_sets.whole_class=random"])
    made = plan.make(released, dataset, Store(str(tmp_path)))
    labels = dataset.split_labels("train")
    flips = int((labels != dataset.split_true_labels("train")).sum())
    assert {name: rule.options["fraction"] for name, rule in made.stand_ins_of.items()} == {
        "random": 0.1, "mislabelled": flips / len(labels), "whole_class": 0.1
    }  # fmt: skip
    assert not made.stand_ins_of["random"].options["as_released"], "what was released is one draw"
    apart = plan.make(given, dataset, Store(str(tmp_path))).stand_ins_of["whole_class"]
    assert round(apart.options["fraction"] * len(labels)) == int((labels == 3).sum())


def test_arms_with_one_setting_are_reported_without_tuning(dataset: Dataset, tmp_path: Path) -> None:
    single = ["methods.finetune.lr=0.1", "methods.del.lr=0.1"]
    made = plan.make(study(*single), dataset, Store(str(tmp_path)))
    assert (made.tuning, made.undecided) == (None, 0)
    assert (
        made.sweep({}).members
        == plan.make(study(*single, "tuning=none"), dataset, Store(str(tmp_path))).sweep({}).members
    )
    some = plan.make(study(single[0]), dataset, Store(str(tmp_path)))
    assert some.tuning is not None
    assert {arm for arm, _ in some.tuning.named_runs()} == {"del"}
    assert {arm for arm, _ in some.named_runs()} == {"identity", "finetune"}, "what is known before the choice"


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_sweep_keeps_its_name_whatever_is_chosen_and_says_what_each_run_is(dataset: Dataset, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    before = plan.make(study(), dataset, store).sweep({})
    settled = planned(study(), dataset, store)
    after = settled.sweep({})
    assert after.key == before.key
    assert (before.undecided, after.undecided) == (8, 0)
    counts = plan.make(study(), dataset, Store(str(tmp_path / "empty"))).counts()
    assert [counts[name]["missing"] for name in ("tuning runs", "runs", "tuning references")] == [48, 12, 6]
    assert before.key not in (
        plan.make(study("tuning.criterion=forget_as_unseen"), dataset, store).sweep({}).key,
        plan.make(study("tuning=none"), dataset, store).sweep({}).key,
    )
    by_role: dict[str, set[str]] = {}
    for member in after.members:
        by_role.setdefault(member.role, set()).add(member.arm)
    assert by_role == {
        "reported": {"identity", "reference"},
        "confirmed": {"finetune", "del"},
        "tuning": {"finetune", "del", "reference"},
    }
    confirmed = {member.key for member in after.members if member.role == "confirmed"}
    assert confirmed == {name for names in after.selections.values() for name in names}
    assert len(confirmed) == 2 * 2 * 2
    results.put_sweep(store, after)
    assert results.get_sweep(store, after.key) == replace(after, study=json.loads(json.dumps(after.study)))


def test_a_sweep_from_before_roles_is_read_as_reported(tmp_path: Path) -> None:
    from orchestrator.sealed import seal

    store = Store(str(tmp_path))
    old = {"key": "k", "recipe": "digits", "members": [{"arm": "del", "key": "r"}], "study": {}, "provenance": {}}
    store.put("sweeps/k.json", seal(old))
    (sweep,) = results.get_sweeps(store)
    assert (sweep.members[0].role, dict(sweep.selections), sweep.undecided) == ("reported", {}, 0)


def test_the_exported_choices_say_what_was_chosen_and_how_it_held_up(dataset: Dataset, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    settled = planned(study(), dataset, store)
    confirming = [spec for _, spec in settled.named_runs()]
    pretend(store, [*confirming, *study().reference_runs(dataset.fingerprint)], level)
    sweep = settled.sweep({})
    results.put_sweep(store, sweep)
    have = {member.key: results.get_row(store, member.key) for member in sweep.members}
    lines = [
        line
        for line in export.selection_lines(store, [sweep], have)
        if (line["arm"], line["forget_set"]) == ("finetune", "random")
    ]
    assert [json.loads(line["options"])["lr"] for line in lines] == [0.01, 0.03, 0.1, 0.3]
    assert [line["chosen"] for line in lines] == [False, True, False, False]
    assert (lines[1]["mean"], lines[1]["n"]) == (pytest.approx(np.mean(lines[1]["values"])), 3)
    sides = [lines[1][name] for name in ("values", "by_reference")]
    assert lines[1]["standard_error"] == pytest.approx(np.sqrt(sum(np.var(side, ddof=1) / 3 for side in sides)))
    references = [r % 3 / SIZE for r in range(5)]
    by_hand = np.mean([[(1 - abs(0.6 - a - (0.5 - b))) * (1 - abs(b - a)) for b in references] for a in (0, 1 / SIZE)])
    assert (lines[1]["confirmed_n"], lines[1]["confirmed_mean"]) == (2, pytest.approx(by_hand))
    assert [line.get("confirmed_mean") for line in lines if not line["chosen"]] == [None] * 3


@pytest.mark.parametrize("texts", [["seeds=0,1,2"], ["protocol=joint", "seeds=0,1,2"], ["protocol=del", "seeds=0,1"]])
def test_the_error_of_a_confirmed_value_is_that_of_the_main_table(
    texts: list[str], dataset: Dataset, tmp_path: Path
) -> None:
    """Runs that differ from their references in forget accuracy alone, to one side: tug-of-war is 1 - (a - b) there."""

    def forget_alone(spec: RunSpec) -> dict[str, float]:
        low, high = {"retrain": (0.2, 0.4), "identity": (1.0, 1.0)}.get(spec.method.name, (0.6, 0.8))
        place = int(key(spec)[:4], 16) / 16**4
        return {"forget": low + place * (high - low), "retain": 1.0, "validation": 0.9, "test": 0.9}

    store, given = Store(str(tmp_path)), study("methods=identity,finetune", "forget_sets=random", *texts)
    settled = planned(given, dataset, store, forget_alone)
    pretend(store, [spec for _, spec in settled.named_runs()], forget_alone)
    pretend(store, given.reference_runs(dataset.fingerprint), forget_alone)
    sweep = settled.sweep({})
    results.put_sweep(store, sweep)
    export.export(store)
    read = load.load(tmp_path / "exports")
    (line,) = (x for x in tables.comparison_table(read, sweep.key).to_dicts() if x["arm"] == "finetune")
    (chosen,) = (x for x in read.selections.to_dicts() if x["chosen"])
    assert line["is_tuned"]
    assert chosen["confirmed_mean"] == pytest.approx(1 + line["forget_difference"] / 100)
    assert chosen["confirmed_standard_error"] == pytest.approx(line["forget_standard_error"] / 100)
    assert (chosen["confirmed_by_reference"] is None) == ("protocol=joint" in texts)


def test_a_choice_from_before_values_by_reference_has_no_error(dataset: Dataset, tmp_path: Path) -> None:
    from orchestrator.sealed import seal, unseal

    store = Store(str(tmp_path))
    made = planned(study(), dataset, store).selections
    assert made is not None
    selection = next(iter(made.values()))
    body = unseal(store, f"selections/{selection.key}.json")
    for candidate in body["candidates"]:
        del candidate["by_reference"]
    store.put(f"selections/{selection.key}.json", seal(body))
    read = selections.get_selection(store, selection.key)
    assert read is not None
    assert [c.judged.mean for c in read.candidates] == [c.judged.mean for c in selection.candidates]
    assert {c.judged.standard_error for c in read.candidates} == {None}
    assert None not in {c.judged.standard_error for c in selection.candidates}


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_tuned_sweep_runs_the_chosen_settings_alone_and_is_complete_without_ray(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    fields = ["methods=identity,finetune", "forget_sets=random", "training.epochs=1", "epochs=1", "references=2"]
    fields += ["seeds=0", "tuning.seeds=100", "tuning.references=1", "methods.finetune.lr=0.001,0.1"]
    options = [word for field in fields for word in ("--set", field)]
    words = ["sweep", "digits", "--tune", "tug_of_war_validation", *options, "--storage", str(tmp_path)]
    done = run(*words, "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows(tmp_path)) == 1 + 2 + 2 + 1 + 1  # a tuning reference, tuning runs, references, identity, finetune
    again = run(*words, environment={"RAY_ADDRESS": "127.0.0.1:1"})
    assert again.returncode == 0, again.stderr
    assert "0 models trained" in again.stdout
    runs = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    roles = sorted(r.data.tags["unlearn.role"] for r in runs if r.data.tags["unlearn.kind"] == "run")
    assert roles == ["confirmed", *["reported"] * 3, *["tuning"] * 3]
    assert re.search(r"^finetune\* +0\.", done.stdout, re.MULTILINE), "the table marks what was chosen"
    text = report.write(tmp_path / "exports", tmp_path / "r.html").read_text()
    assert "How each setting was chosen" in text
