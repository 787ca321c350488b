"""What a dry run says of time: medians of what was measured, worked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import costs, results
from orchestrator.costs import Stretch
from orchestrator.estimates import Estimate, measured
from orchestrator.plan import Plan
from orchestrator.recipes import RECIPES
from orchestrator.results import Row
from orchestrator.specs import RunSpec, key
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.tasks import Task
from tests import golden

NUM_TRAIN = 1000  # 15 full batches of 64 an epoch; 10 of them in a subset of 700


@pytest.fixture
def study() -> Study:
    return RECIPES["digits"].function()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def put_row(store: Store, spec: RunSpec, seconds: float, numerics: str = "cpu AVX2", **measurements: float) -> None:
    provenance: dict[str, Any] = {"seconds": seconds, "numerics": numerics, "finished_at": 0.0}
    results.put_row(store, Row(key(spec), spec.model_dump(mode="json"), {}, {}, {}, measurements, (), provenance))


def estimate(store: Store, study: Study, tasks: list[Task], *, on_gpu: bool = False) -> Estimate:
    return measured(store, study.setting(golden.FINGERPRINT), NUM_TRAIN, on_gpu=on_gpu).of(tasks)


def test_trainings_go_by_the_median_seconds_of_a_step(study: Study, store: Store) -> None:
    references = study.reference_runs(golden.FINGERPRINT)
    for spec, seconds in zip(references, (30.0, 60.0, 600.0), strict=False):
        put_row(store, spec, seconds, steps=300)
    put_row(store, references[3], 1.0, "cuda H100", steps=300)
    plan = Plan(study, golden.FINGERPRINT, frozenset())
    assert estimate(store, study, plan.references()[:2]) == Estimate(2 * 20 * 15 * 0.2)
    assert estimate(store, study, plan.models(plan.blocks())[:5]) == Estimate(pytest.approx(5 * 20 * 10 * 0.2))
    assert estimate(store, study, plan.originals()[:1], on_gpu=True) == Estimate(pytest.approx(300 * 1.0 / 300))
    other = study.model_copy(update={"model": RECIPES["cifar10_small"].function().model})
    assert estimate(store, other, plan.references()[:1]) == Estimate(unknown=("training",))


def test_a_campaign_measures_trainings_too(study: Study, store: Store) -> None:
    spec = study.campaign_spec(golden.FINGERPRINT)
    stretch = Stretch("a", "memorize", "digits", "digits", key(spec), spec.model_dump(mode="json"), "cpu", 1.0, 0.0)
    costs.put_stretch(store, replace(stretch, status="finished", models=10, model_seconds=10 * 4.0))
    plan = Plan(study, golden.FINGERPRINT, frozenset())
    assert estimate(store, study, plan.models(plan.blocks())).seconds == pytest.approx(200 * 4.0)
    assert estimate(store, study, plan.originals()).seconds == pytest.approx(3 * 4.0 * 15 / 10)


def test_methods_go_by_equal_options_and_else_by_their_epochs(study: Study, store: Store) -> None:
    runs = [run for _, run in study.runs(golden.FINGERPRINT) if run.method.name == "finetune"]
    put_row(store, runs[0], 10.0)
    at_another_rate = next(run for run in runs if run.method.options["lr"] != runs[0].method.options["lr"])
    assert estimate(store, study, [Task("run", at_another_rate)]) == Estimate(10.0)
    longer = runs[0].method.model_copy(update={"options": {**runs[0].method.options, "epochs": 15}})
    assert estimate(store, study, [Task("run", runs[0].model_copy(update={"method": longer}))]) == Estimate(30.0)
    others = [Task("run", run) for _, run in study.runs(golden.FINGERPRINT) if run.method.name == "neg_grad_plus"]
    assert estimate(store, study, others) == Estimate(unknown=("neg_grad_plus",))
