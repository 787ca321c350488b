"""Tables of unlearning part by part: means, intervals, floors, costs and paired contrasts, each by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis import load, refinement, report
from tests.analysis.made import Made

TUG = {  # of two originals, against each of two references
    "campaign": ((0.9, 0.8), (0.7, 0.6)),
    "entropy": ((0.8, 0.7), (0.4, 0.3)),
    "at random": ((0.5, 0.5), (0.5, 0.4)),
    None: ((0.3, 0.1), (0.2, 0.2)),
}
SWEEP = "5eed" * 8


def made(folder: Path) -> Path:
    content = Made()
    for number in range(2):
        content.run("reference", f"ref{number}", "random", number)
    for by, values in TUG.items():
        arm = {"at random": "rum_shuffled", None: "finetune"}.get(by, "rum")
        options = {"stage1": "identity", "stage2.lr": 0.1} | ({"scores": by} if arm == "rum" else {})
        key_of_ranking = {"campaign": "s", "entropy": "p"}.get(by or "")
        for seed, against in enumerate(values):
            key = f"{by} {seed}"
            content.run(
                *(arm, key, "random", seed),
                method=arm,
                options=json.dumps(options if arm != "finetune" else {"lr": 0.1}),
                learning_rate=0.1 if arm == "finetune" else None,
                memorization_key=key_of_ranking,
                seconds=2.0 + seed,
                steps_ratio=0.5,
            )
            for number, value in enumerate(against):
                content.compare(key, f"ref{number}", "tug_of_war", "all", value)
                content.compare(key, f"ref{number}", "tug_of_war_membership", "all", value / 2)
    for a, b in (("ref0", "ref1"), ("ref1", "ref0")):
        content.compare(a, b, "tug_of_war", "all", 0.95)
    campaign = {"scores_key": "s", "setting": "d", "estimator": "correctness", "models": 10, "model_seconds": 80.0}
    content.lines["campaigns"].append(campaign | {"in_accuracy": 1.0, "test_accuracy": 0.9})
    proxy = {"proxies_key": "p", "setting": "d", "proxy": "entropy", "index": 0, "value": 0.5}
    content.lines["proxies"].append(proxy | {"seconds": 0.5, "training_seconds": 4.0})
    return content.write(folder)


def test_a_line_is_the_mean_over_runs_with_an_interval_a_floor_and_what_the_ranking_cost(tmp_path: Path) -> None:
    frame = refinement.refinement_table(load.load(made(tmp_path)), SWEEP)
    lines = {line["parts_by"]: line for line in frame.to_dicts()}
    assert set(lines) == set(TUG)
    for by, values in TUG.items():
        means = np.mean(values, axis=1)
        half = stats.t.ppf(0.975, 1) * means.std(ddof=1) / np.sqrt(2)
        assert lines[by]["tug_of_war"] == pytest.approx(means.mean())
        assert lines[by]["tug_of_war_half_width"] == pytest.approx(half)
        assert lines[by]["tug_of_war_membership"] == pytest.approx(means.mean() / 2)
        assert (lines[by]["tug_of_war_floor"], lines[by]["tug_of_war_membership_floor"]) == (0.95, None)
        assert (lines[by]["num_runs"], lines[by]["seconds"], lines[by]["steps_ratio"]) == (2, 2.5, 0.5)
    costs = {by: line["ranking_seconds"] for by, line in lines.items()}
    assert costs == {"campaign": 80.0, "entropy": 4.5, "at random": None, None: None}


def test_contrasts_are_paired_and_adjusted(tmp_path: Path) -> None:
    frame = refinement.contrasts(load.load(made(tmp_path)), SWEEP)
    assert frame.select("parts_by", "against", "measure").rows() == [
        ("campaign", against, measure)
        for against in ("entropy", "at random")
        for measure in ("tug_of_war", "tug_of_war_membership")
    ]
    first = frame.to_dicts()[0]
    pairs = [0.85 - 0.75, 0.65 - 0.35]
    assert first["difference"] == pytest.approx(np.mean(pairs))
    assert first["p"] == pytest.approx(stats.ttest_1samp(pairs, 0).pvalue)
    assert first["low"] < first["difference"] < first["high"]
    assert (frame["p_holm"] >= frame["p"]).all()


def test_the_report_has_the_section_where_there_are_such_methods(tmp_path: Path) -> None:
    text = report.write(made(tmp_path / "e"), tmp_path / "report.html").read_text()
    assert "Part by part" in text
    assert "0.750 ±" in text
    content = Made()
    content.run("finetune", "a", "random", 0)
    plain = content.write(tmp_path / "plain")
    assert not len(refinement.refinement_table(load.load(plain), SWEEP))
    assert "Part by part" not in report.write(plain, tmp_path / "other.html").read_text()
