"""Tables of unlearning part by part (RUM): what ranked the parts, how near to the references, and at what cost.

The question of Zhao and Triantafillou (2024): does a cheap stand-in rank well enough that unlearning by it is as good
as by memorization scores?
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from rich.table import Table
from scipy import stats

from analysis.load import Tables
from analysis.names import name_of
from analysis.tables import Values, holm, number, of_sweep, references_of, sides

COMPOSED = ("rum", "rum_shuffled")
CAMPAIGN, RANDOM = "campaign", "at random"
MEASURES = ("tug_of_war", "tug_of_war_membership")
_NAMES: Mapping[str, pl.DataType] = {
    "forget_set": pl.String(),
    "arm": pl.String(),
    "variant": pl.String(),
    "parts_by": pl.String(),
    "is_tuned": pl.Boolean(),
}
COLUMNS: Mapping[str, pl.DataType] = {
    **_NAMES,
    "num_runs": pl.Int64(),
    **{name: pl.Float64() for measure in MEASURES for name in (measure, f"{measure}_half_width", f"{measure}_floor")},
    "steps_ratio": pl.Float64(),
    "seconds": pl.Float64(),
    "ranking_seconds": pl.Float64(),
}
CONTRASTS: Mapping[str, pl.DataType] = {
    **_NAMES,
    "against": pl.String(),
    "measure": pl.String(),
    "num_pairs": pl.Int64(),
    **{name: pl.Float64() for name in ("difference", "low", "high", "p", "p_holm")},
}
HEADINGS = ("method", "parts by", "runs", "ToW (floor)", "ToW-MIA (floor)", "steps", "s", "s of ranking")
CONTRAST_HEADINGS = (
    *("forget set", "method", "parts by", "against", "measure", "pairs"),
    *("difference", "95 % interval", "p", "p (Holm)"),
)


_Text = Callable[[Mapping[str, object]], list[str]]


@dataclass(frozen=True)
class _Setting:
    """Runs that differ in seeds alone: per pair of original and draw the measures, means over references."""

    forget_set: str
    arm: str
    variant: str | None
    parts_by: str | None
    is_tuned: bool
    keys: list[str]
    by_pair: Mapping[str, Mapping[tuple[object, object], float]]
    floors: Mapping[str, float | None]


def refinement_table(tables: Tables, sweep: str) -> pl.DataFrame:
    """One line per forget set and setting of a sweep with composed methods, columns as in COLUMNS; else no line.

    parts_by: `campaign`, a proxy, `at random`, or null for a method on the whole forget set. Measures with half of
    their 95 % t-interval over runs (null for one), and the references against one another as floor. steps: over those
    of retraining. ranking_seconds: subset models, or the training run and the stand-in.
    """
    runs = of_sweep(tables, sweep)
    if not runs["method"].is_in(COMPOSED).any():
        return pl.DataFrame(schema=dict(COLUMNS))
    costs, lines = _costs(tables), []
    for setting in _settings(runs, Values(tables)):
        own = runs.filter(pl.col("key").is_in(setting.keys))
        line: dict[str, object] = {name: getattr(setting, name) for name in _NAMES}
        for measure, found in setting.by_pair.items():
            values = list(found.values())
            line |= {measure: float(np.mean(values)) if values else None, f"{measure}_half_width": _half(values)}
            line[f"{measure}_floor"] = setting.floors[measure]
        named = own["memorization_key"].drop_nulls().unique().to_list()
        line |= {"num_runs": len(setting.keys), "steps_ratio": own["steps_ratio"].mean()}
        line |= {"seconds": own["seconds"].mean(), "ranking_seconds": costs.get(named[0]) if named else None}
        lines.append(line)
    return pl.DataFrame(lines, schema=dict(COLUMNS))


def contrasts(tables: Tables, sweep: str) -> pl.DataFrame:
    """Each composed setting by campaign scores against the same by every stand-in, and at random; columns CONTRASTS.

    Paired on original seed and forget draw, positive where the campaign's scores are better. t-interval over pairs; p
    two-sided, `p_holm` adjusted over the table.
    """
    runs = of_sweep(tables, sweep)
    settings = [s for s in _settings(runs, Values(tables)) if s.parts_by is not None]
    lines = []
    for ours in (s for s in settings if s.parts_by == CAMPAIGN):
        for theirs in settings:
            shuffled = theirs.parts_by == RANDOM and theirs.arm == f"{ours.arm}_shuffled"
            other = theirs.arm == ours.arm and theirs.parts_by != CAMPAIGN
            if theirs.forget_set != ours.forget_set or theirs.variant != ours.variant or not (shuffled or other):
                continue
            for measure in MEASURES:
                mine, their = ours.by_pair[measure], theirs.by_pair[measure]
                pairs = np.array([mine[pair] - their[pair] for pair in mine if pair in their])
                if len(pairs):
                    named = {name: getattr(ours, name) for name in _NAMES}
                    named |= {"against": theirs.parts_by, "measure": measure}
                    lines.append(named | _paired(pairs))
    frame = pl.DataFrame(lines, schema={name: kind for name, kind in CONTRASTS.items() if name != "p_holm"})
    adjusted = iter(holm(frame["p"].drop_nulls().to_list()))
    p_holm = [None if p is None else next(adjusted) for p in frame["p"].to_list()]
    return frame.with_columns(pl.Series("p_holm", p_holm, dtype=pl.Float64))


def _settings(runs: pl.DataFrame, values: Values) -> list[_Setting]:
    references, found = references_of(runs), []
    chosen = runs.filter(pl.col("arm") != "reference")
    options = [json.loads(text) for text in chosen["options"].to_list()]
    by = [_parts_by(method, given) for method, given in zip(chosen["method"].to_list(), options, strict=True)]
    variants = [_variant(line) for line in chosen.select("variant", "learning_rate", "budget").iter_rows(named=True)]
    named = chosen.with_columns(pl.Series("parts_by", by, dtype=pl.String), pl.Series("variant", variants, pl.String))
    for (forget_set, arm, variant, parts_by, is_tuned), group in named.group_by(*_NAMES, maintain_order=True):
        drawn = sides(group, references)
        by_pair: dict[str, dict[tuple[object, object], float]] = {measure: {} for measure in MEASURES}
        for measure in MEASURES:
            for side in drawn:
                for line in group.filter(pl.col("key").is_in(side.runs)).iter_rows(named=True):
                    against = values.pairs([line["key"]], side.references, measure, "all")
                    if against:
                        seed = line["seed"] if line["original_seed"] is None else line["original_seed"]
                        by_pair[measure][seed, side.draw] = float(np.mean(against))
        floors = {m: _floor([values.pairs(s.references, s.references, m, "all") for s in drawn]) for m in MEASURES}
        keys = [key for side in drawn for key in side.runs]
        found.append(
            _Setting(
                str(forget_set),
                str(arm),
                None if variant is None else str(variant),
                None if parts_by is None else str(parts_by),
                bool(is_tuned),
                keys,
                by_pair,
                floors,
            )
        )
    return found


def _parts_by(method: str, options: Mapping[str, object]) -> str | None:
    if method == "rum_shuffled":
        return RANDOM
    return str(options["scores"]) if method == "rum" else None


def _variant(line: Mapping[str, object]) -> str | None:
    """What sets a line apart within its arm, but for what its parts go by."""
    parts = [part for part in str(line["variant"] or "").split(", ") if part and not part.startswith("scores=")]
    if line["learning_rate"] is not None:
        parts.append(f"lr={line['learning_rate']:g}")
    if line["budget"] is not None:
        parts.append(f"budget={line['budget']:g}")
    return ", ".join(parts) or None


def _costs(tables: Tables) -> dict[str, float]:
    """Seconds by the key of scores or of a stand-in."""
    costs = {key: float(seconds) for key, seconds in tables.campaigns.select("scores_key", "model_seconds").rows()}
    for (key,), group in tables.proxies.group_by("proxies_key"):
        costs[str(key)] = float(group["seconds"][0] + group["training_seconds"][0])
    return costs


def _floor(drawn: Sequence[Sequence[float]]) -> float | None:
    found = [value for values in drawn for value in values]
    return float(np.mean(found)) if found else None


def _half(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def _paired(pairs: np.ndarray) -> dict[str, float | None]:
    mean, half = float(pairs.mean()), _half(pairs.tolist())
    line: dict[str, float | None] = {"num_pairs": len(pairs), "difference": mean}
    if half is None:
        return line | {"low": None, "high": None, "p": None}
    error = float(pairs.std(ddof=1) / np.sqrt(len(pairs)))
    p = 2 * float(stats.t.sf(abs(mean) / error, len(pairs) - 1)) if error > 1e-12 else None
    return line | {"low": mean - half, "high": mean + half, "p": p}


def cells(line: Mapping[str, object]) -> list[str]:
    """A line of the table as text, under HEADINGS."""
    return [
        name_of(line),
        str(line["parts_by"] or "-"),
        str(line["num_runs"]),
        *(
            f"{number(line[measure], 3)}"
            + ("" if line[f"{measure}_half_width"] is None else f" ±{number(line[f'{measure}_half_width'], 3)}")
            + f" ({number(line[f'{measure}_floor'], 3)})"
            for measure in MEASURES
        ),
        number(line["steps_ratio"]),
        number(line["seconds"], 1),
        number(line["ranking_seconds"], 1),
    ]


def contrast_cells(line: Mapping[str, object]) -> list[str]:
    """A line of the contrasts as text, under CONTRAST_HEADINGS."""
    return [
        str(line["forget_set"]),
        name_of(line),
        str(line["parts_by"]),
        str(line["against"]),
        {"tug_of_war": "ToW", "tug_of_war_membership": "ToW-MIA"}[str(line["measure"])],
        str(line["num_pairs"]),
        f"{line['difference']:+.3f}",
        "-" if line["low"] is None else f"{line['low']:+.3f} to {line['high']:+.3f}",
        number(line["p"], 3),
        number(line["p_holm"], 3),
    ]


def render(tables: Tables, sweep: str) -> list[Table]:
    """Terminal tables: one per forget set, and the contrasts."""
    frame = refinement_table(tables, sweep)
    parts = [
        _table(f"\n{name}: tug-of-war against the references, ± half of the 95 % interval", HEADINGS, group, cells)
        for (name,), group in frame.group_by("forget_set", maintain_order=True)
    ]
    found = contrasts(tables, sweep)
    if len(found):
        clear = found.filter(pl.col("p_holm") < 0.05)
        title = (
            f"\nparts by campaign scores against parts by another ranking: {len(clear)} of {len(found)} paired "
            "differences are significant after Holm (positive: the scores are better; all are in the report)"
        )
        parts.append(_table(title, CONTRAST_HEADINGS, clear, contrast_cells))
    return parts


def _table(title: str, headings: Sequence[str], frame: pl.DataFrame, text: _Text) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), box=None)
    for name in headings:
        left = name in ("method", "parts by", "forget set", "against", "measure")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for line in frame.to_dicts():
        table.add_row(*text(line))
    table.show_header = len(frame) > 0
    return table
