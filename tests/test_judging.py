"""The ± of what a criterion says of runs held against references: simulated, and by brute force."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from orchestrator import results, uncertainty
from orchestrator.criteria import CRITERIA
from orchestrator.data import Outputs
from orchestrator.judging import Judge, Judged, Side
from orchestrator.metrics import accuracy
from orchestrator.store import Store
from tests.test_selections import SIZE, outputs

REPEATS = 2000


@pytest.fixture
def spread_criterion() -> Iterator[str]:
    """A criterion that is no mean over references: minus the squared gap to their mean forget accuracy."""

    @CRITERIA
    def squared_gap(outputs: Outputs, references: list[Outputs]) -> float:
        """Minus the squared gap."""
        return -float((accuracy(outputs)["forget"] - np.mean([accuracy(r)["forget"] for r in references])) ** 2)

    yield "squared_gap"
    del CRITERIA._entries["squared_gap"]


def covered(sides: list[np.ndarray], truth: float, mean: float) -> bool:
    found = uncertainty.of_means(*sides)
    assert found is not None
    return bool(abs(mean - truth) <= stats.t.ppf(0.975, found.freedom) * found.standard_error)


@pytest.mark.parametrize(("runs", "references"), [(3, 3), (3, 5), (5, 20)])
def test_the_interval_covers_the_truth_where_both_sides_scatter(runs: int, references: int) -> None:
    """Known standard deviations: .01 of a run, .02 of a reference; over runs alone the interval misses more often."""
    rng = np.random.default_rng(0)
    both, alone, variances = 0, 0, []
    for _ in range(REPEATS):
        pairs = 0.9 + rng.normal(0, 0.01, (runs, 1)) + rng.normal(0, 0.02, (1, references))
        judged = Judged(tuple(pairs.mean(axis=1)), tuple(pairs.mean(axis=0)))
        sides = [np.asarray(side) for side in judged.sides]
        both += covered(sides, 0.9, pairs.mean())
        alone += covered(sides[:1], 0.9, pairs.mean())
        assert judged.standard_error is not None
        variances.append(judged.standard_error**2)
    assert np.mean(variances) == pytest.approx(0.01**2 / runs + 0.02**2 / references, rel=0.08)
    assert 0.935 <= both / REPEATS <= 0.985
    assert alone / REPEATS < both / REPEATS - 0.05


def test_the_error_of_tug_of_war_errs_on_the_wide_side() -> None:
    """Runs as good as references: |gap| then belongs to pairs, and counts on both sides; it is far from normal."""
    rng = np.random.default_rng(1)
    draws = [(rng.normal(0.8, 0.03, 3), rng.normal(0.8, 0.03, 5)) for _ in range(REPEATS)]
    tugs = [1 - abs(ours[:, None] - theirs[None, :]) for ours, theirs in draws]
    truth = 1 - 0.03 * np.sqrt(2) * np.sqrt(2 / np.pi)  # E|difference| of two such normals
    assert np.mean([covered([tug.mean(axis=1), tug.mean(axis=0)], truth, tug.mean()) for tug in tugs]) > 0.91
    errors = [uncertainty.of_means(tug.mean(axis=1), tug.mean(axis=0)) for tug in tugs]
    assert np.mean([e.standard_error**2 for e in errors if e]) >= np.var([tug.mean() for tug in tugs])


def stored(store: Store, accuracies: list[float], name: str) -> list[str]:
    for place, forget in enumerate(accuracies):
        made = outputs({"forget": forget, "retain": 1 - place / SIZE, "validation": 0.9, "test": 0.0})
        results.put_outputs(store, f"{name}{place}", made)
    return [f"{name}{place}" for place in range(len(accuracies))]


def test_a_judged_setting_has_its_values_by_run_and_by_reference(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    runs, references = stored(store, [0.5, 0.6], "u"), stored(store, [0.55, 0.4, 0.7], "r")
    judged = Judge(store, "tug_of_war_validation")(Side(dict.fromkeys(runs), references))
    ours, theirs = ([(0.5, 1.0), (0.6, 1 - 1 / SIZE)], [(0.55, 1.0), (0.4, 1 - 1 / SIZE), (0.7, 1 - 2 / SIZE)])
    pairs = np.array([[(1 - abs(a - b)) * (1 - abs(c - d)) for b, d in theirs] for a, c in ours])
    assert judged.values == pytest.approx(pairs.mean(axis=1))
    assert judged.by_reference == pytest.approx(pairs.mean(axis=0))
    by_hand = np.sqrt(np.var(pairs.mean(axis=1), ddof=1) / 2 + np.var(pairs.mean(axis=0), ddof=1) / 3)
    assert judged.standard_error == pytest.approx(by_hand)


def test_a_criterion_that_is_no_mean_over_references_has_their_jackknife_variance(
    spread_criterion: str, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    forget = [0.55, 0.4, 0.7, 0.5]
    runs, references = stored(store, [0.5, 0.6], "u"), stored(store, forget, "r")
    judged = Judge(store, spread_criterion)(Side(dict.fromkeys(runs), references))
    left = [np.mean([-((a - np.mean(np.delete(forget, j))) ** 2) for a in (0.5, 0.6)]) for j in range(4)]
    assert judged.by_reference is not None
    assert np.var(judged.by_reference, ddof=1) / 4 == pytest.approx(3 / 4 * np.sum((left - np.mean(left)) ** 2))


def test_too_few_runs_or_references_have_no_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    runs, references = stored(store, [0.5, 0.6], "u"), stored(store, [0.55, 0.4], "r")
    judge = Judge(store, "tug_of_war_validation")
    assert judge(Side(dict.fromkeys(runs), references)).standard_error is not None
    assert judge(Side(dict.fromkeys(runs[:1]), references)).standard_error is None
    assert judge(Side(dict.fromkeys(runs), references[:1])).standard_error is None
    assert Judged().standard_error is None
    alone = Judge(store, "forget_as_unseen")(Side(dict.fromkeys(runs, "r0"), []))
    assert alone.by_reference is None
    assert alone.standard_error == pytest.approx(np.std(alone.values, ddof=1) / np.sqrt(2))
