"""Tables in the form of the DEL paper: reference minus run with its spread; tug-of-war by localization and budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from rich.table import Table
from scipy import stats

from analysis.load import Tables
from analysis.names import LINE, name_of, setting_of
from analysis.tables import (
    SETTING,
    Side,
    Values,
    conditional_on,
    counted,
    counts_of,
    holm,
    line_of,
    marked,
    mean_difference,
    measured,
    of_sweep,
    references_of,
    references_said,
    sides,
)
from orchestrator import uncertainty

MEASURES: Mapping[str, tuple[str, str]] = {
    "forget": ("accuracy", "forget"),
    "mia": ("published_svc_confidence", "forget"),
    "mia_correctness": ("published_svc_correctness", "forget"),
    "retain": ("accuracy", "retain"),
    "test": ("accuracy", "test"),
}
"""What a paper table holds, by column: metric and split."""

_TESTED = ("forget", "retain", "test")


@dataclass(frozen=True)
class Published:
    """A number of the paper: mean and spread of reference minus run over three runs, in points."""

    recipe: str
    arm: str
    measure: str
    mean: float
    spread: float


PUBLISHED = (
    Published("cifar10_resnet18_iid", "del", "forget", 0.97, 0.42),
    Published("cifar10_resnet18_iid", "del", "mia", -0.97, 0.40),
    Published("cifar10_resnet18_iid", "random_labels", "forget", 1.69, 0.46),
    Published("cifar10_resnet18_classes", "del", "forget", 0.43, 1.06),
    Published("cifar10_resnet18_classes", "salloc_relabel", "forget", -2.8, 1.45),
)
"""All that is known of the tables of Torkzadehmahani et al. (CIFAR-10, ResNet-18, Table 2), as reviews quote it."""


_PUBLISHED_RUNS = 3


def reproduced(ours: float, our_spread: float, published: Published, num_runs: int = 3) -> bool:
    """Whether our mean and the published one of three runs agree: within t(.975) standard errors of the difference.

    With three runs of ours too, t has four degrees of freedom.
    """
    bound = float(stats.t.ppf(0.975, num_runs + _PUBLISHED_RUNS - 2))
    return abs(ours - published.mean) <= bound * math.sqrt(
        our_spread**2 / num_runs + published.spread**2 / _PUBLISHED_RUNS
    )


def paper_table(tables: Tables, sweep: str) -> pl.DataFrame:
    """One line per setting: mean of the references minus the run, in points, with its standard deviation over runs.

    Columns of MEASURES as `<measure>` and `<measure>_spread` (null for a single run), `num_runs`; for forget, retain
    and test accuracy also `<measure>_p`, Welch's two-sided p of the difference of means, and `<measure>_p_holm`,
    adjusted over all of them of a forget set. Null without references. Where a forget set was drawn several times,
    each draw's runs are held against its own references; spread and p are over the draws.
    """
    runs, values = of_sweep(tables, sweep), Values(tables)
    references = references_of(runs)
    lines = []
    for setting, group in runs.filter(pl.col("arm") != "reference").group_by(SETTING, maintain_order=True):
        line: dict[str, object] = dict(zip(SETTING, setting, strict=True)) | line_of(group)
        drawn = sides(group, references)
        line |= counts_of(drawn)
        for measure, (metric, split) in MEASURES.items():
            line |= _measured(measure, measured(drawn, metric, split, values))
        lines.append(line)
    numbers = [f"{name}{part}" for name in MEASURES for part in ("", "_spread")] + [f"{name}_p" for name in _TESTED]
    schema = {**_KINDS, **_COUNTS, **dict.fromkeys(numbers, pl.Float64())}
    return _adjusted(marked(pl.DataFrame(lines, schema=schema)))


_KINDS = {**dict(zip(SETTING, (*[pl.String()] * 3, *[pl.Float64()] * 2), strict=True)), **LINE}
_COUNTS: Mapping[str, pl.DataType] = {
    "draws": pl.String(),
    **dict.fromkeys(("num_runs", "num_references", "most_references"), pl.Int64()),
}


def _measured(measure: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | None]:
    if not pairs:
        return {}
    if len(pairs) > 1:
        over = mean_difference(pairs)
        assert over.standard_error is not None
        several: dict[str, float | None] = {measure: over.value}
        several[f"{measure}_spread"] = over.standard_error * math.sqrt(len(pairs))
        if measure in _TESTED and over.standard_error > 1e-9:
            several[f"{measure}_p"] = 2 * float(stats.t.sf(abs(over.value) / over.standard_error, len(pairs) - 1))
        return several
    theirs, ours = pairs[0]
    found: dict[str, float | None] = {measure: float(theirs.mean() - ours.mean())}
    if len(ours) > 1:
        found[f"{measure}_spread"] = float(ours.std(ddof=1))
    if measure in _TESTED and min(len(ours), len(theirs)) > 1:
        found[f"{measure}_p"] = _welch(ours, theirs)
    return found


def _welch(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Two-sided p of equal means (Welch); None where neither side varies."""
    parts = [side.var(ddof=1) / len(side) for side in (ours, theirs)]
    if sum(parts) < 1e-18:
        return None
    freedom = sum(parts) ** 2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, (ours, theirs), strict=True))
    return 2 * float(stats.t.sf(abs(theirs.mean() - ours.mean()) / math.sqrt(sum(parts)), freedom))


def _adjusted(frame: pl.DataFrame) -> pl.DataFrame:
    parts = []
    for _, group in frame.group_by("forget_set", maintain_order=True):
        found = {name: group[f"{name}_p"].to_list() for name in _TESTED}
        tested = [(name, row) for name in _TESTED for row, p in enumerate(found[name]) if p is not None]
        adjusted = dict(zip(tested, holm([found[name][row] for name, row in tested]), strict=True))
        columns = [
            pl.Series(f"{name}_p_holm", [adjusted.get((name, row)) for row in range(len(group))], dtype=pl.Float64)
            for name in _TESTED
        ]
        parts.append(group.with_columns(columns))
    return pl.concat(parts) if parts else frame.with_columns(pl.lit(None).alias(f"{name}_p_holm") for name in _TESTED)


def ablation_table(tables: Tables, sweep: str) -> pl.DataFrame:
    """Tug-of-war of every arm with a budget: one line per forget set, arm, rate and budget.

    Columns: strategy, granularity, method, budget (null: the strategy's own), realised_budget, tug_of_war (mean over
    runs of their mean over the references of their draw), standard_error over the seeds of both, or over the draws
    where there are several (null for fewer than two of any), num_runs, floor.
    """
    runs, values = of_sweep(tables, sweep), Values(tables)
    references = references_of(runs)
    masked = runs.filter(pl.col("strategy").is_not_null())
    keys = (*SETTING, "strategy", "granularity", "method")
    lines = []
    for setting, group in masked.group_by(keys, maintain_order=True):
        drawn = sides(group, references)
        found = [found for side in drawn for found in _by_run(values, side)]
        among = [pair for side in drawn for pair in _pairs(values, side.references, side)]
        lines.append(
            dict(zip(keys, setting, strict=True))
            | line_of(group)
            | {
                **counts_of(drawn),
                "realised_budget": group["realised_budget"].mean(),
                "tug_of_war": float(np.mean(found)) if found else None,
                "standard_error": _error(values, drawn),
                "floor": float(np.mean(among)) if among else None,
            }
        )
    numbers = dict.fromkeys(("realised_budget", "tug_of_war", "standard_error"), pl.Float64())
    text = dict.fromkeys(("strategy", "granularity", "method"), pl.String())
    schema = {**_KINDS, **text, **numbers, **_COUNTS, "floor": pl.Float64()}
    return marked(pl.DataFrame(lines, schema=schema))


def _pairs(values: Values, keys: Sequence[str], side: Side) -> list[float]:
    return values.pairs(keys, side.references, "tug_of_war", "all")


def _by_run(values: Values, side: Side) -> list[float]:
    """Tug-of-war of each run, mean over references."""
    return [float(np.mean(pairs)) for key in side.runs if (pairs := _pairs(values, [key], side))]


def _error(values: Values, drawn: Sequence[Side]) -> float | None:
    """The standard error of tug-of-war over the seeds of runs and references of one draw, or over several draws."""
    by_run = [found for side in drawn if (found := _by_run(values, side))]
    if len(by_run) == 1:
        against = [values.pairs(side.runs, [r], "tug_of_war", "all") for side in drawn for r in side.references]
        sides = [*by_run, [float(np.mean(pairs)) for pairs in against if pairs]]
    else:
        sides = [[float(np.mean(found)) for found in by_run]]
    over = uncertainty.of_means(*sides)
    return None if over is None else over.standard_error


def comparisons_with_paper(frame: pl.DataFrame, recipe: str) -> list[str]:
    """Sentences that hold our numbers of a paper table against the published ones; none for other recipes."""
    said = []
    for known in (known for known in PUBLISHED if known.recipe == recipe):
        for line in frame.filter(pl.col("arm") == known.arm).iter_rows(named=True):
            ours, spread = line[known.measure], line[f"{known.measure}_spread"]
            if ours is not None and spread is not None:
                verdict = "reproduced" if reproduced(ours, spread, known, line["num_runs"]) else "not reproduced"
                said.append(
                    f"{setting_of(line)}, {known.measure}: ours {ours:+.2f} ± {spread:.2f} (n={line['num_runs']}), "
                    f"published {known.mean:+.2f} ± {known.spread:.2f}: {verdict}"
                )
    return said


# ---- for people ----------------------------------------------------------------------------------------------------

PAPER_HEADINGS = ("arm", "rate", "budget", "n", "forget", "MIA", "MIA (correct)", "retain", "test", "p forget (Holm)")


def paper_cells(line: Mapping[str, object]) -> list[str]:
    """A line of the paper table as text, under PAPER_HEADINGS."""
    rate, budget, p = line["learning_rate"], line["budget"], line["forget_p_holm"]
    return [
        name_of(line),
        "" if rate is None else f"{rate:g}",
        "" if budget is None else f"{budget:g}",
        str(line["num_runs"]),
        *(_spread(line, measure) for measure in MEASURES),
        f"{p:.3f}" if isinstance(p, float) else "-",
    ]


def _spread(line: Mapping[str, object], measure: str) -> str:
    value, spread = line[measure], line[f"{measure}_spread"]
    if not isinstance(value, float):
        return "-"
    return f"{value:+.2f}" + (f" ± {spread:.2f}" if isinstance(spread, float) else "")


def paper_caption(lines: Sequence[Mapping[str, object]]) -> str:
    """What the numbers of a paper table are."""
    several = any("," in str(line["draws"]) for line in lines)
    spread = "of the draws' differences" if several else "over n runs (as in the paper)"
    return (
        f"reference - run in points, mean ± standard deviation {spread}; MIA: efficacy of the "
        f"published SVC on confidence; {conditional_on(lines)}"
    )


def ablation_grid(group: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """A forget set's part of the ablation table as headings and rows: localization by budget, tug-of-war ± error.

    An arm whose settings were chosen is one row, in which each number has what was chosen for it in brackets.
    """
    budgets = sorted(group["budget"].unique().to_list(), key=lambda budget: (budget is None, budget))
    headings = ["arm", "strategy", "granularity", "method", "rate"]
    headings += ["own" if budget is None else f"{budget:g}" for budget in budgets]
    rows = []
    named = ("arm", *LINE, "strategy", "granularity", "method")
    for _, part in group.group_by(named, maintain_order=True):
        found = {line["budget"]: line for line in part.iter_rows(named=True)}
        first = part.row(0, named=True)
        label = name_of({"arm": first["arm"], "is_tuned": first["is_tuned"], "variant": first["line_variant"]})
        given = [str(first[name]) for name in ("strategy", "granularity", "method")]
        rate = "" if first["line_rate"] is None else f"{first['line_rate']:g}"
        rate = "chosen" if first["is_tuned"] and first["learning_rate"] is not None and not rate else rate
        rows.append([label, *given, rate, *(_tug(found.get(budget)) for budget in budgets)])
    return headings, rows


def _tug(line: Mapping[str, object] | None) -> str:
    if line is None or not isinstance(line["tug_of_war"], float):
        return ""
    error = line["standard_error"]
    text = f"{line['tug_of_war']:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")
    if line["budget"] is None:
        text += f" (at {line['realised_budget']:.2f})"
    return f"{text} [{_chosen(line)}]" if line["is_tuned"] and _chosen(line) else text


def _chosen(line: Mapping[str, object]) -> str:
    """What was chosen for one number of a line."""
    fixed = str(line["line_variant"] or "").split(", ")
    options = [part for part in str(line["variant"] or "").split(", ") if part not in fixed]
    rate = [] if line["learning_rate"] == line["line_rate"] else [f"{line['learning_rate']:g}"]
    return ", ".join([*rate, *options])


def render(frame: pl.DataFrame) -> list[Table]:
    """The paper table for the terminal, one part per forget set."""
    shown = []
    for (name,), group in frame.group_by("forget_set", maintain_order=True):
        lines = group.to_dicts()
        shown.append(_table(f"\n{name}: {paper_caption(lines)}", PAPER_HEADINGS, map(paper_cells, lines)))
    return shown


def render_ablation(frame: pl.DataFrame) -> list[Table]:
    """The ablation table for the terminal, one part per forget set."""
    shown = []
    for (name,), group in frame.group_by("forget_set", maintain_order=True):
        headings, rows = ablation_grid(group)
        shorter = [place for place, name in enumerate(headings) if name not in ("strategy", "granularity", "method")]
        headings, rows = [headings[i] for i in shorter], [[row[i] for i in shorter] for row in rows]
        floor, lines = group["floor"][0], group.to_dicts()
        title = (
            f"\n{name}: tug-of-war ± standard error over the seeds of {counted(group['num_runs'].to_list())} runs and "
        )
        title += f"of {references_said(lines)}, by budget"
        title += "; in brackets what was chosen on tuning runs (*)" if group["is_tuned"].any() else ""
        title += f"; references against one another {floor:.3f}" if floor is not None else ""
        shown.append(_table(f"{title}; {conditional_on(lines)}", headings, rows))
    return shown


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), box=None)
    for name in headings:
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
