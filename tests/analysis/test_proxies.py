"""Proxies against scores: correlations, intervals, the ceiling, and what the report shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from analysis import load, proxies, report
from tests.analysis.made import Made


def made(folder: Path, split_half: float | None = 0.6) -> Path:
    rng = np.random.default_rng(0)
    scores = rng.random(200)
    content = Made()
    for index, score in enumerate(scores):
        content.lines["memorization"].append(
            dict.fromkeys(("in_mean", "out_mean", "standard_error", "low", "high"), 0.1)
            | {"scores_key": "s", "index": index, "label": 0, "true_label": 0, "score": float(score)}
            | {"num_in": 7, "num_out": 3}
        )
    content.lines["campaigns"].append(
        {
            "scores_key": "s",
            "setting": "d",
            "estimator": "correctness",
            "models": 10,
            "in_accuracy": 1.0,
            "test_accuracy": 0.9,
        }
        | {"split_half": split_half, "model_seconds": 50.0}
    )
    kinds = {"good": scores**2, "noisy": scores + rng.normal(0, 0.5, 200), "flat": np.ones(200)}
    for name, values in kinds.items():
        for index, value in enumerate(values):
            content.lines["proxies"].append(
                {"proxies_key": "p", "setting": "d", "proxy": name, "index": index, "value": float(value)}
                | {"seconds": 1.0, "training_seconds": 4.0}
            )
    content.lines["proxies"].append(content.lines["proxies"][0] | {"setting": "other", "proxies_key": "q"})
    return content.write(folder)


def test_where_resamples_are_constant_there_is_no_interval() -> None:
    values = np.array([0.0, 0, 0, 0, 0, 1])
    assert proxies.correlation_with(values, values) == (1.0, None, None)
    rising = np.arange(6.0)
    assert None not in proxies.correlation_with(rising, rising)


def test_correlations_are_scipys_with_an_interval_around_them(tmp_path: Path) -> None:
    read = load.load(made(tmp_path))
    frame = proxies.proxy_table(read)
    assert frame["proxy"].to_list() == ["good", "noisy", "flat"]
    good, noisy, flat = frame.to_dicts()
    assert good["correlation"] == pytest.approx(1)
    scores = read.memorization.sort("index")["score"].to_numpy()
    values = read.proxies.filter(proxy="noisy").sort("index")["value"].to_numpy()
    assert noisy["correlation"] == pytest.approx(spearmanr(values, scores).statistic)
    assert 0 < noisy["low"] < noisy["correlation"] < noisy["high"] < 1
    assert noisy["high"] - noisy["low"] == pytest.approx(4 * (1 - noisy["correlation"] ** 2) / np.sqrt(200), rel=0.3)
    assert (flat["correlation"], flat["low"]) == (None, None)
    assert good["ceiling"] == pytest.approx(np.sqrt(2 * 0.6 / 1.6))
    assert (good["seconds"], good["cost"]) == (5.0, 0.1)


def test_the_report_shows_them_and_does_without_halves(tmp_path: Path) -> None:
    for folder, split_half in ((tmp_path / "a", 0.6), (tmp_path / "b", None)):
        text = report.write(made(folder, split_half), folder / "out.html").read_text()
        assert "Stand-ins for the scores s" in text
        assert "noisy" in text
    assert proxies.ceiling(None) is None
    assert proxies.ceiling(-1.0) == 0.0
