"""Influence of training on test examples: what was found, in words, as a table and as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from analysis.load import Tables

_SHOWN = 25
HEADINGS = ("train", "label", "test", "label", "influence", "95 % interval", "memorization")


def sections(tables: Tables) -> list[dict[str, Any]]:
    """What the report says of each estimate: its numbers, its strongest pairs under `HEADINGS`, and their pictures."""
    return [
        {
            "said": line,
            "jaccard": _jaccard(line),
            "columns": HEADINGS,
            "lines": [_cells(pair) for pair in _strongest(tables, line["influence_key"], _SHOWN)],
            "gallery": gallery(tables, line["influence_key"]) if line["num_pairs"] else None,
        }
        for line in tables.influence.sort("scores_key", "threshold").to_dicts()
    ]


def _jaccard(line: Mapping[str, Any]) -> float | None:
    """Pairs that both halves find over those that either does."""
    if line["both_halves"] is None:
        return None
    union = line["first_half"] + line["second_half"] - line["both_halves"]
    return line["both_halves"] / union if union else None


def _strongest(tables: Tables, influence_key: str, count: int) -> list[dict[str, Any]]:
    pairs = tables.influence_pairs.filter(pl.col("influence_key") == influence_key)
    return pairs.sort("influence", "train_index", "test_index", descending=[True, False, False]).head(count).to_dicts()


def _cells(pair: Mapping[str, Any]) -> list[str]:
    return [
        str(pair["train_index"]),
        str(pair["train_label"]),
        str(pair["test_index"]),
        str(pair["test_label"]),
        f"{pair['influence']:.3f} ± {pair['standard_error']:.3f}",
        f"{pair['low']:.2f} to {pair['high']:.2f}",
        f"{pair['memorization']:.2f}",
    ]


def gallery(tables: Tables, influence_key: str) -> Figure:
    """The pairs with the strongest influence whose images were kept: training image at the left, test image beside."""
    kept = tables.influence_examples.filter(pl.col("influence_key") == influence_key).to_dicts()
    images = {(line["split"], line["index"]): line for line in kept}
    pairs = [
        pair
        for pair in _strongest(tables, influence_key, len(kept))
        if ("train", pair["train_index"]) in images and ("test", pair["test_index"]) in images
    ][:12]
    rows = max(1, -(-len(pairs) // 3))
    figure = Figure(figsize=(8.4, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, 6, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for place, pair in enumerate(pairs):
        left, right = grid[place // 3, 2 * (place % 3) :][:2]
        train, test = images["train", pair["train_index"]], images["test", pair["test_index"]]
        _show(left, train, f"train {pair['train_index']}: {train['label_name']}\nmemorized {pair['memorization']:.2f}")
        _show(
            right,
            test,
            f"test {pair['test_index']}: {test['label_name']}\n+{pair['influence']:.2f} ± {pair['standard_error']:.2f}",
        )
    return figure


def _show(axes: Axes, line: Mapping[str, Any], title: str) -> None:
    with Image.open(io.BytesIO(line["png"])) as image:
        axes.imshow(np.asarray(image), cmap="gray_r" if image.mode == "L" else None, interpolation="nearest")
    axes.set_title(title, fontsize=7)
