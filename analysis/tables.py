"""The tables: every setting of a sweep against its references, and what scores find.

All as DESIGN section 12 has it: difference = reference - value, standard errors over the seeds of both sides, 95 %
t-intervals with Satterthwaite's degrees of freedom, and no selection: each setting is its own line. Where a forget set
was drawn several times, each draw has its own references and the interval is over the draws' differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from rich.table import Table
from scipy import special

from analysis.load import Tables
from analysis.names import LINE, name_of, with_lines
from orchestrator import uncertainty

SETTING = ("forget_set", "arm", "variant", "learning_rate", "budget")
SPLITS = ("forget", "retain", "test", "forget_flipped", "forget_unflipped")
EVERY = "all"  # the reference key of comparisons with all references together
GATE, HARD_GATE = 0.995, 0.97
_PARTS = ("difference", "standard_error", "low", "high")
_MEANS = ("realised_budget", "effective_budget", "steps_ratio", "seconds")
_FEATURES = ("confidence", "correctness", "entropy", "modified_entropy", "probability")
ATTACKS = tuple(f"published_svc_{feature}" for feature in _FEATURES)
KEYS = {
    "forget_set": pl.String(),
    "arm": pl.String(),
    "variant": pl.String(),
    "learning_rate": pl.Float64(),
    "budget": pl.Float64(),
}
COMPARISON: Mapping[str, pl.DataType] = {
    **KEYS,
    **LINE,
    "draws": pl.String(),
    "is_partial": pl.Boolean(),
    "num_runs": pl.Int64(),
    "num_references": pl.Int64(),
    "most_references": pl.Int64(),
    **{f"{split}_{part}": pl.Float64() for split in SPLITS for part in _PARTS},
    "reference_band": pl.Float64(),
    "tug_of_war": pl.Float64(),
    "tug_of_war_floor": pl.Float64(),
    "excess_disagreement": pl.Float64(),
    "membership_auc": pl.Float64(),
    "reference_auc": pl.Float64(),
    "membership_auc_difference": pl.Float64(),
    "tug_of_war_membership": pl.Float64(),
    "tug_of_war_membership_floor": pl.Float64(),
    "probability_distance": pl.Float64(),
    "probability_distance_floor": pl.Float64(),
    **{name: pl.Float64() for attack in ATTACKS for name in (attack, f"{attack}_references")},
    **{name: pl.Float64() for name in _MEANS},
}


@dataclass(frozen=True)
class Difference:
    """A difference of means with its standard error and 95 % interval; None where a side has fewer than two values."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None


def difference(references: Sequence[float] | np.ndarray, runs: Sequence[float] | np.ndarray) -> Difference:
    """Mean of the references minus mean of the runs (Welch's interval)."""
    value = float(np.mean(references) - np.mean(runs))
    found = uncertainty.of_means(references, runs)
    if found is None:
        return Difference(value, None, None, None)
    half = half_width(found)
    return Difference(value, found.standard_error, value - half, value + half)


def half_width(found: uncertainty.Uncertainty) -> float:
    """Half of the 95 % t-interval; 0 where nothing varies."""
    return float(special.stdtrit(found.freedom, 0.975)) * found.standard_error if found.standard_error else 0.0


def mean_difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Difference:
    """Mean over two or more draws of each draw's difference, with a t-interval over the draws.

    All that varies with the draw is in it: the examples, the original, the unlearning and the references.
    """
    found = np.array([theirs.mean() - ours.mean() for theirs, ours in pairs])
    value, standard_error = float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found)))
    half = float(special.stdtrit(len(found) - 1, 0.975)) * standard_error
    return Difference(value, standard_error, value - half, value + half)


def of_sweep(tables: Tables, sweep: str) -> pl.DataFrame:
    """The finished runs that a sweep reports, with arm, variant and the columns of LINE; none of the tuning runs.

    Runs of two variants are never averaged.
    """
    done = pl.col("status") == "done"
    runs = _reported(tables, sweep).join(tables.runs.filter(done), on="key", how="inner", maintain_order="left")
    return with_lines(runs, tables.selections.filter(pl.col("sweep") == sweep))


def failed_of_sweep(tables: Tables, sweep: str) -> pl.DataFrame:
    """The reported members of a sweep that failed; those that a scheduler stopped early did not."""
    failed = ~pl.col("status").is_in(["done", "stopped"])
    return _reported(tables, sweep).join(tables.runs.filter(failed), on="key", how="inner", maintain_order="left")


def _reported(tables: Tables, sweep: str) -> pl.DataFrame:
    """The members that a sweep reports: all but the runs that settings were chosen by."""
    members = tables.members.filter((pl.col("sweep") == sweep) & (pl.col("role") != "tuning"))
    return members.select("arm", "key", is_tuned=pl.col("role") == "confirmed")


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
    """One line per setting (forget set, arm, variant, learning rate, budget), each draw against its own references.

    Columns as in `COMPARISON`: those of LINE; the draws, as text, and whether they
    are fewer than those of other lines of the forget set; the least and most references of a draw; for forget, retain
    and test accuracy (and the flipped and unflipped parts of a forget set that has both) `<split>_difference`,
    `_standard_error`, `_low`, `_high` in points; reference_band, half of the 95 % interval in which one more
    reference's forget accuracy would fall; tug_of_war and its floor (references against one another);
    excess_disagreement (share of the forget set); the membership AUC of the runs and of the references, and the mean
    of reference - run; tug-of-war with the published attack in it, and the distance of the given label's probability
    to the references' mean, each with its floor (a reference against the others); the published attacks on runs and
    on references; means of budgets, steps and seconds.
    Null where there is nothing to compare with.
    """
    runs, values = of_sweep(tables, sweep), Values(tables)
    references = references_of(runs)
    lines = []
    for setting, group in runs.filter(pl.col("arm") != "reference").group_by(SETTING, maintain_order=True):
        found: dict[str, object] = dict(zip(SETTING, setting, strict=True)) | line_of(group)
        lines.append(found | _line(group, sides(group, references), values))
    return marked(pl.DataFrame(lines, schema=dict(COMPARISON)))


def line_of(group: pl.DataFrame) -> dict[str, object]:
    """The columns of LINE, which the runs of a setting share."""
    return {name: group[name][0] for name in LINE}


def marked(frame: pl.DataFrame) -> pl.DataFrame:
    """Lines over fewer draws than others of their forget set are marked as partial."""
    number = pl.col("draws").str.split(", ").list.len()
    return frame.with_columns(is_partial=number < number.max().over("forget_set"))


@dataclass(frozen=True)
class Side:
    """The runs of a setting on one draw of the forget set, and the references of that draw, by key."""

    draw: int
    runs: list[str]
    references: list[str]


def sides(group: pl.DataFrame, references: Mapping[tuple[str, object], list[str]]) -> list[Side]:
    """The runs of a setting by forget draw; draws without references are left out where others have some."""
    found = [
        Side(int(str(draw)), part["key"].to_list(), references.get((str(name), draw), []))
        for (name, draw), part in group.group_by("forget_set", "forget_draw", maintain_order=True)
    ]
    return [side for side in found if side.references] or found


def counts_of(drawn: Sequence[Side]) -> dict[str, object]:
    """What entered a line: its draws, as text (`0` or `0, 1, 2`), its runs, and the references of each draw."""
    numbers = [len(side.references) for side in drawn]
    return {
        "draws": ", ".join(str(draw) for draw in sorted(side.draw for side in drawn)),
        "num_runs": sum(len(side.runs) for side in drawn),
        "num_references": min(numbers),
        "most_references": max(numbers),
    }


def conditional_on(lines: Sequence[Mapping[str, object]]) -> str:
    """What a forget set's numbers hold for: one draw of it, or several."""
    draws = max((str(line["draws"]) for line in lines), key=len)
    return f"over the forget draws {draws}" if "," in draws else f"conditional on the forget draw ({draws})"


def references_of(runs: pl.DataFrame) -> dict[tuple[str, object], list[str]]:
    """The keys of the references by forget set and draw."""
    chosen = runs.filter(pl.col("arm") == "reference").group_by("forget_set", "forget_draw", maintain_order=True)
    return {(str(name), draw): group["key"].to_list() for (name, draw), group in chosen}


def _line(group: pl.DataFrame, drawn: Sequence[Side], values: Values) -> dict[str, object]:
    keys = [key for side in drawn for key in side.runs]
    references = [key for side in drawn for key in side.references]
    line = counts_of(drawn)
    for split in SPLITS:
        line |= _accuracy_columns(drawn, split, values)

    def between(metric: str, split: str) -> float | None:
        return _mean([v for side in drawn for v in values.pairs(side.runs, side.references, metric, split)])

    def among(metric: str, split: str) -> float | None:
        return _mean([v for side in drawn for v in values.pairs(side.references, side.references, metric, split)])

    line |= {
        "reference_band": _prediction_band(
            [[100 * a for a in values.metric(side.references, "accuracy", "forget")] for side in drawn]
        ),
        "tug_of_war": between("tug_of_war", "all"),
        "tug_of_war_floor": among("tug_of_war", "all"),
        "excess_disagreement": _excess(drawn, values),
        "membership_auc": _mean(values.metric(keys, "membership_auc", "forget")),
        "reference_auc": _mean(values.metric(references, "membership_auc", "forget")),
        "membership_auc_difference": between("membership_auc_difference", "forget"),
        "tug_of_war_membership": between("tug_of_war_membership", "all"),
        "tug_of_war_membership_floor": among("tug_of_war_membership", "all"),
        "probability_distance": _mean(values.pairs(keys, [EVERY], "probability_distance", "forget")),
        "probability_distance_floor": _mean(values.pairs(references, [EVERY], "probability_distance", "forget")),
    }
    return (
        line
        | {attack: _mean(values.metric(keys, attack, "forget")) for attack in ATTACKS}
        | {f"{attack}_references": _mean(values.metric(references, attack, "forget")) for attack in ATTACKS}
        | {column: group.filter(pl.col("key").is_in(keys))[column].mean() for column in _MEANS}
    )


def _excess(drawn: Sequence[Side], values: Values) -> float | None:
    """Disagreement of runs with their references beyond that of the references among themselves, mean over draws."""
    found = []
    for side in drawn:
        among = values.pairs(side.references, side.references, "disagreement", "forget")
        between = values.pairs(side.runs, side.references, "disagreement", "forget")
        if among and between:
            found.append(float(np.mean(between) - np.mean(among)))
    return _mean(found)


def measured(drawn: Sequence[Side], metric: str, split: str, values: Values) -> list[tuple[np.ndarray, np.ndarray]]:
    """The values of references and of runs in points, by draw; draws where a side has none are left out."""
    found = [[np.array(values.metric(k, metric, split)) * 100 for k in (s.references, s.runs)] for s in drawn]
    return [(theirs, ours) for theirs, ours in found if len(theirs) and len(ours)]


def _accuracy_columns(drawn: Sequence[Side], split: str, values: Values) -> dict[str, float | None]:
    names = [f"{split}_{part}" for part in _PARTS]
    pairs = measured(drawn, "accuracy", split, values)
    if not pairs:
        return dict.fromkeys(names)
    found = difference(*pairs[0]) if len(pairs) == 1 else mean_difference(pairs)
    return dict(zip(names, (found.value, found.standard_error, found.low, found.high), strict=True))


def _prediction_band(drawn: Sequence[Sequence[float]]) -> float | None:
    """Half of the 95 % interval for the difference of one more value from the mean of these, draws pooled."""
    drawn = [found for found in drawn if len(found) > 1]
    if not drawn:
        return None
    freedom = sum(len(found) - 1 for found in drawn)
    variance = sum(float(np.var(found, ddof=1)) * (len(found) - 1) for found in drawn) / freedom
    more = float(np.mean([1 / len(found) for found in drawn]))
    return float(special.stdtrit(freedom, 0.975)) * math.sqrt(variance * (1 + more))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values, in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


@dataclass(frozen=True)
class ScoreSummary:
    """What a set of memorization scores finds; auc and what follows is None where no label is known to be flipped."""

    num_examples: int
    num_models: int
    in_accuracy: float
    hard_in_accuracy: float | None
    num_flipped: int
    auc: float | None
    precision: float | None
    held_out_auc: float | None
    estimator: str = "correctness"
    stopping: str | None = None
    split_half: float | None = None
    top_overlap: float | None = None
    standard_error: float | None = None

    @property
    def passes_gate(self) -> bool:
        """The subset models fit their subsets: 99.5 % overall, 97 % where they are mostly wrong outside."""
        return self.in_accuracy >= GATE and (self.hard_in_accuracy is None or self.hard_in_accuracy >= HARD_GATE)


def score_summary(tables: Tables, scores_key: str) -> ScoreSummary:
    """Fit of the subset models, and how well score and held-out error alone find the flipped labels."""
    campaign = tables.campaigns.filter(pl.col("scores_key") == scores_key).to_dicts()
    scores = tables.memorization.filter(pl.col("scores_key") == scores_key)
    flipped = (scores["label"] != scores["true_label"]).to_numpy()
    hard = scores.filter(pl.col("out_mean") < 0.5)
    score, held_out_error = scores["score"].to_numpy(), 1 - scores["out_mean"].to_numpy()
    count = int(flipped.sum())
    known = 0 < count < len(flipped)
    top = np.argsort(-score, kind="stable")[:count]
    return ScoreSummary(
        num_examples=len(scores),
        num_models=int(scores["num_in"][0] + scores["num_out"][0]),
        estimator=campaign[0]["estimator"] if campaign else "correctness",
        stopping=campaign[0]["stopping"] if campaign else None,
        split_half=campaign[0]["split_half"] if campaign else None,
        top_overlap=campaign[0]["top_overlap"] if campaign else None,
        standard_error=campaign[0]["standard_error"] if campaign else None,
        in_accuracy=campaign[0]["in_accuracy"] if campaign else _in_accuracy(scores),
        hard_in_accuracy=campaign[0]["hard_in_accuracy"] if campaign else _in_accuracy(hard) if len(hard) else None,
        num_flipped=count,
        auc=_area(score, flipped) if known else None,
        precision=float(flipped[top].mean()) if known else None,
        held_out_auc=_area(held_out_error, flipped) if known else None,
    )


def _in_accuracy(scores: pl.DataFrame) -> float:
    return float(np.average(scores["in_mean"].to_numpy(), weights=scores["num_in"].to_numpy()))


def _area(values: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve: the share of pairs in the right order, ties half."""
    hits, misses = int(positive.sum()), int((~positive).sum())
    from scipy.stats import rankdata  # half a second to import, which a table of runs does without

    ranks = rankdata(values)[positive].sum()
    return float((ranks - hits * (hits + 1) / 2) / (hits * misses))


# ---- the terminal --------------------------------------------------------------------------------------------------


def interval(line: Mapping[str, object], split: str) -> str:
    """A difference and the half-width of its 95 % interval, in points: `+0.3 ±1.2`."""
    value, low, high = (line.get(f"{split}_{part}") for part in ("difference", "low", "high"))
    if not isinstance(value, float):
        return "-"
    return f"{value:+.1f}" + (f" ±{(high - low) / 2:.1f}" if isinstance(low, float) and isinstance(high, float) else "")


def ends(line: Mapping[str, object], split: str) -> str:
    """A difference and the ends of its 95 % interval, in points: `+0.3 [-0.9, +1.5]`."""
    value, low, high = (line.get(f"{split}_{part}") for part in ("difference", "low", "high"))
    if not isinstance(value, float):
        return "-"
    return f"{value:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if isinstance(low, float) else "")


def number(value: object, digits: int = 2) -> str:
    """A number with a fixed number of digits; `-` for what is absent."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def counted(values: Sequence[int]) -> str:
    """A count that lines share, or its range: `3` or `1 to 3`."""
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def references_said(lines: Sequence[Mapping[str, object]]) -> str:
    """How many references a forget set has."""
    several = any("," in str(line["draws"]) for line in lines)
    numbers = [int(str(line[name])) for line in lines for name in ("num_references", "most_references")]
    return f"{counted(numbers)} references" + (" a draw" if several else "")


HEADINGS = ("arm", "rate", "budget", "forget", "retain", "test", "tug (floor)", "disagree", "AUC (refs)", "steps", "s")


def cells(line: Mapping[str, object], text: Callable[[Mapping[str, object], str], str] = interval) -> list[str]:
    """A line of the comparison table as text, under `HEADINGS`."""
    rate, budget = line["learning_rate"], line["budget"]
    return [
        name_of(line),
        "" if rate is None else f"{rate:g}",
        "" if budget is None else f"{budget:g}",
        *(text(line, split) for split in ("forget", "retain", "test")),
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
            f"{references_said(lines)}, {counted(group['num_runs'].to_list())} runs a line, {conditional_on(lines)}",
            title_justify="left",
            title_style="bold",
            padding=(0, 1, 0, 0),
            box=None,
        )
        for name in HEADINGS:
            table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name != "arm")
        for line in lines:
            table.add_row(*cells(line))
        tables.append(table)
    return tables
