"""How the report says what was chosen, on made exports; and that no tuning run enters a reported number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis import load, pairs, paper, report, selections, tables
from tests.analysis import made

SWEEP = "5eed" * 8
VALUES = {0.01: (0.7, 0.8), 0.03: (0.9, 0.8), 0.1: (0.9, 0.86), 0.3: ()}
"""The made criterion of four rates by tuning seed; the last failed."""


def candidates(forget_set: str, chosen: float | None = 0.1, **columns: Any) -> list[dict[str, Any]]:
    lines = []
    for place, (rate, values) in enumerate(VALUES.items()):
        mean = sum(values) / len(values) if values else None
        line = {
            "sweep": SWEEP, "selection": f"s-{forget_set}", "arm": "del", "forget_set": forget_set, "budget": 0.3,
            "setting": "{}", "candidate": place, "options": json.dumps({"epochs": 5, "lr": rate}),
            "chosen": rate == chosen, "criterion": "tug_of_war_validation", "criterion_version": "1",
            "formula": "What it is.", "seeds": "100, 101", "tuning_set": "random", "tuning_draw": 100,
            "used_references": True, "num_references": 3, "n": len(values), "mean": mean,
            "standard_error": None if mean is None else abs(values[0] - values[1]) / 2, "values": list(values),
            "error": None if values else "loss is NaN",
        }  # fmt: skip
        if rate == chosen:
            line |= {"confirmed_n": 3, "confirmed_mean": 0.83, "confirmed_standard_error": 0.03}
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
    assert (choice.chosen, choice.num_candidates) == ("lr=0.1", 4)
    assert choice.tuned == (pytest.approx(0.88), pytest.approx(0.02))
    assert choice.lead == (pytest.approx(0.03), pytest.approx(0.03)), "over .03: (0 and .06), seed by seed"
    assert selections.change(choice) == (pytest.approx(-0.05), pytest.approx((0.02**2 + 0.03**2) ** 0.5))
    assert choice.edges == ()
    assert choice.failed == ("lr=0.3: loss is NaN",)
    remarks = selections.cells(choice)[-1]
    assert "within 2 SE" in remarks
    assert "NaN" in remarks


def test_the_lowest_rate_tried_is_an_edge(tmp_path: Path) -> None:
    content = made.sweep(forget_sets=["random"])
    content.lines["selections"] = [line | {"chosen": line["candidate"] == 0} for line in candidates("random")]
    (choice,) = selections.choices(load.load(content.write(tmp_path)), SWEEP)
    assert choice.edges == ("lr lowest of 4",)


def test_tuned_arms_are_marked_and_the_report_says_how_they_were_chosen(tmp_path: Path) -> None:
    read = tuned(tmp_path)
    names = {
        (line["learning_rate"], line["budget"]): tables.name_of(line)
        for line in tables.comparison_table(read, SWEEP).to_dicts()
        if line["arm"] == "del"
    }
    assert names.pop((0.1, 0.3)) == "del*"
    assert set(names.values()) == {"del"}
    text = report.write(tmp_path, tmp_path / "r.html").read_text()
    assert "How each setting was chosen" in text
    assert "3 models retrained without it took part in the choice" in text
    assert "nothing is selected" not in text
    plain = report.write(made.sweep(forget_sets=["random"]).write(tmp_path / "plain"), tmp_path / "p.html").read_text()
    assert "How each setting was chosen" not in plain
    assert "nothing is selected" in plain


def test_a_set_of_another_rule_is_said_to_stand_in(tmp_path: Path) -> None:
    content = made.sweep(forget_sets=["random"])
    content.lines["selections"] = [*candidates("random"), *candidates("mislabelled")]
    found = selections.by_set(selections.choices(load.load(content.write(tmp_path)), SWEEP))
    said = {name: selections.caption(part) for name, part in found.items()}
    assert "stands in" not in said["random"]
    assert "it stands in for mislabelled" in said["mislabelled"]


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
    names = {m["key"]: kept.get(m["key"].rpartition("-")[0]) for m in content.lines["members"]}
    for member in content.lines["members"]:
        member["role"] = names[member["key"]] or ("reported" if member["arm"] == "reference" else "tuning")
    (line,) = pairs.paired_table(load.load(content.write(tmp_path)), SWEEP).to_dicts()
    assert (line["learning_rate"], line["against_rate"], line["budget"], line["num_pairs"]) == (0.1, 0.03, 0.3, 3)
