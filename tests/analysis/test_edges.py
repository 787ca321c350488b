"""What tables and report do at the edges: option grids, several draws, no spread, one seed, nothing finished."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats
from sklearn.metrics import roc_auc_score

from analysis import figures, load, pairs, paper, report, tables
from orchestrator.schemas import SCHEMA_VERSION, TABLES

SWEEP, OTHER = "a" * 32, "b" * 32


def line(key: str, arm: str, accuracy: float, tug: float = 0.8, **columns: Any) -> dict[str, Any]:
    """A run with what the other tables say about it."""
    is_reference = arm == "reference"
    return {
        "key": key,
        "arm": arm,
        "accuracy": accuracy,
        "tug": tug,
        "status": "done",
        "data": "made",
        "model": "small_cnn",
        "forget_set": "random",
        "forget_draw": 0,
        "method": "retrain" if is_reference else "made_method",
        "budget": None,
        "learning_rate": None if is_reference else 0.1,
        "seed": 0,
        "original_seed": None,
        "options": "{}",
        "numerics": "cpu",
    } | columns


def references(*accuracies: float, draw: int = 0) -> list[dict[str, Any]]:
    return [
        line(f"r{draw}{seed}", "reference", accuracy, seed=seed, forget_draw=draw)
        for seed, accuracy in enumerate(accuracies)
    ]


def save(folder: Path, content: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write an export; tables that are not named are empty."""
    for name, schema in TABLES.items():
        kept = [{c: item[c] for c in schema.names if c in item} for item in content.get(name, [])]
        table = pa.Table.from_pylist(kept, schema=schema)
        footer = {"export_id": "one", "schema_version": SCHEMA_VERSION}
        pq.write_table(table.replace_schema_metadata(footer), folder / f"{name}.parquet")
    return folder


def export(folder: Path, lines: Sequence[Mapping[str, Any]], **more: Sequence[Mapping[str, Any]]) -> Path:
    done = [item for item in lines if item["status"] == "done"]
    members = [
        {"sweep": SWEEP, "recipe": "made", "arm": item["arm"], "key": item["key"], "role": "reported"} for item in lines
    ]
    metrics = [
        {"key": item["key"], "metric": "accuracy", "split": split, "value": item["accuracy"]}
        for item in done
        for split in ("forget", "retain", "test")
    ]
    compared = [
        {"key": a["key"], "reference_key": b["key"], "metric": "tug_of_war", "split": "all", "value": a["tug"]}
        for a in done
        for b in done
        if b["arm"] == "reference" and a["key"] != b["key"] and a["forget_draw"] == b["forget_draw"]
    ]
    tables_ = {"runs": lines, "members": members, "metrics": metrics, "comparisons": compared}
    return save(folder, tables_ | more)


def paired(folder: Path, ours: Sequence[float], theirs: Sequence[float], **columns: Any) -> list[dict[str, Any]]:
    """The paired table of DEL against its control, with these values of tug-of-war by seed."""
    runs = [
        line(f"{arm[0]}{seed}", arm, 0.5, tug, seed=seed, original_seed=seed, budget=0.3, **columns)
        for arm, values in (("del", ours), ("random_within_tensor", theirs))
        for seed, tug in enumerate(values)
    ]
    return pairs.paired_table(load.load(export(folder, [*references(0.5, 0.6), *runs])), SWEEP).to_dicts()


def test_runs_with_other_options_are_never_averaged(tmp_path: Path) -> None:
    grid = [
        line(f"n{alpha}{seed}", "neg_grad_plus", 0.1 * alpha, seed=seed, options=f'{{"alpha":{alpha},"lr":0.1}}')
        for alpha in (1, 9)
        for seed in (0, 1)
    ]
    read = load.load(export(tmp_path, [*references(0.5, 0.6), *grid]))
    frame = tables.comparison_table(read, SWEEP)
    assert dict(zip(frame["variant"], frame["num_runs"], strict=True)) == {"alpha=1": 2, "alpha=9": 2}
    assert frame["forget_difference"].to_list() == pytest.approx([45.0, -35.0])
    assert "neg_grad_plus (alpha=9)" in report.write(tmp_path, tmp_path / "out.html").read_text()


def test_each_draw_has_its_own_references_and_lines_are_over_the_draws(tmp_path: Path) -> None:
    runs = [
        line(f"{arm}{draw}{seed}", arm, 0.5, tug, seed=seed, original_seed=seed, forget_draw=draw, budget=0.3)
        for arm, by_draw in (("del", ((0.9, 0.8), (0.7, 0.75))), ("random_within_tensor", ((0.6, 0.7), (0.7, 0.6))))
        for draw, values in enumerate(by_draw)
        for seed, tug in enumerate(values)
    ]
    read = load.load(export(tmp_path, [*references(0.5, 0.6), *references(0.9, 0.7, draw=1), *runs]))
    frame = tables.comparison_table(read, SWEEP)
    found = {item["arm"]: item for item in frame.to_dicts()}["del"]
    assert (found["draws"], found["num_runs"], found["num_references"]) == ("0, 1", 4, 2)
    expected_interval = stats.ttest_1samp([5.0, 30.0], 0).confidence_interval()  # one difference a draw
    assert found["forget_difference"] == pytest.approx(17.5)
    assert (found["forget_low"], found["forget_high"]) == pytest.approx(tuple(expected_interval))
    pooled = np.sqrt(np.mean([np.var([50, 60], ddof=1), np.var([90, 70], ddof=1)]) * (1 + 1 / 2))
    assert found["reference_band"] == pytest.approx(stats.t.ppf(0.975, 2) * pooled)
    assert found["tug_of_war"] == pytest.approx(np.mean([0.9, 0.8, 0.7, 0.75]))
    (compared,) = pairs.paired_table(read, SWEEP).to_dicts()
    expected = stats.ttest_rel([0.9, 0.8, 0.7, 0.75], [0.6, 0.7, 0.7, 0.6])
    assert compared["num_pairs"] == 4
    assert compared["p"] == pytest.approx(expected.pvalue)
    assert len(tables.render(frame)) == 1
    assert "over the forget draws 0, 1" in report.write(tmp_path, tmp_path / "out.html").read_text()
    shaped = {item["arm"]: item for item in paper.paper_table(read, SWEEP).to_dicts()}["del"]
    assert shaped["forget_p"] == pytest.approx(stats.ttest_1samp([5.0, 30.0], 0).pvalue)
    assert shaped["forget_spread"] == pytest.approx(np.std([5, 30], ddof=1))


def test_lines_say_which_draws_they_are_over(tmp_path: Path) -> None:
    """Draw 2 has no references, draw 1 has one, and `late` ran on draw 0 alone."""
    runs = [
        line(f"{arm}{draw}", arm, accuracy, seed=draw, forget_draw=draw)
        for arm, found in (("finetune", (0.5, 0.6, 0.1)), ("late", (0.4,)))
        for draw, accuracy in enumerate(found)
    ]
    read = load.load(export(tmp_path, [*references(0.6, 0.6), *references(0.9, draw=1), *runs]))
    frame = tables.comparison_table(read, SWEEP)
    found = {item["arm"]: item for item in frame.to_dicts()}
    assert (found["finetune"]["draws"], found["finetune"]["num_runs"], found["finetune"]["is_partial"]) == (
        "0, 1",
        2,
        False,
    )
    assert found["finetune"]["forget_difference"] == pytest.approx(20)
    assert (found["late"]["draws"], found["late"]["num_runs"], found["late"]["is_partial"]) == ("0", 1, True)
    (shown,) = tables.render(frame)
    assert "1 to 2 references a draw, 1 to 2 runs a line, over the forget draws 0, 1" in str(shown.title)
    assert list(shown.columns[0].cells) == ["finetune", "late [draw 0]"]
    shaped = {item["arm"]: item for item in paper.paper_table(read, SWEEP).to_dicts()}
    assert [shaped[arm]["num_runs"] for arm in ("finetune", "late")] == [2, 1]


def test_pairs_without_spread_have_a_point_and_no_p(tmp_path: Path) -> None:
    (compared,) = paired(tmp_path, [0.9, 0.8], [0.7, 0.6])
    assert compared["difference"] == pytest.approx(0.2)
    assert (compared["low"], compared["high"]) == pytest.approx((0.2, 0.2))
    assert compared["p"] is None
    assert compared["p_holm"] is None


def test_a_single_pair_is_shown_without_interval(tmp_path: Path) -> None:
    (compared,) = paired(tmp_path, [0.9], [0.7])
    assert (compared["num_pairs"], compared["low"], compared["high"], compared["p"]) == (1, None, None, None)
    assert "del" in report.write(tmp_path, tmp_path / "out.html").read_text()


def test_rivals_of_another_budget_or_rate_are_not_paired(tmp_path: Path) -> None:
    runs = [
        line(f"k{n}", arm, 0.5, 0.7 + 0.01 * n, budget=budget, learning_rate=rate, seed=n % 2, original_seed=n % 2)
        for n, (arm, budget, rate) in enumerate(
            item
            for item in (("del", 0.3, 0.1), ("random_within_tensor", 0.5, 0.1), ("random_within_tensor", 0.3, 0.03))
            for _ in range(2)
        )
    ]
    frame = pairs.paired_table(load.load(export(tmp_path, [*references(0.5, 0.6), *runs])), SWEEP)
    assert len(frame) == 0
    assert set(frame.columns) == set(pairs.PAIRED)


def test_the_band_is_where_one_more_reference_would_fall(tmp_path: Path) -> None:
    read = load.load(export(tmp_path, [*references(0.5, 0.6, 0.7), line("d0", "del", 0.5, budget=0.3)]))
    spread = 10.0 * np.sqrt(1 + 1 / 3)
    (band,) = tables.comparison_table(read, SWEEP)["reference_band"].to_list()
    assert band == pytest.approx(stats.t.ppf(0.975, 2) * spread)


def test_without_spread_of_references_no_band_is_drawn_and_the_report_says_so(tmp_path: Path) -> None:
    folder = export(tmp_path, [*references(0.5), line("d0", "del", 0.5, budget=0.3)])
    read = load.load(folder)
    assert tables.comparison_table(read, SWEEP)["reference_band"].to_list() == [None]
    figure = figures.forget_quality(read, SWEEP)
    assert "a new reference, 95 %" not in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "fewer than two references" in report.write(folder, tmp_path / "out.html").read_text()


@pytest.mark.parametrize("lines", [[], references(0.5, 0.6), [line("x0", "del", 0, status="failed", budget=0.3)]])
def test_a_sweep_without_finished_runs_has_empty_tables_and_a_report(tmp_path: Path, lines: list[Any]) -> None:
    folder = export(tmp_path, lines)
    frame = tables.comparison_table(load.load(folder), SWEEP)
    assert set(frame.columns) == set(tables.COMPARISON)
    assert tables.render(frame) == []
    assert len(pairs.paired_table(load.load(folder), SWEEP)) == 0
    assert report.pictures(folder, tmp_path / "png") == []
    assert "No finished runs" in report.write(folder, tmp_path / "out.html").read_text()


def test_failed_runs_other_sweeps_and_mixed_numerics_are_told(tmp_path: Path) -> None:
    failed = line("x0", "del", 0, status="failed", budget=0.3, seed=7, options='{"other":1}')
    finished = line("d0", "del", 0.5, budget=0.3, numerics="cuda")
    folder = export(tmp_path, [*references(0.5, 0.6), finished, failed])
    members = pq.read_table(folder / "members.parquet")
    more = pa.Table.from_pylist(
        [{"sweep": OTHER, "recipe": "second", "arm": "del", "key": "d0", "role": "reported"}], members.schema
    )
    pq.write_table(pa.concat_tables([members, more]), folder / "members.parquet")
    page = report.write(folder, tmp_path / "out.html").read_text()
    assert "del, random, rate 0.1, budget 0.3, seed 7, failed" in page
    assert f"{OTHER[:8]} (second, 1 runs)" in page
    assert "several numerics" in page
    assert tables.comparison_table(load.load(folder), SWEEP)["num_runs"].to_list() == [1]


def test_the_area_counts_ties_half_and_accuracy_weighs_by_models() -> None:
    rng = np.random.default_rng(3)
    values, positive = rng.integers(0, 5, 60) / 4, rng.random(60) < 0.3
    assert tables._area(values, positive) == pytest.approx(roc_auc_score(positive, values))


def test_in_accuracy_is_over_all_pairs_of_model_and_example(tmp_path: Path) -> None:
    common = {"scores_key": "abc", "label": 1, "true_label": 1, "standard_error": 0.1, "low": 0.0, "high": 1.0}
    scores = [
        common
        | {"index": i, "in_mean": in_mean, "out_mean": 0.2, "score": in_mean - 0.2, "num_in": n, "num_out": 20 - n}
        for i, (in_mean, n) in enumerate([(1.0, 15), (0.8, 5)])
    ]
    summary = tables.score_summary(load.load(save(tmp_path, {"memorization": scores})), "abc")
    assert (summary.in_accuracy, summary.hard_in_accuracy) == pytest.approx((0.95, 0.95))
    assert summary.auc is None


def test_the_terminal_table_fits_and_the_page_gives_both_ends(tmp_path: Path) -> None:
    runs = [line(f"d{s}", "random_within_tensor", 0.4 + 0.1 * s, budget=0.05, seed=s, original_seed=s) for s in (0, 1)]
    folder = export(tmp_path, [*references(0.5, 0.6), *runs])
    frame = tables.comparison_table(load.load(folder), SWEEP)
    console = Console(width=112, file=io.StringIO(), record=True)
    console.print(*tables.render(frame))
    assert "…" not in console.export_text()
    (setting,) = frame.to_dicts()
    expected = stats.ttest_ind([50, 60], [40, 50], equal_var=False).confidence_interval()
    assert tables.ends(setting, "forget") == f"+10.0 [{expected.low:+.1f}, {expected.high:+.1f}]"
    assert tables.ends(setting, "forget") in report.write(folder, tmp_path / "out.html").read_text()


def test_layer_shares_have_one_panel_per_forget_set_and_arm(tmp_path: Path) -> None:
    runs = [
        line(f"{arm}{name}", arm, 0.5, budget=0.3, forget_set=name)
        for name in ("random", "mislabelled")
        for arm in ("del", "salun")
    ]
    layers = [
        {"key": run["key"], "parameter": name, "entries": count, "reset": reset, "trainable": reset}
        for run in runs
        for name, count, reset in (("conv1.weight", 90, 45), ("conv1.bias", 10, 0), ("head", 10, 10))
    ]
    figure = figures.layer_shares(load.load(export(tmp_path, [*references(0.5, 0.6), *runs], layers=layers)), SWEEP)
    panels = [axes for axes in figure.axes if axes.get_title()]
    titles = [f"{name}: {arm}" for name in ("random", "mislabelled") for arm in ("del", "salun")]
    assert [axes.get_title() for axes in panels] == titles
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [["0.45", "1.00"]] * 4
    for path in report.pictures(tmp_path, tmp_path / "png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5
