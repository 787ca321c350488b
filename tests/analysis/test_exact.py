"""Exact scores beside subset estimates: what is compared with what, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from analysis import exact, load, report
from tests.analysis.made import Made

RNG = np.random.default_rng(3)
SUBSET = RNG.random(30)
EXACT = np.clip(SUBSET**2 + RNG.normal(0, 0.2, 30), -1, 1)


def lines(name: str, scores: np.ndarray, seeds: int, setting: str = "d") -> list[dict[str, object]]:
    return [
        {"exact_key": name, "setting": setting, "selection": "spread:30", "estimator": estimator}
        | {"index": 3 * i, "label": 1, "true_label": i % 2, "num_in": seeds, "num_out": seeds}
        | {"in_mean": 1.0, "out_mean": 0.5, "standard_error": 0.1}
        | {"score": float(value), "low": float(value) - 0.1, "high": float(value) + 0.2}
        | {"accuracy": 0.99, "test_accuracy": 0.9, "model_seconds": 12.0}
        for estimator in ("correctness", "probability")
        for i, value in enumerate(scores)
    ]


def made(folder: Path, *tables: list[dict[str, object]], campaign: str = "d") -> Path:
    content = Made()
    for index in range(90):
        content.lines["memorization"].append(
            dict.fromkeys(("in_mean", "out_mean", "standard_error"), 0.1)
            | {"scores_key": "s", "index": index, "label": 1, "true_label": 1, "score": float(SUBSET[index // 3])}
            | {"low": float(SUBSET[index // 3]) - 0.05, "high": 1.0, "num_in": 14, "num_out": 6}
        )
    content.lines["campaigns"].append(
        {"scores_key": "s", "setting": campaign, "estimator": "correctness", "models": 20, "in_accuracy": 1.0}
        | {"test_accuracy": 0.9, "model_seconds": 50.0}
    )
    for table in tables:
        content.lines["exact"] += table
    return content.write(folder)


def test_rank_correlation_is_scipys_over_the_same_examples(tmp_path: Path) -> None:
    (found,) = exact.comparisons(load.load(made(tmp_path, lines("e", EXACT, 20))))
    assert found.correlation == pytest.approx(spearmanr(SUBSET, EXACT).statistic)
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < found.correlation < found.high < 1
    assert (found.scores_key, found.estimator, found.seeds, found.fraction) == ("s", "correctness", 20, 0.7)
    assert [line["score"] for line in found.lines] == sorted(EXACT, reverse=True)
    for line in found.lines:
        assert line["subset_score"] == SUBSET[line["index"] // 3]
        assert (line["subset_low"], line["subset_high"]) == (line["subset_score"] - 0.05, 1.0)
    said = " ".join(exact.remarks(found))
    assert "The two are different quantities" in said
    assert "random 70% of them" in said
    assert "over the 30 examples" in said
    assert "do not fit what they were trained on" in said, "0.99 is below the gate"


def test_of_the_same_examples_the_most_seeds_count_and_settings_do_not_mix(tmp_path: Path) -> None:
    tables = [lines("many", EXACT, 40), lines("few", EXACT[::-1], 20), lines("part", EXACT[:9], 20)]
    found = list(exact.comparisons(load.load(made(tmp_path, *tables, lines("other", EXACT, 20, "elsewhere")))))
    assert [(part.exact_key, part.scores_key) for part in found] == [("many", "s"), ("part", "s"), ("other", None)]
    assert found[2].correlation is None
    assert "subset_score" not in found[2].lines[0]


def test_where_there_is_no_correlation_the_report_says_so(tmp_path: Path) -> None:
    for name, scores, said in (
        ("flat", np.zeros(30), "No rank correlation exists: one side has a single value."),
        ("few", EXACT[:4], "No rank correlation exists: there are fewer than 5 examples."),
        ("good", EXACT, "; they stand for the whole training set"),
    ):
        folder = made(tmp_path / name, lines(name, scores, 20))
        text = report.write(folder, folder / "out.html").read_text()
        assert said in text
        assert "Exact scores against subset estimates" in text
        assert "nan" not in text.split("base64")[0].lower()
    folder = made(tmp_path / "alone", lines("e", EXACT, 20), campaign="elsewhere")
    text = report.write(folder, folder / "out.html").read_text()
    assert "Exact scores e, of 0/1 correctness" in text
    assert "different quantities" not in text
