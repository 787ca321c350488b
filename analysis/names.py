"""How the settings of a sweep are called in every table and figure, and which of them are one line."""

from __future__ import annotations

import json
from collections.abc import Mapping

import polars as pl

LINE: Mapping[str, pl.DataType] = {"is_tuned": pl.Boolean(), "line_variant": pl.String(), "line_rate": pl.Float64()}
"""What tells the lines of an arm apart, beside the budget: whether the setting was chosen on tuning runs, and variant
and learning rate where they were not chosen. An arm is one line whatever was chosen at each budget."""


def name_of(line: Mapping[str, object]) -> str:
    """An arm, `*` where its setting was chosen on tuning runs, its variant where it has several, and its draws where
    they are fewer than those of other lines."""
    name = f"{line['arm']}{'*' if line.get('is_tuned') else ''}"
    name += f" ({line['variant']})" if line.get("variant") else ""
    return f"{name} [draw {line['draws']}]" if line.get("is_partial") else name


def setting_of(line: Mapping[str, object]) -> str:
    """A line's arm, rate and budget in words."""
    rate, budget = line["learning_rate"], line["budget"]
    parts = [
        name_of(line),
        None if rate is None else f"rate {rate:g}",
        None if budget is None else f"budget {budget:g}",
    ]
    return ", ".join(part for part in parts if part)


def with_lines(runs: pl.DataFrame, selections: pl.DataFrame) -> pl.DataFrame:
    """Add `variant` and the columns of LINE to runs that have `arm`, `options` and `is_tuned`.

    variant: the options other than the learning rate in which the runs of an arm differ, as `alpha=0.9`; null where
    they agree. `selections` are those of the sweep.
    """
    options = [json.loads(text) for text in runs["options"].to_list()]
    arms, rates, tuned = (runs[name].to_list() for name in ("arm", "learning_rate", "is_tuned"))
    by_arm: dict[str, list[dict[str, object]]] = {}
    for arm, found in zip(arms, options, strict=True):
        by_arm.setdefault(arm, []).append(found)
    varying = {arm: [name for name in differing(found) if name != "lr"] for arm, found in by_arm.items()}
    chosen: dict[str, set[str]] = {}
    for (arm, _), group in selections.group_by("arm", "selection"):
        chosen.setdefault(str(arm), set()).update(differing([json.loads(text) for text in group["options"]]))
    by_choice = [chosen.get(arm, set()) if is_tuned else set() for arm, is_tuned in zip(arms, tuned, strict=True)]

    def variants(but: list[set[str]]) -> list[str | None]:
        return [
            ", ".join(f"{name}={found.get(name)}" for name in varying[arm] if name not in left) or None
            for arm, found, left in zip(arms, options, but, strict=True)
        ]

    line_rates = [None if "lr" in left else rate for rate, left in zip(rates, by_choice, strict=True)]
    return runs.with_columns(
        pl.Series("variant", variants([set()] * len(runs)), dtype=pl.String),
        pl.Series("line_variant", variants(by_choice), dtype=pl.String),
        pl.Series("line_rate", line_rates, dtype=pl.Float64),
    )


def differing(options: list[dict[str, object]]) -> list[str]:
    """The names of the options in which these differ."""
    names = sorted({name for found in options for name in found})
    return [name for name in names if len({json.dumps(found.get(name)) for found in options}) > 1]
