"""Paper tables against numbers worked by hand and scipy."""

import numpy as np
import polars as pl
import pytest
from scipy import stats

from analysis import paper
from analysis.load import Tables
from analysis.paper import PUBLISHED, Published, ablation_grid, comparisons_with_paper, paper_table, reproduced


def sweep_of(read: Tables) -> str:
    found: str = read.members["sweep"][0]
    return found


def test_agreement_with_a_published_number_by_hand() -> None:
    """t(.975, 4) = 2.776; .42 and .5 over three runs: 2.776 x sqrt((.1764 + .25) / 3) = 1.0467."""
    known = Published("r", "del", "forget", 0.97, 0.42)
    assert reproduced(0.97 + 1.04, 0.5, known)
    assert reproduced(0.97 - 1.04, 0.5, known)
    assert not reproduced(0.97 + 1.05, 0.5, known)
    assert not reproduced(0.97 - 1.05, 0.5, known)


def test_the_published_numbers_are_those_of_the_reviews() -> None:
    assert {(p.recipe[len("cifar10_resnet18_") :], p.arm, p.measure): (p.mean, p.spread) for p in PUBLISHED} == {
        ("iid", "del", "forget"): (0.97, 0.42),
        ("iid", "del", "mia"): (-0.97, 0.40),
        ("iid", "random_labels", "forget"): (1.69, 0.46),
        ("classes", "del", "forget"): (0.43, 1.06),
        ("classes", "salloc_relabel", "forget"): (-2.8, 1.45),
    }


def test_our_numbers_are_held_against_the_published_ones_of_the_same_recipe_alone() -> None:
    line = {"arm": "del", "variant": None, "learning_rate": 0.015, "budget": 0.3, "num_runs": 3}
    frame = pl.DataFrame([line | {"forget": 0.5, "forget_spread": 0.4, "mia": 9.0, "mia_spread": 0.1}])
    said = comparisons_with_paper(frame, "cifar10_resnet18_iid")
    assert [text.rpartition(": ")[2] for text in said] == ["reproduced", "not reproduced"]
    assert "ours +0.50 ± 0.40 (n=3), published +0.97 ± 0.42" in said[0]
    assert comparisons_with_paper(frame, "digits") == []


def test_the_measure_of_a_line_is_reference_minus_run_with_the_spread_of_the_runs() -> None:
    ours, theirs = np.array([80.0, 82.0, 84.0]), np.array([90.0, 91.0, 92.0, 93.0, 94.0])
    found = paper._measured("forget", [(theirs, ours)])
    assert found["forget"] == 10
    assert found["forget_spread"] == 2
    assert found["forget_p"] == pytest.approx(stats.ttest_ind(theirs, ours, equal_var=False).pvalue)
    assert paper._measured("mia", [(theirs, ours[:1])]) == {"mia": 12.0}
    assert paper._measured("forget", []) == {}
    assert paper._welch(np.array([1.0, 1.0]), np.array([2.0, 2.0])) is None


def test_a_whole_sweep_as_the_papers_table(read: Tables) -> None:
    frame = paper_table(read, sweep_of(read))
    settings = frame.select("forget_set", "arm", "learning_rate", "budget").rows()
    assert len(set(settings)) == len(settings) > 3
    values = {(k, m, s): v for k, m, s, v in read.metrics.select("key", "metric", "split", "value").rows()}
    members = read.members.filter(pl.col("sweep") == sweep_of(read)).join(read.runs, on="key")
    for line in frame.iter_rows(named=True):
        same = pl.col("forget_set") == line["forget_set"]
        chosen = members.filter(
            same
            & (pl.col("arm") == line["arm"])
            & pl.col("budget").eq_missing(line["budget"])
            & pl.col("learning_rate").eq_missing(line["learning_rate"])
        )["key"]
        references = members.filter(same & (pl.col("arm") == "reference"))["key"]
        ours = [100 * values[key, "accuracy", "test"] for key in chosen]
        theirs = [100 * values[key, "accuracy", "test"] for key in references]
        assert line["num_runs"] == len(ours)
        assert line["test"] == pytest.approx(np.mean(theirs) - np.mean(ours))
        assert line["test_p_holm"] is None or line["test_p_holm"] >= line["test_p"]


def test_the_ablation_has_a_row_for_each_localization_and_a_column_for_each_budget(read: Tables) -> None:
    frame = paper.ablation_table(read, sweep_of(read))
    assert len(frame)
    assert frame["tug_of_war"].is_between(0, 1).all()
    headings, rows = ablation_grid(frame.filter(pl.col("forget_set") == frame["forget_set"][0]))
    assert headings[:5] == ["arm", "strategy", "granularity", "method", "rate"]
    assert [float(name) for name in headings[5:]] == sorted(float(name) for name in headings[5:])
    assert all(len(row) == len(headings) for row in rows)
