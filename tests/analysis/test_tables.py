"""Tables and the report on a small made export, held against scipy, scikit-learn and numbers worked by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score

from analysis import load, pairs, report, tables
from orchestrator.registry import InputError
from orchestrator.schemas import SCHEMA_VERSION, TABLES

REFERENCE_ACCURACY = {"r0": 0.50, "r1": 0.60, "r2": 0.70}
RUN_ACCURACY = {"d0": 0.40, "d1": 0.55, "c0": 0.45, "c1": 0.45, "s0": 0.7, "s1": 0.8}
TUG = {"d": (0.9, 0.8), "c": (0.7, 0.75), "s": (0.6, 0.6)}  # by arm and seed, the same with every reference
FLOOR = {
    ("r0", "r1"): 0.97,
    ("r1", "r0"): 0.97,
    ("r0", "r2"): 0.91,
    ("r2", "r0"): 0.91,
    ("r1", "r2"): 0.94,
    ("r2", "r1"): 0.94,
}
ARMS = {"d": "del", "c": "random_within_tensor", "s": "retrain_short", "r": "reference"}


def write_table(folder: Path, name: str, lines: list[dict[str, Any]], export_id: str = "one") -> None:
    table = pa.Table.from_pylist(lines, schema=TABLES[name])
    footer = {"export_id": export_id, "schema_version": SCHEMA_VERSION}
    pq.write_table(table.replace_schema_metadata(footer), folder / f"{name}.parquet")


def run_line(key: str) -> dict[str, Any]:
    masked = key[0] in "dc"
    return {
        "key": key,
        "status": "done",
        "data": "made",
        "model": "small_cnn",
        "forget_set": "random",
        "forget_draw": 0,
        "method": "retrain" if key[0] == "r" else "reset_and_finetune",
        "budget": 0.3 if masked else None,
        "realised_budget": 0.29 if masked else None,
        "learning_rate": None if key[0] == "r" else 0.1,
        "seed": int(key[1]),
        "original_seed": int(key[1]) if masked else None,
        "options": "{}",
        "steps_ratio": 0.25,
        "seconds": 2.0,
        "numerics": "cpu",
        "git_commit": "abc",
    }


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    accuracy = REFERENCE_ACCURACY | RUN_ACCURACY
    write_table(tmp_path, "runs", [run_line(key) for key in accuracy])
    write_table(
        tmp_path,
        "members",
        [{"sweep": "feed", "recipe": "made", "arm": ARMS[k[0]], "key": k, "role": "reported"} for k in accuracy],
    )
    metrics = [
        {"key": key, "metric": "accuracy", "split": split, "value": value if split == "forget" else 0.9}
        for key, value in accuracy.items()
        for split in ("forget", "retain", "test")
    ]
    metrics += [
        {"key": k, "metric": "membership_auc", "split": "forget", "value": 0.4 if k[0] == "r" else 0.7}
        for k in accuracy
    ]
    write_table(tmp_path, "metrics", metrics)
    pairs = [(k, r, TUG[k[0]][int(k[1])]) for k in RUN_ACCURACY for r in REFERENCE_ACCURACY]
    pairs += [(a, b, value) for (a, b), value in FLOOR.items()]
    compared = [{"key": k, "reference_key": r, "metric": "tug_of_war", "split": "all", "value": v} for k, r, v in pairs]
    compared += [
        {
            "key": k,
            "reference_key": r,
            "metric": "disagreement",
            "split": "forget",
            "value": 0.02 if k[0] == "r" else 0.12,
        }
        for k, r, _ in pairs
    ]
    write_table(tmp_path, "comparisons", compared)
    layers = [
        {"key": k, "parameter": p, "entries": 100, "reset": n, "trainable": n}
        for k in RUN_ACCURACY
        if k[0] in "dc"
        for p, n in (("conv1.weight", 40), ("head.weight", 18))
    ]
    write_table(tmp_path, "layers", layers)
    for name in [name for name in TABLES if not (tmp_path / f"{name}.parquet").exists()]:
        write_table(tmp_path, name, [])
    write_table(tmp_path, "memorization", [score_line(index) for index in range(40)])
    shown = [
        {"scores_key": "abc", "index": i, "label_name": "cat", "true_label_name": "dog", "png": png(9 * i)}
        for i in range(25)
    ]
    write_table(tmp_path, "examples", shown)
    return tmp_path


def score_line(index: int) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    flipped = index % 8 == 0
    out = float(rng.uniform(0, 0.7) if flipped else rng.uniform(0.3, 1))
    return {
        "scores_key": "abc",
        "index": index,
        "label": 1,
        "true_label": 2 if flipped else 1,
        "in_mean": 1.0 if index else 0.9,
        "out_mean": out,
        "score": (1.0 if index else 0.9) - out,
        "standard_error": 0.1,
        "low": 0.0,
        "high": 1.0,
        "num_in": 14,
        "num_out": 6,
    }


def test_differences_are_welch_intervals_of_reference_minus_run(export: Path) -> None:
    frame = tables.comparison_table(load.load(export), "feed")
    line = next(line for line in frame.to_dicts() if line["arm"] == "del")
    theirs, ours = 100 * np.array([0.5, 0.6, 0.7]), 100 * np.array([0.40, 0.55])
    expected = stats.ttest_ind(theirs, ours, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert line["forget_difference"] == pytest.approx(theirs.mean() - ours.mean())
    assert line["forget_difference"] / line["forget_standard_error"] == pytest.approx(expected.statistic)
    assert (line["forget_low"], line["forget_high"]) == pytest.approx((interval.low, interval.high))
    assert (line["num_runs"], line["num_references"]) == (2, 3)
    assert (line["retain_difference"], line["retain_low"], line["retain_high"]) == (0, 0, 0)


def test_tug_of_war_stands_beside_the_references_floor(export: Path) -> None:
    frame = tables.comparison_table(load.load(export), "feed")
    line = next(line for line in frame.to_dicts() if line["arm"] == "del")
    assert line["tug_of_war"] == pytest.approx(0.85)
    assert line["tug_of_war_floor"] == pytest.approx((0.97 + 0.91 + 0.94) / 3)
    assert line["excess_disagreement"] == pytest.approx(0.10)
    assert (line["membership_auc"], line["reference_auc"]) == pytest.approx((0.7, 0.4))
    assert line["realised_budget"] == pytest.approx(0.29)


def test_one_value_on_a_side_has_no_interval() -> None:
    assert tables.difference([1.0, 2.0], [1.0]) == tables.Difference(0.5, None, None, None)


def test_pairs_are_matched_on_the_seed_and_adjusted_by_holm(export: Path) -> None:
    frame = pairs.paired_table(load.load(export), "feed").to_dicts()
    against = {line["against"]: line for line in frame}
    for rival, letter in (("random_within_tensor", "c"), ("retrain_short", "s")):
        expected = stats.ttest_rel(TUG["d"], TUG[letter])
        assert against[rival]["difference"] == pytest.approx(np.mean(TUG["d"]) - np.mean(TUG[letter]))
        assert against[rival]["p"] == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval(0.95)
        assert (against[rival]["low"], against[rival]["high"]) == pytest.approx((interval.low, interval.high))
    smaller, larger = sorted(line["p"] for line in frame)
    assert sorted(line["p_holm"] for line in frame) == pytest.approx(
        [min(1, 2 * smaller), max(larger, min(1, 2 * smaller))]
    )


def test_holm_by_hand() -> None:
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert tables.holm([0.6, 0.5]) == [1.0, 1.0]


def test_scores_are_held_against_held_out_error_alone(export: Path) -> None:
    read = load.load(export)
    summary = tables.score_summary(read, "abc")
    lines = [score_line(index) for index in range(40)]
    flipped = np.array([line["label"] != line["true_label"] for line in lines])
    scores = np.array([line["score"] for line in lines])
    assert summary.auc == pytest.approx(roc_auc_score(flipped, scores))
    assert summary.held_out_auc == pytest.approx(roc_auc_score(flipped, [-line["out_mean"] for line in lines]))
    assert summary.precision == pytest.approx(flipped[np.argsort(-scores)[:5]].mean())
    assert (summary.num_models, summary.num_flipped) == (20, 5)
    assert summary.in_accuracy == pytest.approx((39 + 0.9) / 40)
    assert not tables.ScoreSummary(40, 20, 0.99, None, 0, None, None, None).passes_gate
    assert not tables.ScoreSummary(40, 20, 0.999, 0.9, 0, None, None, None).passes_gate
    assert tables.ScoreSummary(40, 20, 0.996, 0.98, 0, None, None, None).passes_gate


def test_the_report_holds_every_line_and_shouts_where_the_gate_fails(export: Path, tmp_path: Path) -> None:
    page = report.write(export, tmp_path / "out.html", facts={"cost": "12 <models>"}).read_text()
    assert page.count("data:image/png;base64,") == 4
    for word in ("random_within_tensor", "retrain_short", "12 &lt;models&gt;", "reference minus run"):
        assert word in page
    summary = tables.score_summary(load.load(export), "abc")
    assert ('class="alarm"' in page) != summary.passes_gate
    for path in report.pictures(export, tmp_path / "png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5, "an empty picture"


@pytest.mark.parametrize("stopping", ["mean standard error 0.0480 is at most 0.05", None])
def test_the_report_says_what_stopped_the_campaign(export: Path, tmp_path: Path, stopping: str | None) -> None:
    line = {"scores_key": "abc", "setting": "s", "estimator": "correctness", "models": 20, "in_accuracy": 1.0}
    write_table(export, "campaigns", [line | {"test_accuracy": 0.9, "model_seconds": 1.0, "stopping": stopping}])
    page = report.write(export, tmp_path / "out.html").read_text()
    assert ("intervals are nominal" in page) == (stopping is not None)
    assert stopping is None or stopping in page


def test_a_report_without_scores_or_runs_says_so(export: Path, tmp_path: Path) -> None:
    for name in ("memorization", "examples", "members"):
        write_table(export, name, [])
    page = report.write(export, tmp_path / "out.html").read_text()
    assert "No memorization scores" in page
    assert "No finished runs" in page


def test_a_mixture_of_exports_is_refused(export: Path) -> None:
    write_table(export, "layers", [], export_id="two")
    with pytest.raises(InputError, match="mixes tables of several exports"):
        load.load(export)


def test_other_schemas_missing_and_broken_files_are_refused(export: Path) -> None:
    (export / "series.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        load.load(export)
    (export / "series.parquet").unlink()
    with pytest.raises(InputError, match="unlearn export"):
        load.load(export)
    pq.write_table(TABLES["series"].empty_table(), export / "series.parquet")
    with pytest.raises(InputError, match="schema version none"):
        load.load(export)


def test_an_unknown_sweep_is_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="feed"):
        report.write(export, tmp_path / "out.html", sweep="dead")
