"""Exact scores beside subset estimates: two quantities that need not agree in value, and may in rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from rich.table import Table

from analysis.load import Tables
from analysis.proxies import correlation_with
from analysis.tables import GATE

_FEWEST = 5  # examples that a rank correlation can say something of
_SIDES = ("score", "low", "high")


@dataclass(frozen=True)
class Comparison:
    """Exact scores of some examples, highest first, and subset estimates of the same ones, where there are any.

    lines: index, label, true_label, score, low, high, and subset_score, subset_low, subset_high. trained: on how many
    examples a subset model was trained, of how many. correlation: Spearman's with a 95 % bootstrap interval over the
    examples; None without subset estimates, for fewer than five examples, and where one side is constant.
    """

    exact_key: str
    estimator: str
    selection: str
    seeds: int
    accuracy: float
    test_accuracy: float
    seconds: float
    lines: list[dict[str, Any]]
    scores_key: str | None = None
    fraction: float | None = None
    correlation: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def title(self) -> str:
        """What is compared, in one line."""
        against = "" if self.scores_key is None else f" and subset scores {self.scores_key[:8]}"
        return f"Exact scores {self.exact_key[:8]}{against}, of {_OF[self.estimator]}"


_OF = {"correctness": "0/1 correctness", "probability": "the given label's probability"}


def compare(tables: Tables, exact_key: str, estimator: str, scores_key: str | None = None) -> Comparison:
    """Exact scores, beside the subset scores named."""
    of_key = (pl.col("exact_key") == exact_key) & (pl.col("estimator") == estimator)
    found = tables.exact.filter(of_key).sort("score", "index", descending=[True, False])
    first = found.row(0, named=True)
    made: dict[str, Any] = {
        "exact_key": exact_key,
        "estimator": estimator,
        "selection": first["selection"],
        "seeds": first["num_in"],
        "accuracy": first["accuracy"],
        "test_accuracy": first["test_accuracy"],
        "seconds": first["model_seconds"],
    }
    found = found.select("index", "label", "true_label", *_SIDES)
    if scores_key is None:
        return Comparison(lines=found.to_dicts(), **made)
    subset = tables.memorization.filter(pl.col("scores_key") == scores_key)
    renamed = subset.select("index", *(pl.col(name).alias(f"subset_{name}") for name in _SIDES))
    joined = found.join(renamed, on="index", maintain_order="left")
    if len(joined) >= _FEWEST:
        sides = joined["subset_score"].to_numpy(), joined["score"].to_numpy()
        made |= dict(zip(("correlation", "low", "high"), correlation_with(*sides), strict=True))
    models = subset.row(0, named=True)
    fraction = models["num_in"] / (models["num_in"] + models["num_out"])
    return Comparison(lines=joined.to_dicts(), scores_key=scores_key, fraction=fraction, **made)


def comparisons(tables: Tables) -> Iterator[Comparison]:
    """Every set of exact scores with the subset scores of its setting and estimator; of correctness where none are.

    Of the same examples asked for with several numbers of seeds, the most.
    """
    largest: dict[tuple[str, tuple[int, ...]], tuple[int, str]] = {}
    for (name,), group in tables.exact.group_by("exact_key", maintain_order=True):
        examples = str(group["setting"][0]), tuple(group["index"].unique().sort().to_list())
        largest[examples] = max(largest.get(examples, (0, "")), (int(group["num_in"][0]), str(name)))
    for (setting, _), (_, name) in largest.items():
        campaigns = tables.campaigns.filter(pl.col("setting") == setting)
        for campaign in campaigns.iter_rows(named=True):
            yield compare(tables, name, campaign["estimator"], campaign["scores_key"])
        if not len(campaigns):
            yield compare(tables, name, "correctness")


def remarks(part: Comparison) -> list[str]:
    """What is to be said of a comparison, in sentences."""
    number = len(part.lines)
    chosen = "" if part.selection == "given" else f" chosen by {part.selection}"
    said = [
        f"{_counted(number, 'example')}{chosen}: {part.seeds} models trained with all examples, and {part.seeds} "
        f"without each one; {part.seconds:.0f} s of training, accuracy {part.accuracy:.4f} on what they were trained "
        f"on and {part.test_accuracy:.3f} on test."
    ]
    if part.accuracy < GATE:
        said.append(f"These models do not fit what they were trained on (gate: {GATE}): they understate memorization.")
    if part.scores_key is None or part.fraction is None:
        return said
    if part.correlation is None:
        reason = "one side has a single value" if number >= _FEWEST else f"there are fewer than {_FEWEST} examples"
        said.append(f"No rank correlation exists: {reason}.")
    else:
        interval = "no interval: too few of the examples differ"
        if part.low is not None and part.high is not None:
            interval = f"{part.low:+.2f} to {part.high:+.2f}, 95 % bootstrap interval"
        said.append(
            f"Rank correlation {part.correlation:+.2f} ({interval}, over the {number} examples)"
            f"{_of_whom(part.selection)}; noise on both sides lowers it."
        )
    said.append(
        "The two are different quantities: an exact score is what an example adds where all others are there, a subset "
        f"estimate what it adds to random {part.fraction:.0%} of them. Rank order is what may agree, values need not."
    )
    return said


def _of_whom(selection: str) -> str:
    if selection.startswith("spread:"):
        return "; they stand for the whole training set"
    return "; they were not drawn evenly from the training set"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def headings(part: Comparison) -> list[str]:
    """Headings of the table."""
    plain = ["example", "label", "true label", "exact", "95 % interval"]
    return plain if part.scores_key is None else [*plain, "subset estimate", "95 % interval"]


def cells(line: Mapping[str, Any]) -> list[str]:
    """A line of the table as text, under `headings`."""
    found = [str(line["index"]), str(line["label"]), str(line["true_label"])]
    for side in ("", "subset_"):
        if f"{side}score" in line:
            score, low, high = (line[f"{side}{name}"] for name in _SIDES)
            found += [f"{score:+.3f}", f"{low:+.3f} to {high:+.3f}"]
    return found


def render(part: Comparison) -> Table:
    """The table for the terminal."""
    table = Table(title=f"\n{part.title}", title_justify="left", title_style="bold", padding=(0, 1, 0, 0), box=None)
    for heading in headings(part):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in part.lines:
        table.add_row(*cells(line))
    return table


def figure(part: Comparison) -> Figure:
    """Exact scores over subset estimates, each with its 95 % interval; flipped labels in orange."""
    made = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = made.subplots()
    axes.plot([0, 1], [0, 1], color="0.75", linewidth=0.8, label="equal values")
    for flipped, colour, label in ((False, "#0072B2", "given label is the true one"), (True, "#D55E00", "was flipped")):
        lines = [line for line in part.lines if (line["label"] != line["true_label"]) == flipped]
        if not lines:
            continue
        x, y = (np.array([[line[f"{side}{n}"] for n in _SIDES] for line in lines]).T for side in ("subset_", ""))
        axes.errorbar(
            *(x[0], y[0]),
            xerr=np.maximum(0, [x[0] - x[1], x[2] - x[0]]),
            yerr=np.maximum(0, [y[0] - y[1], y[2] - y[0]]),
            fmt="o",
            markersize=4,
            color=colour,
            alpha=0.7,
            elinewidth=0.7,
            label=f"{label} (n = {len(lines)})",
        )
    share = "" if part.fraction is None else f" (trained on {part.fraction:.0%})"
    axes.set_xlabel(f"subset estimate{share}")
    axes.set_ylabel(f"exact: all against all but one, {part.seeds} models a side")
    made.legend(loc="outside upper center", fontsize=8, ncols=3)
    return made
