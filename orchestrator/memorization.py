"""Feldman-Zhang memorization scores: the balanced subset design and the estimator with intervals. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from orchestrator.seeds import numpy_generator

BLOCK_SIZE = 10  # models in a block

_Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


def deal(order: np.ndarray, num_held_out: int) -> np.ndarray:
    """Membership bool [10, n] of a block, from one order of the examples per sub-block, int64 [g, n].

    Position p of an order goes to fold p mod F; model j leaves out the folds (j + floor(i F / M)) mod F for i < M.
    F = 10 / g and M = num_held_out / g have no common divisor, so the left-out folds are spread as evenly as can be
    around the circle, and any run of positions (one class, if the order keeps classes together) is left out of
    every model equally often within one. With g > 1 common divisors, g sub-blocks each deal an order of their own.
    Every example is left out of exactly `num_held_out` of the ten models.
    """
    groups, num_examples = order.shape
    folds, held_out = BLOCK_SIZE // groups, num_held_out // groups
    membership = np.ones((BLOCK_SIZE, num_examples), dtype=bool)
    position_fold = np.arange(num_examples) % folds
    for group in range(groups):
        fold = np.empty(num_examples, dtype=np.int64)
        fold[order[group]] = position_fold
        for j in range(folds):
            left_out = [(j + i * folds // held_out) % folds for i in range(held_out)]
            membership[group * folds + j] = ~np.isin(fold, left_out)
    return membership


def block_membership(labels: np.ndarray, fraction: float, seed: int, block: int) -> np.ndarray:
    """Which training examples each of the ten subset models of a block is trained on: bool [10, n].

    Balanced: each example is left out of exactly 10 - k models (`fraction` is k / 10); subset sizes, and the counts
    of each class in them, differ by at most one. Within a class all examples are exchangeable.
    """
    num_held_out = BLOCK_SIZE - round(fraction * BLOCK_SIZE)
    rng = numpy_generator(seed, "subsets", block)
    orders = []
    for _ in range(math.gcd(num_held_out, BLOCK_SIZE)):
        shuffled = rng.permutation(len(labels))
        orders.append(shuffled[np.argsort(labels[shuffled], kind="stable")])
    return deal(np.stack(orders), num_held_out)


@dataclass(frozen=True)
class Counts:
    """Sums over subset models per training example, int64 [n] each; blocks add up."""

    in_hits: np.ndarray
    in_total: np.ndarray
    out_hits: np.ndarray
    out_total: np.ndarray

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.in_hits + other.in_hits,
            self.in_total + other.in_total,
            self.out_hits + other.out_hits,
            self.out_total + other.out_total,
        )


@dataclass(frozen=True)
class Moments:
    """Sums and sums of squares over subset models per training example, float64 [n], totals int64; blocks add up."""

    in_sum: np.ndarray
    in_squares: np.ndarray
    in_total: np.ndarray
    out_sum: np.ndarray
    out_squares: np.ndarray
    out_total: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(**{name: part + getattr(other, name) for name, part in vars(self).items()})


Tallied = Counts | Moments
"""What subset models come to: of 0/1 correctness, or of the probability of the given label."""


def moments(membership: np.ndarray, values: np.ndarray) -> Moments:
    """Tally values float64 [models, n] by membership bool [models, n]."""
    parts = {}
    for side, chosen in (("in", membership), ("out", ~membership)):
        kept = np.where(chosen, values, 0.0)
        parts[f"{side}_sum"] = kept.sum(axis=0)
        parts[f"{side}_squares"] = np.einsum("mn,mn->n", kept, kept)
        parts[f"{side}_total"] = chosen.sum(axis=0)
    return Moments(**parts)


def count(membership: np.ndarray, correct: np.ndarray) -> Counts:
    """Tally correctness bool [models, n] by membership bool [models, n]."""
    return Counts(
        (correct & membership).sum(axis=0),
        membership.sum(axis=0),
        (correct & ~membership).sum(axis=0),
        (~membership).sum(axis=0),
    )


@dataclass(frozen=True)
class MemorizationScores:
    """Score = in_mean - out_mean per training example, with a 95 % interval; arrays [n].

    Of 0/1 correctness, or of the probability of the given label; the two are never mixed.
    """

    in_mean: np.ndarray
    out_mean: np.ndarray
    score: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_in: np.ndarray
    num_out: np.ndarray


def can_estimate(tallied: Tallied) -> bool:
    """Whether every example was in and out of enough models: one each, for probabilities two."""
    fewest = 1 if isinstance(tallied, Counts) else 2
    return bool(min(tallied.in_total.min(), tallied.out_total.min()) >= fewest)


def estimate(tallied: Tallied) -> MemorizationScores:
    """Feldman-Zhang scores (2020, section 4) of what subset models come to, with intervals that fit its kind."""
    return _of_counts(tallied) if isinstance(tallied, Counts) else _of_moments(tallied)


def _of_moments(tallied: Moments) -> MemorizationScores:
    """Scores of a continuous outcome: Welch's t-intervals with Satterthwaite's degrees of freedom.

    Raises ValueError where an example has fewer than two models on a side. Without spread the interval is a point.
    """
    from scipy.stats import t

    if min(tallied.in_total.min(), tallied.out_total.min()) < 2:
        raise ValueError("every example must be in at least two subsets and out of at least two")
    means, parts = [], []
    for total, values, squares in (
        (tallied.in_total, tallied.in_sum, tallied.in_squares),
        (tallied.out_total, tallied.out_sum, tallied.out_squares),
    ):
        means.append(values / total)
        parts.append(np.maximum(0.0, squares - total * means[-1] ** 2) / (total - 1) / total)
    score, variance = means[0] - means[1], parts[0] + parts[1]
    below = parts[0] ** 2 / (tallied.in_total - 1) + parts[1] ** 2 / (tallied.out_total - 1)
    smallest = np.minimum(tallied.in_total, tallied.out_total) - 1
    freedom = np.divide(variance**2, below, out=smallest.astype(np.float64), where=below > 0)
    half = t.ppf(0.975, freedom) * np.sqrt(variance)
    totals = tallied.in_total, tallied.out_total
    return MemorizationScores(means[0], means[1], score, np.sqrt(variance), score - half, score + half, *totals)


def _of_counts(counts: Counts) -> MemorizationScores:
    """Scores of 0/1 outcomes.

    Intervals: Newcombe's hybrid score interval for a difference (1998, method 10). Standard errors after Agresti
    and Caffo (2000), one success and one failure added to each side, so none is zero. Raises ValueError where an
    example was never in, or never out of, a subset.
    """
    if not (counts.in_total.all() and counts.out_total.all()):
        raise ValueError("every example must be in at least one subset and out of at least one")
    in_mean, out_mean = counts.in_hits / counts.in_total, counts.out_hits / counts.out_total
    score = in_mean - out_mean
    in_low, in_high = wilson(counts.in_hits, counts.in_total)
    out_low, out_high = wilson(counts.out_hits, counts.out_total)
    low = score - np.hypot(in_mean - in_low, out_high - out_mean)
    high = score + np.hypot(in_high - in_mean, out_mean - out_low)
    adjusted = [
        ((hits + 1) / (total + 2), total + 2)
        for hits, total in ((counts.in_hits, counts.in_total), (counts.out_hits, counts.out_total))
    ]
    standard_error = np.sqrt(sum(p * (1 - p) / total for p, total in adjusted))
    return MemorizationScores(in_mean, out_mean, score, standard_error, low, high, counts.in_total, counts.out_total)


def wilson(hits: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % score interval for a proportion: lower and upper limits, each the shape of `hits`."""
    share, z2 = hits / total, _Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return np.minimum(share, centre - half), np.maximum(share, centre + half)


def split_half_correlation(first: Tallied, second: Tallied) -> float | None:
    """Spearman rank correlation between the scores of two halves of a campaign; None where one half is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(estimate(half).score) for half in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def top_overlap(first: Tallied, second: Tallied, share: float = 0.05) -> float:
    """Share of the most memorized examples by one half of a campaign that are so by the other too; ties by position."""
    scores = [estimate(half).score for half in (first, second)]
    number = max(1, round(share * len(scores[0])))
    first_top, second_top = (np.argsort(-score, kind="stable")[:number] for score in scores)
    return len(np.intersect1d(first_top, second_top)) / number
