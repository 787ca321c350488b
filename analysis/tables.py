"""The tables: every setting of a sweep against its references, paired comparisons, and what scores find.

All as DESIGN section 12 has it: difference = reference - value, standard errors over the seeds of both sides, 95 %
t-intervals with Satterthwaite's degrees of freedom, and no selection: each setting is its own line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from rich.table import Table
from scipy import stats

from analysis.load import Tables

SETTING = ("forget_set", "arm", "learning_rate", "budget")
SPLITS = ("forget", "retain", "test", "forget_flipped", "forget_unflipped")
GATE, HARD_GATE = 0.995, 0.97


@dataclass(frozen=True)
class Difference:
    """A difference of means with its standard error and 95 % interval; None where a side has fewer than two values."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None


def difference(references: Sequence[float], runs: Sequence[float]) -> Difference:
    """Mean of the references minus mean of the runs (Welch's interval)."""
    value = float(np.mean(references) - np.mean(runs))
    if min(len(references), len(runs)) < 2:
        return Difference(value, None, None, None)
    parts = [np.var(side, ddof=1) / len(side) for side in (references, runs)]
    standard_error = math.sqrt(sum(parts))
    if standard_error == 0:
        return Difference(value, 0.0, value, value)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (references, runs), strict=True)
    )
    half = float(stats.t.ppf(0.975, freedom)) * standard_error
    return Difference(value, standard_error, value - half, value + half)


def of_sweep(tables: Tables, sweep: str) -> pl.DataFrame:
    """The finished runs of a sweep with the name of their arm; one line per member."""
    members = tables.members.filter(pl.col("sweep") == sweep).select("arm", "key")
    return members.join(tables.runs.filter(pl.col("status") == "done"), on="key", how="inner", maintain_order="left")


def failed_of_sweep(tables: Tables, sweep: str) -> pl.DataFrame:
    """The members of a sweep that failed."""
    members = tables.members.filter(pl.col("sweep") == sweep).select("arm", "key")
    return members.join(tables.runs.filter(pl.col("status") != "done"), on="key", how="inner", maintain_order="left")


class Values:
    """Metrics and comparisons of one export by key, for quick look-up."""

    def __init__(self, tables: Tables) -> None:
        self._metrics = {(k, m, s): v for k, m, s, v in tables.metrics.select("key", "metric", "split", "value").rows()}
        columns = ("key", "reference_key", "metric", "split", "value")
        self._pairs = {(k, r, m, s): v for k, r, m, s, v in tables.comparisons.select(columns).rows()}

    def metric(self, keys: Sequence[str], metric: str, split: str) -> list[float]:
        return [self._metrics[key, metric, split] for key in keys if (key, metric, split) in self._metrics]

    def pairs(self, keys: Sequence[str], references: Sequence[str], metric: str, split: str) -> list[float]:
        return [
            self._pairs[key, reference, metric, split]
            for key in keys
            for reference in references
            if (key, reference, metric, split) in self._pairs
        ]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def comparison_table(tables: Tables, sweep: str) -> pl.DataFrame:
    """One line per forget set, arm, learning rate and budget of a sweep, against the references of that set.

    Columns: num_runs, num_references; for forget, retain and test accuracy (and the flipped and unflipped parts of a
    forget set that has both) `<split>_difference`, `_standard_error`, `_low`, `_high` in percentage points;
    tug_of_war and tug_of_war_floor (references against one another); excess_disagreement (share of the forget set);
    membership_auc, reference_auc; published_svc_confidence, published_svc_correctness; realised_budget,
    effective_budget, steps_ratio, seconds (means). Null where there is nothing to compare with.
    """
    runs, values = of_sweep(tables, sweep), Values(tables)
    references = _references(runs)
    lines = []
    for setting, group in runs.filter(pl.col("arm") != "reference").group_by(SETTING, maintain_order=True):
        named = dict(zip(SETTING, setting, strict=True))
        against = references.get(str(named["forget_set"]), [])
        lines.append(named | _line(group, against, values))
    return pl.DataFrame(lines, infer_schema_length=None)


def _references(runs: pl.DataFrame) -> dict[str, list[str]]:
    chosen = runs.filter(pl.col("arm") == "reference")
    return {str(name[0]): group["key"].to_list() for name, group in chosen.group_by("forget_set")}


def _line(group: pl.DataFrame, references: list[str], values: Values) -> dict[str, object]:
    keys = group["key"].to_list()
    line: dict[str, object] = {"num_runs": len(keys), "num_references": len(references)}
    for split in SPLITS:
        line |= _accuracy_columns(keys, references, split, values)
    among = values.pairs(references, references, "disagreement", "forget")
    between = values.pairs(keys, references, "disagreement", "forget")
    line |= {
        "tug_of_war": _mean(values.pairs(keys, references, "tug_of_war", "all")),
        "tug_of_war_floor": _mean(values.pairs(references, references, "tug_of_war", "all")),
        "excess_disagreement": float(np.mean(between) - np.mean(among)) if among and between else None,
        "membership_auc": _mean(values.metric(keys, "membership_auc", "forget")),
        "reference_auc": _mean(values.metric(references, "membership_auc", "forget")),
    }
    for attack in ("published_svc_confidence", "published_svc_correctness"):
        line[attack] = _mean(values.metric(keys, attack, "forget"))
    for column in ("realised_budget", "effective_budget", "steps_ratio", "seconds"):
        line[column] = group[column].mean()
    return line


def _accuracy_columns(keys: list[str], references: list[str], split: str, values: Values) -> dict[str, float | None]:
    ours, theirs = values.metric(keys, "accuracy", split), values.metric(references, "accuracy", split)
    names = [f"{split}_{part}" for part in ("difference", "standard_error", "low", "high")]
    if not ours or not theirs:
        return dict.fromkeys(names)
    found = difference([100 * value for value in theirs], [100 * value for value in ours])
    return dict(zip(names, (found.value, found.standard_error, found.low, found.high), strict=True))


def paired_table(tables: Tables, sweep: str) -> pl.DataFrame:
    """DEL against its control and against the short retraining, in tug-of-war, paired on original seed and forget draw.

    One line per forget set, learning rate and budget of `del` and per rival that was run: `random_within_tensor` at the
    same rate and budget, `retrain_short` at each of its rates. Positive: DEL is closer to the references. t-interval
    over pairs; `p` two-sided, `p_holm` adjusted within the table. Empty where DEL or every rival is missing.
    """
    runs, values = of_sweep(tables, sweep), Values(tables)
    references = _references(runs)
    by_seed = {
        (*setting[:4], setting[4]): values.pairs(
            group["key"].to_list(), references.get(str(setting[0]), []), "tug_of_war", "all"
        )
        for setting, group in runs.with_columns(pair=pl.coalesce("original_seed", "seed"))
        .filter(pl.col("arm") != "reference")
        .group_by(*SETTING, "pair", "forget_draw", maintain_order=True)
    }
    seeds = sorted({name[4] for name in by_seed})
    lines = []
    for forget_set, arm, rate, budget in dict.fromkeys(name[:4] for name in by_seed):
        if arm != "del":
            continue
        rivals = [("random_within_tensor", rate, budget)]
        rivals += [
            ("retrain_short", r, b)
            for f, a, r, b in dict.fromkeys(n[:4] for n in by_seed)
            if (f, a) == (forget_set, "retrain_short")
        ]
        for rival in rivals:
            pairs = [
                np.mean(by_seed[forget_set, arm, rate, budget, seed]) - np.mean(by_seed[(forget_set, *rival, seed)])
                for seed in seeds
                if by_seed.get((forget_set, arm, rate, budget, seed)) and by_seed.get((forget_set, *rival, seed))
            ]
            if len(pairs) >= 2:
                named = {
                    "forget_set": forget_set,
                    "learning_rate": rate,
                    "budget": budget,
                    "against": rival[0],
                    "against_rate": rival[1],
                }
                lines.append(named | _paired_line(np.array(pairs)))
    adjusted = holm([line["p"] for line in lines])
    return pl.DataFrame(
        [line | {"p_holm": p} for line, p in zip(lines, adjusted, strict=True)], infer_schema_length=None
    )


def _paired_line(pairs: np.ndarray) -> dict[str, float]:
    mean, standard_error = float(pairs.mean()), float(pairs.std(ddof=1) / math.sqrt(len(pairs)))
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * standard_error
    p = 1.0 if mean == standard_error == 0 else 0.0
    if standard_error > 0:
        p = 2 * float(stats.t.sf(abs(mean) / standard_error, len(pairs) - 1))
    return {"num_pairs": len(pairs), "difference": mean, "low": mean - half, "high": mean + half, "p": p}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values, in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


@dataclass(frozen=True)
class ScoreSummary:
    """What a set of memorization scores finds; the last three are None where no label is known to be flipped."""

    num_examples: int
    num_models: int
    in_accuracy: float
    hard_in_accuracy: float | None
    num_flipped: int
    auc: float | None
    precision: float | None
    held_out_auc: float | None

    @property
    def passes_gate(self) -> bool:
        """The subset models fit their subsets: 99.5 % overall, 97 % where they are mostly wrong outside."""
        return self.in_accuracy >= GATE and (self.hard_in_accuracy is None or self.hard_in_accuracy >= HARD_GATE)


def score_summary(tables: Tables, scores_key: str) -> ScoreSummary:
    """Fit of the subset models, and how well score and held-out error alone find the flipped labels."""
    from sklearn.metrics import roc_auc_score

    scores = tables.memorization.filter(pl.col("scores_key") == scores_key)
    flipped = (scores["label"] != scores["true_label"]).to_numpy()
    hard = scores.filter(pl.col("out_mean") < 0.5)
    weights = scores["num_in"].to_numpy()
    score, held_out_error = scores["score"].to_numpy(), 1 - scores["out_mean"].to_numpy()
    count = int(flipped.sum())
    known = 0 < count < len(flipped)
    top = np.argsort(-score, kind="stable")[:count]
    return ScoreSummary(
        num_examples=len(scores),
        num_models=int(scores["num_in"][0] + scores["num_out"][0]),
        in_accuracy=float(np.average(scores["in_mean"].to_numpy(), weights=weights)),
        hard_in_accuracy=float(np.mean(hard["in_mean"].to_numpy())) if len(hard) else None,
        num_flipped=count,
        auc=float(roc_auc_score(flipped, score)) if known else None,
        precision=float(flipped[top].mean()) if known else None,
        held_out_auc=float(roc_auc_score(flipped, held_out_error)) if known else None,
    )


# ---- the terminal --------------------------------------------------------------------------------------------------


def interval(line: Mapping[str, object], split: str) -> str:
    """A difference and the half-width of its 95 % interval, in points: `+0.3 ±1.2`."""
    value, low, high = (line.get(f"{split}_{part}") for part in ("difference", "low", "high"))
    if not isinstance(value, float):
        return "-"
    return f"{value:+.1f}" + (f" ±{(high - low) / 2:.1f}" if isinstance(low, float) and isinstance(high, float) else "")


def number(value: object, digits: int = 2) -> str:
    """A number with a fixed number of digits; `-` for what is absent."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


HEADINGS = ("arm", "rate", "budget", "forget", "retain", "test", "tug (floor)", "disagree", "AUC (refs)", "steps", "s")


def cells(line: Mapping[str, object]) -> list[str]:
    """A line of the comparison table as text, under `HEADINGS`."""
    rate, budget = line["learning_rate"], line["budget"]
    return [
        str(line["arm"]),
        "" if rate is None else f"{rate:g}",
        "" if budget is None else f"{budget:g}",
        *(interval(line, split) for split in ("forget", "retain", "test")),
        f"{number(line['tug_of_war'], 3)} ({number(line['tug_of_war_floor'], 3)})",
        number(line["excess_disagreement"]),
        f"{number(line['membership_auc'])} ({number(line['reference_auc'])})",
        number(line["steps_ratio"]),
        number(line["seconds"], 1),
    ]


def render(frame: pl.DataFrame) -> list[Table]:
    """One terminal table per forget set, for 120 columns."""
    tables = []
    for (forget_set,), group in frame.group_by("forget_set", maintain_order=True):
        lines = group.to_dicts()
        table = Table(
            title=f"\n{forget_set}: reference - run in points ± half of the 95 % interval; "
            f"{lines[0]['num_references']} references, {lines[0]['num_runs']} runs a line, given the forget draw",
            title_justify="left",
            title_style="bold",
            padding=(0, 1, 0, 0),
            box=None,
        )
        for name in HEADINGS:
            table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
        for line in lines:
            table.add_row(*cells(line))
        tables.append(table)
    return tables
