"""How well cheap stand-ins rank examples as memorization scores do, beside what the scores' own noise allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from rich.table import Table
from scipy import stats

from analysis.load import Tables

COLUMNS: Mapping[str, pl.DataType] = {
    "scores_key": pl.String(),
    "models": pl.Int64(),
    "estimator": pl.String(),
    "proxies_key": pl.String(),
    "proxy": pl.String(),
    "correlation": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "ceiling": pl.Float64(),
    "seconds": pl.Float64(),
    "cost": pl.Float64(),
}
_CAMPAIGN = ("scores_key", "models", "estimator")
RESAMPLES = 1000
HEADINGS = ("proxy", "rank correlation", "95 % interval", "ceiling", "seconds", "share of the campaign")


def proxy_table(tables: Tables) -> pl.DataFrame:
    """One line per campaign and proxy of the same setting (data, model, training), columns as in COLUMNS; best first.

    A proxy of several originals has its key behind its name.

    correlation: Spearman's, with a 95 % bootstrap interval over examples (null where one side is constant). ceiling:
    what unreliable scores allow at most (null without halves). seconds: the training run and what the proxy needs
    beside it; cost: over the seconds of all subset models.
    """
    lines = []
    for campaign in tables.campaigns.drop_nulls("setting").iter_rows(named=True):
        of_campaign = pl.col("scores_key") == campaign["scores_key"]
        scores = tables.memorization.filter(of_campaign).sort("index")["score"].to_numpy()
        found = tables.proxies.filter(pl.col("setting") == campaign["setting"])
        several = found.group_by("proxy").agg(pl.col("proxies_key").n_unique() > 1)
        repeated = set(several.filter(pl.col("proxies_key"))["proxy"].to_list())
        for (name, proxy), group in found.group_by("proxies_key", "proxy", maintain_order=True):
            label = f"{proxy} ({str(name)[:8]})" if proxy in repeated else proxy
            values = group.sort("index")["value"].to_numpy()
            seconds = float(group["seconds"][0] + group["training_seconds"][0])
            line = dict(zip(("correlation", "low", "high"), correlation_with(values, scores), strict=True))
            lines.append(
                {**{column: campaign[column] for column in _CAMPAIGN}, "proxies_key": name, "proxy": label, **line}
                | {"ceiling": ceiling(campaign["split_half"]), "seconds": seconds}
                | {"cost": seconds / campaign["model_seconds"]}
            )
    frame = pl.DataFrame(lines, schema=dict(COLUMNS))
    return frame.sort("scores_key", "correlation", descending=[False, True], nulls_last=True, maintain_order=True)


def correlation_with(
    values: np.ndarray, scores: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float | None, float | None, float | None]:
    """Spearman's rank correlation and the ends of its 95 % bootstrap interval over examples; None where constant.

    No interval either where more than one resample in twenty is constant: few of the examples differ.
    """

    def spearman(rows: np.ndarray | slice) -> float:
        ranks = [stats.rankdata(side[rows]) for side in (values, scores)]
        return float("nan") if any(np.ptp(rank) == 0 for rank in ranks) else float(np.corrcoef(*ranks)[0, 1])

    value = spearman(slice(None))
    if np.isnan(value):
        return None, None, None
    rng = np.random.default_rng(0)
    drawn = [spearman(rng.integers(len(scores), size=len(scores))) for _ in range(resamples)]
    if np.isnan(drawn).mean() > 0.05:
        return value, None, None
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return value, float(low), float(high)


def ceiling(split_half: float | None) -> float | None:
    """The highest correlation that noisy scores allow: the root of their reliability (Spearman-Brown of the halves)."""
    if split_half is None:
        return None
    return float(np.sqrt(max(0.0, 2 * split_half / (1 + split_half)))) if split_half > -1 else 0.0


def cells(line: Mapping[str, object]) -> list[str]:
    """A line of the table as text, under HEADINGS."""
    return [
        str(line["proxy"]),
        _number(line["correlation"], "{:+.3f}"),
        "-" if line["low"] is None else f"{line['low']:+.3f} to {line['high']:+.3f}",
        _number(line["ceiling"], "{:.3f}"),
        _number(line["seconds"], "{:.1f}"),
        _number(line["cost"], "{:.2%}"),
    ]


def _number(value: object, form: str) -> str:
    return "-" if value is None else form.format(value)


def render(frame: pl.DataFrame) -> list[Table]:
    """The table for the terminal, one part per campaign."""
    shown = []
    for (scores, models, estimator), group in frame.group_by(*_CAMPAIGN, maintain_order=True):
        title = f"\nproxies against the scores {str(scores)[:8]}: {models} models, of {estimator}"
        table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), box=None)
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "proxy" else "right", no_wrap=True)
        for line in group.iter_rows(named=True):
            table.add_row(*cells(line))
        shown.append(table)
    return shown


def figure(lines: Sequence[Mapping[str, object]]) -> Figure:
    """Rank correlation of each proxy with one campaign's scores, with its interval, and the ceiling as a line."""
    known = [line for line in lines if line["correlation"] is not None]
    made = Figure(figsize=(6.6, 0.36 * len(known) + 1.3), layout="constrained")
    axes = made.subplots()
    places = np.arange(len(known))[::-1]
    values, low, high = (np.array([line[name] for line in known], float) for name in ("correlation", "low", "high"))
    axes.errorbar(values, places, xerr=np.stack([values - low, high - values]), fmt="o", color="#0072B2", capsize=2)
    axes.set_yticks(places, [str(line["proxy"]) for line in known])
    axes.axvline(0, color="0.6", linewidth=0.8)
    top = known[0]["ceiling"] if known else None
    if isinstance(top, float):
        axes.axvline(top, color="#D55E00", linestyle="--", label="ceiling: what the scores' own noise allows")
        made.legend(loc="outside upper right", fontsize=8)
    axes.set_xlim(min(-0.1, float(low.min()) - 0.05) if len(known) else -0.1, 1.02)
    axes.set_ylim(-0.6, len(known) - 0.4)
    axes.set_xlabel("rank correlation with the scores, 95 % bootstrap interval")
    return made
