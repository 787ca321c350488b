"""How the report says what was chosen, on made exports; and that no tuning run enters a reported number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import figures, load, names, pairs, paper, report, selections, tables
from tests.analysis import made

SWEEP = "5eed" * 8
VALUES = {0.01: (0.7, 0.8), 0.03: (0.9, 0.8), 0.1: (0.9, 0.86), 0.3: ()}
"""The made criterion of four rates by tuning seed; the last failed."""
GAPS = (-0.03, 0.01, 0.02)
"""By how much the made criterion against each tuning reference is above its mean; half as much for rates above .03."""


def candidates(forget_set: str, chosen: float | None = 0.1, **columns: Any) -> list[dict[str, Any]]:
    lines = []
    for place, (rate, values) in enumerate(VALUES.items()):
        mean = sum(values) / len(values) if values else None
        against = None if mean is None else [mean + gap * (0.5 if rate > 0.03 else 1) for gap in GAPS]
        line = {
            "sweep": SWEEP, "selection": f"s-{forget_set}", "arm": "del", "forget_set": forget_set, "budget": 0.3,
            "setting": "{}", "candidate": place, "options": json.dumps({"epochs": 5, "lr": rate}),
            "chosen": rate == chosen, "criterion": "tug_of_war_validation", "criterion_version": "1",
            "formula": "What it is.", "seeds": "100, 101", "tuning_set": "random", "tuning_draw": 100,
            "used_references": True, "num_references": 3, "n": len(values), "mean": mean,
            "standard_error": 0.5, "values": list(values), "by_reference": against,
            "error": None if values else "loss is NaN",
        }  # fmt: skip
        if rate == chosen:
            line |= {"confirmed_n": 3, "confirmed_mean": 0.83, "confirmed_standard_error": 0.5}
            line |= {"confirmed_values": [0.8, 0.83, 0.86], "confirmed_by_reference": [0.81, 0.85]}
        lines.append(line | columns)
    return lines


def tuned(folder: Path, chosen: float | None = 0.1) -> load.Tables:
    """A made sweep whose runs of DEL at one rate confirm a choice."""
    content = made.sweep(forget_sets=["random"])
    for member in content.lines["members"]:
        if member["key"].startswith("del-random-0.1-0.3"):
            member["role"] = "confirmed"
    content.lines["selections"] = candidates("random", chosen)
    return load.load(content.write(folder))


def test_a_choice_is_said_with_its_lead_its_edge_and_what_failed(tmp_path: Path) -> None:
    (choice,) = selections.choices(tuned(tmp_path), SWEEP)
    assert (choice.chosen, choice.tried) == ("lr=0.1", "lr: 0.01 0.03 0.1 0.3")
    assert choice.tuned is not None
    assert choice.lead is not None
    assert choice.tuned.mean == pytest.approx(0.88)
    references = [np.var(GAPS, ddof=1) / 3 * factor for factor in (0.5**2, (1 - 0.5) ** 2)]
    assert choice.tuned.standard_error == pytest.approx((0.02**2 + references[0]) ** 0.5)
    assert choice.lead.mean == pytest.approx(0.03)
    by_pair = pytest.approx((0.03**2 + references[1]) ** 0.5)
    assert choice.lead.standard_error == by_pair, "over .03: 0 and .06 by seed, half of the gaps by reference"
    moved = selections.change([choice])
    assert moved is not None
    assert moved.value == pytest.approx(-0.05)
    assert moved.standard_error == pytest.approx((0.02**2 + references[0] + 0.03**2 / 3 + 0.02**2) ** 0.5)
    assert selections.cells(choice)[4] == f"0.880 ± {choice.tuned.standard_error:.3f}"
    assert choice.edges == ()
    assert choice.failed == ("lr=0.3: loss is NaN",)
    remarks = selections.cells(choice)[-1]
    assert "within 2 SE" in remarks
    assert "NaN" in remarks


@pytest.mark.parametrize("short", ["values", "by_reference", "confirmed_values", "confirmed_by_reference"])
def test_a_side_of_one_has_no_error_and_never_zero(short: str, tmp_path: Path) -> None:
    content = made.sweep(forget_sets=["random"])
    content.lines["selections"] = [
        line | ({short: line[short][:1]} if line.get(short) else {}) for line in candidates("random")
    ]
    (choice,) = selections.choices(load.load(content.write(tmp_path)), SWEEP)
    shown = dict(zip(selections.HEADINGS, selections.cells(choice), strict=True))
    one = shown["confirmed"] if short.startswith("confirmed") else shown["tuned"]
    assert one.endswith("± n/a")
    assert shown["change"].endswith("± n/a")
    assert shown["ahead of the second"].endswith("n/a") == (not short.startswith("confirmed"))


def test_the_mean_change_of_cells_counts_what_they_share_once(tmp_path: Path) -> None:
    """Two cells with the same references: their scatter is not halved by the mean, as that of apart ones would be."""
    content = made.sweep(forget_sets=["random"])
    twice = [candidates("random"), [line | {"selection": "other", "budget": 0.1} for line in candidates("random")]]
    content.lines["selections"] = [line for part in twice for line in part]
    found = selections.choices(load.load(content.write(tmp_path)), SWEEP)
    alone, both = selections.change(found[:1]), selections.change(found)
    assert alone is not None
    assert both is not None
    assert both.standard_error == pytest.approx(alone.standard_error)
    said = selections.summary(found)[0]
    assert f"-0.050 ± {alone.standard_error:.3f} (the mean of 2 cells" in said
    content.lines["selections"][-2]["confirmed_values"] = [0.8, 0.83]
    uneven = selections.change(selections.choices(load.load(content.write(tmp_path)), SWEEP))
    assert uneven is not None
    assert uneven.standard_error is None


def test_a_tuned_arm_is_one_line_of_the_ablation_whatever_rate_was_chosen(tmp_path: Path) -> None:
    """Its rate is .1 at budget .3 and .03 at the others; the control was not tuned."""
    content = made.sweep(forget_sets=["random"])
    kept = [m for m in content.lines["members"] if m["arm"] in ("del", "random_within_tensor", "reference")]
    mine = [m for m in kept if m["arm"] != "del" or m["key"].split("-")[2:4] in TAKEN]
    content.lines["members"] = [m | {"role": "confirmed" if m["arm"] == "del" else "reported"} for m in mine]
    content.lines["selections"] = candidates("random")
    read = load.load(content.write(tmp_path))
    frame = paper.ablation_table(read, SWEEP)
    headings, rows = paper.ablation_grid(frame)
    assert [(row[0], row[4]) for row in rows] == [
        ("del*", "chosen"), ("random_within_tensor", "0.03"), ("random_within_tensor", "0.1")
    ]  # fmt: skip
    assert headings[5:] == ["0.05", "0.1", "0.2", "0.3", "0.5"]
    assert [cell.partition("[")[2] for cell in rows[0][5:]] == ["0.03]", "0.03]", "0.03]", "0.1]", "0.03]"]
    values = {(k, r): v for k, r, m, v in read.comparisons.select("key", "reference_key", "metric", "value").rows()
              if m == "tug_of_war"}  # fmt: skip
    for budget, cell in zip(headings[5:], rows[0][5:], strict=True):
        rate = 0.1 if budget == "0.3" else 0.03
        tug = np.array([[values[f"del-random-{rate}-{budget}-{i}", f"reference-random-{j}"] for j in range(5)]
                        for i in range(3)])  # fmt: skip
        error = np.sqrt(tug.mean(axis=1).var(ddof=1) / 3 + tug.mean(axis=0).var(ddof=1) / 5)
        assert cell.startswith(f"{tug.mean():.3f} ± {error:.3f} ")


TAKEN = [["0.03", "0.05"], ["0.03", "0.1"], ["0.03", "0.2"], ["0.1", "0.3"], ["0.03", "0.5"]]


def test_every_table_and_figure_marks_what_was_chosen(tmp_path: Path) -> None:
    read = tuned(tmp_path)
    (frame,) = (part for part in [paper.paper_table(read, SWEEP)])
    marked = {(line["learning_rate"], line["budget"]) for line in frame.to_dicts() if line["arm"] == "del"
              and paper.paper_cells(line)[0] == "del*"}  # fmt: skip
    assert marked == {(0.1, 0.3)}
    assert {paper.setting_of(line) for line in frame.to_dicts() if line["is_tuned"]} == {"del*, rate 0.1, budget 0.3"}
    lines = pairs.paired_table(read, SWEEP).to_dicts()
    assert {(line["learning_rate"], line["budget"]) for line in lines if line["is_tuned"]} == {(0.1, 0.3)}
    titles = [axes.get_title() for axes in figures.layer_shares(read, SWEEP).axes]
    assert "random: del*" in titles
    assert "random: salun" in titles
    legend = [text.get_text() for text in figures.forget_quality(read, SWEEP).legends[0].get_texts()]
    assert "del*" in legend
    text = report.write(tmp_path, tmp_path / "r.html").read_text()
    for heading in ("Does the localization matter?", "Localization by budget", "As the paper's tables", "was chosen"):
        part = text.partition(heading)[2].partition("<h2>")[0]
        assert "<td>del*</td>" in part, heading


def test_masks_that_are_cells_of_their_own_are_lines_of_their_own(tmp_path: Path) -> None:
    """Two values of a mask's option, each tuned: what was not chosen still tells lines apart."""
    content = made.sweep(forget_sets=["random"])
    for line in content.lines["runs"]:
        if line["key"].startswith("del-random"):
            line["options"] = json.dumps(
                json.loads(line["options"]) | {"mask.h": "all" if "-0.1-0.3" in line["key"] else 3}
            )
    content.lines["members"] = [m | {"role": "confirmed"} for m in content.lines["members"] if m["arm"] == "del"]
    settings = {"one": '{"mask.h": "all"}', "other": '{"mask.h": 3}'}
    content.lines["selections"] = [
        line for name, setting in settings.items() for line in candidates("random", selection=name, setting=setting)
    ]
    read = load.load(content.write(tmp_path))
    runs = tables.of_sweep(read, SWEEP)
    assert set(runs.select("line_variant", "line_rate").rows()) == {("mask.h=all", None), ("mask.h=3", None)}
    shown = {selections.cells(choice)[0] for choice in selections.choices(read, SWEEP)}
    assert shown == {"del* (mask.h=all)", "del* (mask.h=3)"}


def test_the_lowest_rate_tried_is_an_edge(tmp_path: Path) -> None:
    content = made.sweep(forget_sets=["random"])
    content.lines["selections"] = [line | {"chosen": line["candidate"] == 0} for line in candidates("random")]
    (choice,) = selections.choices(load.load(content.write(tmp_path)), SWEEP)
    assert choice.edges == ("lr lowest of 4",)


def test_tuned_arms_are_marked_and_the_report_says_how_they_were_chosen(tmp_path: Path) -> None:
    read = tuned(tmp_path)
    called = {
        (line["learning_rate"], line["budget"]): names.name_of(line)
        for line in tables.comparison_table(read, SWEEP).to_dicts()
        if line["arm"] == "del"
    }
    assert called.pop((0.1, 0.3)) == "del*"
    assert set(called.values()) == {"del"}
    text = report.write(tmp_path, tmp_path / "r.html").read_text()
    assert "How each setting was chosen" in text
    assert "3 models retrained without that set took part in the choice" in text
    assert "confirmed on seeds 0, 1, 2 and draw 0 against 2 references" in text
    assert "seeds of the runs alone" not in text
    assert "nothing is selected" not in text
    plain = report.write(made.sweep(forget_sets=["random"]).write(tmp_path / "plain"), tmp_path / "p.html").read_text()
    assert "How each setting was chosen" not in plain
    assert "nothing is selected" in plain


def test_a_set_of_another_rule_is_said_to_stand_in(tmp_path: Path) -> None:
    content = made.sweep(forget_sets=["random"])
    content.lines["selections"] = [*candidates("random"), *candidates("mislabelled")]
    read = load.load(content.write(tmp_path))
    found = selections.by_set(selections.choices(read, SWEEP))
    said = {name: selections.caption(part, tables.of_sweep(read, SWEEP)) for name, part in found.items()}
    assert "stands in" not in said["random"]
    assert "which stands in for mislabelled" in said["mislabelled"]


def test_a_cell_without_a_choice_is_said_to_be_missing(tmp_path: Path) -> None:
    (choice,) = selections.choices(tuned(tmp_path, chosen=None), SWEEP)
    assert (choice.chosen, choice.tuned, choice.lead) == (None, None, None)
    assert selections.cells(choice)[2] == "not reported"


def test_no_tuning_run_enters_a_reported_number(tmp_path: Path) -> None:
    """Absurd runs and references on the same forget set and draw, but in the role `tuning`."""
    plain = load.load(made.sweep(forget_sets=["random"]).write(tmp_path / "plain"))
    content = made.sweep(forget_sets=["random"])
    for arm in ("reference", "del", "random_within_tensor", "retrain_short", "finetune"):
        for seed in range(3):
            name = f"tuning-{arm}-{seed}"
            content.run(arm, name, "random", seed, learning_rate=0.1, budget=0.3 if "d" in arm[:2] else None)
            content.lines["members"][-1]["role"] = "tuning"
            content.measure(name, accuracy__forget=0.0, accuracy__retain=0.0, accuracy__test=0.0)
            for reference in ("reference-random-0", "tuning-reference-0"):
                content.compare(name, reference, "tug_of_war", "all", 0.0)
    mixed = load.load(content.write(tmp_path / "mixed"))
    for table in (tables.comparison_table, pairs.paired_table, paper.paper_table, paper.ablation_table):
        assert table(mixed, SWEEP).equals(table(plain, SWEEP))


def test_tuned_arms_are_paired_with_a_control_of_the_same_budget_at_its_own_rate(tmp_path: Path) -> None:
    content = made.sweep(forget_sets=["random"])
    kept = {"del-random-0.1-0.3": "confirmed", "random_within_tensor-random-0.03-0.3": "confirmed"}
    roles = {m["key"]: kept.get(m["key"].rpartition("-")[0]) for m in content.lines["members"]}
    for member in content.lines["members"]:
        member["role"] = roles[member["key"]] or ("reported" if member["arm"] == "reference" else "tuning")
    (line,) = pairs.paired_table(load.load(content.write(tmp_path)), SWEEP).to_dicts()
    assert (line["learning_rate"], line["against_rate"], line["budget"], line["num_pairs"]) == (0.1, 0.03, 0.3, 3)
