"""Figures of the report. Colours from the Okabe-Ito palette; every figure says its n."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from analysis.load import Tables
from analysis.tables import Values, comparison_table, of_sweep

mpl.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.dpi": 130,
    }
)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def score_distribution(tables: Tables, scores_key: str) -> Figure:
    """Histogram of the memorization scores (log counts), flipped labels apart."""
    scores = tables.memorization.filter(pl.col("scores_key") == scores_key)
    flipped = scores["label"] != scores["true_label"]
    parts = [(scores.filter(~flipped), "given label is the true one", _COLOURS[0])]
    if flipped.any():
        parts.append((scores.filter(flipped), "label was flipped", _COLOURS[1]))
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    lowest = float(scores["score"].to_numpy().min())
    bins = np.linspace(min(-0.1, lowest), 1.0, 45).tolist()
    counts = [part["score"].to_numpy() for part, _, _ in parts]
    labels = [f"{label} (n = {len(part)})" for part, label, _ in parts]
    axes.hist(counts, bins=bins, stacked=True, label=labels, color=[colour for _, _, colour in parts])
    axes.set_yscale("log")
    models = scores["num_in"][0] + scores["num_out"][0]
    axes.set_xlabel(f"memorization score (in-accuracy minus out-accuracy, {models} subset models)")
    axes.set_ylabel("training examples")
    axes.legend()
    return figure


def gallery(tables: Tables, scores_key: str) -> Figure:
    """The most memorized training images with given label, true label, score and standard error."""
    scores = tables.memorization.filter(pl.col("scores_key") == scores_key)
    shown = (
        tables.examples.filter(pl.col("scores_key") == scores_key)
        .join(scores, on=["scores_key", "index"])
        .sort("score", "index", descending=[True, False])
    )
    rows = max(1, -(-len(shown) // 5))
    figure = Figure(figsize=(7.5, 1.75 * rows), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, 5)).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, line in zip(grid, shown.iter_rows(named=True), strict=False):
        with Image.open(io.BytesIO(line["png"])) as image:
            axes.imshow(np.asarray(image), cmap="gray_r" if image.mode == "L" else None, interpolation="nearest")
        given, true = line["label_name"], line["true_label_name"]
        flipped = line["label"] != line["true_label"]
        axes.set_title(
            f"given {given}, true {true}\n{line['score']:.2f} ± {line['standard_error']:.2f}",
            fontsize=8,
            color=_COLOURS[1] if flipped else "black",
        )
    return figure


def forget_quality(tables: Tables, sweep: str) -> Figure:
    """Forget accuracy against the references' (points, 95 % intervals) and tug-of-war, by budget, for each forget set.

    Shaded: where a new reference would fall with 95 % probability. Methods without a mask stand at the right.
    """
    frame = comparison_table(tables, sweep)
    forget_sets = frame["forget_set"].unique(maintain_order=True).to_list()
    arms = frame["arm"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(3.7 * len(forget_sets) + 1.2, 6.6), layout="constrained")
    grid = figure.subplots(2, len(forget_sets), squeeze=False, sharex=True)
    for column, forget_set in enumerate(forget_sets):
        part = frame.filter(pl.col("forget_set") == forget_set)
        half = _reference_band(tables, sweep, forget_set)
        grid[0, column].set_title(
            f"{forget_set} (n = {part['num_runs'][0]} runs, {part['num_references'][0]} references)"
        )
        grid[0, column].axhspan(-half, half, color="0.85", zorder=0, label="a new reference, 95 %")
        grid[0, column].axhline(0, color="0.4", linewidth=0.8)
        if part["tug_of_war_floor"][0] is not None:
            grid[1, column].axhline(
                part["tug_of_war_floor"][0], color="0.4", linewidth=0.8, label="references themselves"
            )
        for row, value in enumerate(("forget_difference", "tug_of_war")):
            _curves(grid[row, column], part, arms, value)
        grid[1, column].set_xlabel("budget (share of entries reset)")
        low, high = grid[0, column].get_ylim()
        grid[0, column].set_ylim(max(low, -105), min(high, 105))  # intervals of three seeds can leave what is possible
    grid[0, 0].set_ylabel("reference - run, forget accuracy (points)")
    grid[1, 0].set_ylabel("tug-of-war (1 is best)")
    handles = {
        label: handle for axes in grid.ravel() for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _reference_band(tables: Tables, sweep: str, forget_set: str) -> float:
    """Half-width, in points, of the 95 % prediction interval for one more reference's forget accuracy."""
    runs = of_sweep(tables, sweep).filter((pl.col("arm") == "reference") & (pl.col("forget_set") == forget_set))
    found = [100 * value for value in Values(tables).metric(runs["key"].to_list(), "accuracy", "forget")]
    if len(found) < 2:
        return 0.0
    spread = np.std(found, ddof=1) * np.sqrt(1 + 1 / len(found))
    return float(stats.t.ppf(0.975, len(found) - 1) * spread)


def _curves(axes: Axes, part: pl.DataFrame, arms: Sequence[str], value: str) -> None:
    budgets = sorted(part["budget"].drop_nulls().unique().to_list())
    places = {budget: place for place, budget in enumerate(budgets)}
    aside = len(budgets)
    for number, arm in enumerate(arms):
        mine = part.filter(pl.col("arm") == arm)
        rates = mine["learning_rate"].unique(maintain_order=True).to_list()
        for index, rate in enumerate(rates):
            lines = mine.filter(pl.col("learning_rate").eq_missing(pl.lit(rate))).sort("budget").to_dicts()
            lines = [line for line in lines if line[value] is not None]
            masked = bool(lines) and lines[0]["budget"] is not None
            offset = 0.06 * (number - len(arms) / 2) + 0.02 * index
            xs = [(places[line["budget"]] if masked else aside + 0.6) + offset for line in lines]
            label = arm if rate is None else f"{arm}, rate {rate:g}"
            errors = None
            if value == "forget_difference" and all(line["forget_low"] is not None for line in lines):
                errors = [(line["forget_high"] - line["forget_low"]) / 2 for line in lines]
            axes.errorbar(
                xs,
                [line[value] for line in lines],
                errors,
                color=_COLOURS[number % len(_COLOURS)],
                label=label,
                linestyle=_LINES[index % 4] if masked else "none",
                marker=_MARKERS[index % 4],
                markersize=3.5,
                linewidth=1.2,
                elinewidth=0.6,
                capsize=1.5,
            )
    ticks = [*places.values(), *([aside + 0.6] if part["budget"].null_count() else [])]
    axes.set_xticks(ticks, [*(f"{b:g}" for b in budgets), *(["no mask"] if part["budget"].null_count() else [])])


def layer_shares(tables: Tables, sweep: str) -> Figure:
    """Share of each layer's entries that the masks reset, per arm and budget (mean over forget sets and seeds)."""
    runs = of_sweep(tables, sweep).filter(pl.col("budget").is_not_null())
    layers = tables.layers.join(runs.select("key", "arm", "budget", "forget_set"), on="key", maintain_order="left")
    arms = runs["arm"].unique(maintain_order=True).to_list()
    names = tables.layers["parameter"].unique(maintain_order=True).to_list()
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    budgets = sorted(runs["budget"].unique().to_list())
    shares: defaultdict[tuple[str, float, str], list[float]] = defaultdict(list)
    grouped = layers.with_columns(module=pl.col("parameter").str.replace(r"\.[^.]*$", ""))
    for (arm, budget, module), part in grouped.group_by("arm", "budget", "module"):
        shares[str(arm), float(str(budget)), str(module)].append(
            float(part["reset"].sum()) / float(part["entries"].sum())
        )
    figure = Figure(figsize=(2.9 * len(arms) + 1.5, 0.36 * len(modules) + 1.6), layout="constrained")
    grid = figure.subplots(1, max(1, len(arms)), squeeze=False, sharey=True)[0]
    sizes = {
        str(module): part["entries"].sum() // part["key"].n_unique() for (module,), part in grouped.group_by("module")
    }
    for axes, arm in zip(grid, arms, strict=False):
        values = np.array([[np.mean(shares.get((arm, b, m), [np.nan])) for b in budgets] for m in modules])
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, column in np.ndindex(*values.shape):
            if np.isfinite(values[row, column]):
                colour = "white" if values[row, column] < 0.6 else "black"
                axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_title(arm)
        axes.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
        axes.set_xlabel("budget")
        axes.grid(visible=False)
    grid[0].set_yticks(range(len(modules)), [f"{module} ({sizes.get(module, 0):,} entries)" for module in modules])
    if arms:
        figure.colorbar(image, ax=list(grid), label="share of the layer reset", shrink=0.9)
    return figure
