"""Figures of the report. Colours from the Okabe-Ito palette; every figure says its n."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import product
from typing import Literal

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from analysis.load import Tables
from analysis.names import name_of
from analysis.tables import comparison_table, counted, of_sweep, references_said

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
    """Histogram of the memorization scores of a scores key."""
    kinds = tables.campaigns.filter(pl.col("scores_key") == scores_key)["estimator"].to_list()
    return histogram(tables.memorization.filter(pl.col("scores_key") == scores_key), "".join(kinds))


def histogram(scores: pl.DataFrame, estimator: str) -> Figure:
    """Histogram of memorization scores, flipped labels beside the others: stacks would mislead on log counts."""
    flipped = scores["label"] != scores["true_label"]
    parts = [(scores.filter(~flipped), "given label is the true one", _COLOURS[0])]
    if flipped.any():
        parts.append((scores.filter(flipped), "label was flipped", _COLOURS[1]))
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    lowest = float(scores["score"].to_numpy().min())
    bins = np.linspace(min(-0.1, lowest), 1.0, 34).tolist()
    counts = [part["score"].to_numpy() for part, _, _ in parts]
    labels = [f"{label} (n = {len(part)})" for part, label, _ in parts]
    axes.hist(counts, bins=bins, label=labels, color=[colour for _, _, colour in parts])
    axes.set_yscale("log")
    models = scores["num_in"][0] + scores["num_out"][0]
    of = "probability of the label" if estimator == "probability" else "accuracy"
    axes.set_xlabel(f"memorization score ({of}: inside minus outside; {models} subset models)")
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
    figure = Figure(figsize=(6.6, 1.5 * rows), layout="constrained")
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


_MASKS_ABREAST = 6
_CURVE = ("line_variant", "line_rate")


def forget_quality(tables: Tables, sweep: str) -> Figure:
    """Forget accuracy against the references' (points, 95 % intervals) and tug-of-war, by budget, for each forget set.

    Shaded: where a new reference would fall with 95 % probability. Methods without a mask stand at the right.
    """
    frame = comparison_table(tables, sweep)
    panels = list(frame.group_by("forget_set", maintain_order=True))
    arms = frame["arm"].unique(maintain_order=True).to_list()
    settings = frame.select("arm", *_CURVE).n_unique()
    width = 3.9 * max(1, len(panels)) + 1.0
    legend_columns = max(1, int(width / 2.7))
    figure = Figure(figsize=(width, 5.8 + 0.18 * (settings / legend_columns + 2)), layout="constrained")
    grid = figure.subplots(2, max(1, len(panels)), squeeze=False, sharex=True)
    budgets = sorted(frame["budget"].drop_nulls().unique().to_list())
    for column, ((forget_set,), part) in enumerate(panels):
        lines = part.to_dicts()
        upper, lower = grid[:, column]
        upper.set_title(
            f"{forget_set}, draw {max(part['draws'].to_list(), key=len)}\n"
            f"{counted(part['num_runs'].to_list())} runs a point, {references_said(lines)}"
        )
        if (half := part["reference_band"][0]) is not None:
            upper.axhspan(-half, half, color="0.87", zorder=0, label="a new reference, 95 %")
        upper.axhline(0, color="0.4", linewidth=0.8)
        if (floor := part["tug_of_war_floor"][0]) is not None:
            lower.axhline(floor, color="0.4", linewidth=0.8, label="references themselves")
        for axes, value in ((upper, "forget_difference"), (lower, "tug_of_war")):
            _curves(axes, part, arms, budgets, value)
        lower.set_xlabel("budget (share of entries in the mask)")
        low, high = upper.get_ylim()
        upper.set_ylim(max(low, -105), min(high, 105))  # intervals of three seeds can leave what is possible
    grid[0, 0].set_ylabel("reference - run, forget accuracy (points)")
    grid[1, 0].set_ylabel("tug-of-war (1 is best)")
    handles = {
        label: handle for axes in grid.ravel() for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=legend_columns, fontsize=8)
    return figure


def _curves(axes: Axes, part: pl.DataFrame, arms: Sequence[str], budgets: Sequence[float], value: str) -> None:
    places = {budget: float(place) for place, budget in enumerate(budgets)}
    series = [
        (str(arm), list(group.drop_nulls(value).sort("budget").iter_rows(named=True)))
        for (arm, _, _), group in part.group_by("arm", *_CURVE, maintain_order=True)
    ]
    apart = [lines for _, lines in series if lines and lines[0]["budget"] is None]
    middle, width = len(budgets) + 0.5, 1.4
    seen: dict[str, int] = {}
    for arm, lines in series:
        index = seen[arm] = seen.get(arm, -1) + 1
        if not lines:
            continue
        number, masked = arms.index(arm), lines[0]["budget"] is not None
        if masked:
            step = min(0.05, 0.5 / len(arms))
            xs = [places[line["budget"]] + step * (number - len(arms) / 2) + 0.02 * index for line in lines]
        else:  # side by side, so that no interval hides another
            xs = [middle + width * ((apart.index(lines) + 0.5) / len(apart) - 0.5)] * len(lines)
        with_errors = value == "forget_difference" and all(line["forget_low"] is not None for line in lines)
        name, rate = name_of(lines[0] | {"variant": lines[0]["line_variant"]}), lines[0]["line_rate"]
        axes.errorbar(
            xs,
            [line[value] for line in lines],
            [(line["forget_high"] - line["forget_low"]) / 2 for line in lines] if with_errors else None,
            color=_COLOURS[number % len(_COLOURS)],
            label=name + ("" if rate is None else f", rate {rate:g}"),
            linestyle=_LINES[index % 4] if masked else "none",
            marker=_MARKERS[(index + number // len(_COLOURS)) % 4],  # colours come again after eight arms
            markersize=4,
            linewidth=1.2,
            elinewidth=0.7,
            capsize=1.5,
        )
    ticks, names = list(places.values()), [f"{budget:g}" for budget in budgets]
    axes.set_xticks([*ticks, *([middle] if apart else [])], [*names, *(["no budget asked"] if apart else [])])
    if apart and budgets:
        axes.axvline(middle - width / 2 - 0.15, color="0.8", linewidth=0.8)


def layer_shares(tables: Tables, sweep: str) -> Figure:
    """Share of each layer's entries in the masks, by forget set, arm and budget (mean over seeds and rates).

    An empty figure where no run has a mask.
    """
    runs = of_sweep(tables, sweep).filter(pl.col("budget").is_not_null())
    layers = tables.layers.with_columns(layer=pl.col("parameter").str.replace(r"\.[^.]*$", "")).join(
        runs.select("key", "arm", "budget", "forget_set"), on="key", maintain_order="left"
    )
    per_run = layers.group_by("key", "forget_set", "arm", "budget", "layer", maintain_order=True).agg(
        pl.col("entries").sum(), share=pl.col("reset").sum() / pl.col("entries").sum()
    )
    means = per_run.group_by("forget_set", "arm", "budget", "layer").agg(pl.col("share").mean(), pl.len())
    if not len(means):
        return Figure()
    names = per_run.group_by("layer", maintain_order=True).agg(pl.col("entries").first())
    forget_sets = runs["forget_set"].unique(maintain_order=True).to_list()
    arms = runs["arm"].unique(maintain_order=True).to_list()
    budgets = sorted(per_run["budget"].unique().to_list())
    columns = min(_MASKS_ABREAST, len(arms))
    blocks = -(-len(arms) // columns)
    rows = len(forget_sets) * blocks
    figure = Figure(figsize=(2.9 * columns + 1.8, (0.3 * len(names) + 0.7) * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    for empty in grid.ravel():
        empty.set_visible(False)
    tuned = set(runs.filter("is_tuned").select("forget_set", "arm").rows())
    shares = {line[:4]: line[4] for line in means.select("forget_set", "arm", "budget", "layer", "share").rows()}
    labels = [f"{name} ({entries:,} entries)" for name, entries in names.rows()]
    for (place, forget_set), (number, arm) in product(enumerate(forget_sets), enumerate(arms)):
        row, column = place * blocks + number // columns, number % columns
        grid[row, column].set_visible(True)
        name = name_of({"arm": arm, "is_tuned": (forget_set, arm) in tuned})
        values = np.array([[shares.get((forget_set, arm, b, n), np.nan) for b in budgets] for n in names["layer"]])
        image = _heat(grid[row, column], values)
        grid[row, column].set_title(f"{forget_set}: {name}", fontsize=9)
        grid[row, column].set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
        grid[-1, column].set_xlabel("budget")
        grid[row, 0].set_yticks(range(len(names)), labels)
    of = "all seeds and rates; *: of the chosen setting" if tuned else "all seeds and rates"
    label = f"share of the layer, mean of {counted(means['len'].to_list())} runs ({of})"
    figure.colorbar(image, ax=list(grid.ravel()), label=label, aspect=40)
    return figure


def _heat(axes: Axes, values: np.ndarray) -> AxesImage:
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, column in np.ndindex(*values.shape):
        if np.isfinite(values[row, column]):
            colour = "white" if values[row, column] < 0.6 else "black"
            axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=7)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return image
