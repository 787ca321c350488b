"""DEL held against its control and against the short retraining, run by run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import polars as pl
from scipy import stats

from analysis.load import Tables
from analysis.tables import KEYS, Values, holm, of_sweep, references_of

PAIRED: Mapping[str, pl.DataType] = {
    **{name: kind for name, kind in KEYS.items() if name != "arm"},
    "against": pl.String(),
    "against_variant": pl.String(),
    "against_rate": pl.Float64(),
    "num_pairs": pl.Int64(),
    **{name: pl.Float64() for name in ("difference", "low", "high", "p", "p_holm")},
    **dict.fromkeys(("is_tuned", "against_is_tuned"), pl.Boolean()),
}


def paired_table(tables: Tables, sweep: str) -> pl.DataFrame:
    """DEL against its control and against the short retraining, in tug-of-war, paired on original seed and forget draw.

    One line per forget set, learning rate and budget of `del` and per rival: `random_within_tensor` at the same rate
    and budget (where both were tuned: at the same budget, each at the rate chosen for it), `retrain_short` at each of
    its rates. Positive: DEL is closer to the references. t-interval over pairs; `p` two-sided, `p_holm` adjusted within
    the table. A single pair has no interval; without spread there is no p.
    """
    runs, values = of_sweep(tables, sweep), Values(tables)
    references = references_of(runs)
    measured: dict[tuple[object, ...], dict[tuple[object, ...], list[float]]] = {}
    named = ("forget_set", "arm", "variant", "learning_rate", "budget")
    for name, group in (
        runs.filter(pl.col("arm") != "reference")
        .with_columns(pair=pl.coalesce("original_seed", "seed"))
        .group_by(*named, "pair", "forget_draw", maintain_order=True)
    ):
        against = references.get((str(name[0]), name[-1]), [])
        if found := values.pairs(group["key"].to_list(), against, "tug_of_war", "all"):
            measured.setdefault(name[:5], {})[name[5:]] = found
    tuned = set(runs.filter(pl.col("is_tuned")).select(named).rows())
    lines = []
    for (forget_set, arm, variant, rate, budget), ours in measured.items():
        for rival, theirs in measured.items():
            is_alike = rival[2:] == (variant, rate, budget)
            are_tuned = [each in tuned for each in ((forget_set, arm, variant, rate, budget), rival)]
            is_alike |= rival[4] == budget and all(are_tuned)
            control = rival[1] == "random_within_tensor" and is_alike
            shared = [pair for pair in ours if pair in theirs]
            if arm != "del" or rival[0] != forget_set or not (control or rival[1] == "retrain_short") or not shared:
                continue
            setting = (forget_set, variant, rate, budget, *rival[1:4])
            pairs = np.array([np.mean(ours[pair]) - np.mean(theirs[pair]) for pair in shared])
            marks = dict(zip(("is_tuned", "against_is_tuned"), are_tuned, strict=True))
            lines.append(dict(zip(list(PAIRED)[:7], setting, strict=True)) | marks | _paired_line(pairs))
    frame = pl.DataFrame(lines, schema={name: kind for name, kind in PAIRED.items() if name != "p_holm"})
    adjusted = iter(holm(frame["p"].drop_nulls().to_list()))
    p_holm = [None if p is None else next(adjusted) for p in frame["p"].to_list()]
    return frame.with_columns(pl.Series("p_holm", p_holm, dtype=pl.Float64))


def _paired_line(pairs: np.ndarray) -> dict[str, float | None]:
    line: dict[str, float | None] = {"num_pairs": len(pairs), "difference": float(pairs.mean())}
    if len(pairs) < 2:
        return line | {"low": None, "high": None, "p": None}
    mean, standard_error = float(pairs.mean()), float(pairs.std(ddof=1) / math.sqrt(len(pairs)))
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * standard_error
    spread = standard_error > 1e-12  # equal differences leave rounding, which is no evidence
    p = 2 * float(stats.t.sf(abs(mean) / standard_error, len(pairs) - 1)) if spread else None
    return line | {"low": mean - half, "high": mean + half, "p": p}
