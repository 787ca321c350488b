"""The one standard error of means that vary with several sides, such as the seeds of runs and of references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Uncertainty:
    """The standard error of an estimate and its degrees of freedom; NaN where nothing varies."""

    standard_error: float
    freedom: float


def of_means(*sides: Sequence[float] | np.ndarray) -> Uncertainty | None:
    """Return sqrt(sum of s^2 / n) over independent sides, with Satterthwaite's degrees of freedom (Welch 1947).

    sides: the values whose means are summed or subtracted. Of an estimate over crossed runs and references they are its
    value for each run, mean over references, and for each reference, mean over runs: a difference of means gives the
    same numbers and so the same error. What belongs to single pairs alone enters on both sides, which errs on the wide
    side. None where a side has fewer than two values.
    """
    if min(map(len, sides)) < 2:
        return None
    parts = [float(np.var(side, ddof=1)) / len(side) for side in sides]
    total = sum(parts)
    if total == 0:
        return Uncertainty(0.0, math.nan)
    freedom = total**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    return Uncertainty(math.sqrt(total), freedom)
