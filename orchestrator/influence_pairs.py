"""Influence of training on test examples, from the subset models of memorization scores. numpy only.

Nothing of what the unlearning method `influence` computes: no gradients, only which models were right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orchestrator.memorization import Counts, MemorizationScores, estimate
from orchestrator.registry import InputError

MOST_PAIRS = 5_000_000  # kept of one estimate

_ENTRIES = 16_000_000  # of the largest array of a tile
_SLACK = 1e-4  # of the first look in float32; what it lets through is looked at in double precision


@dataclass(frozen=True)
class Agreement:
    """How many pairs each half of a campaign finds by itself, and how many both."""

    first: int
    second: int
    both: int

    @property
    def jaccard(self) -> float | None:
        """Common pairs over all of both; None where neither half finds one."""
        union = self.first + self.second - self.both
        return self.both / union if union else None


@dataclass(frozen=True)
class InfluencePairs:
    """Pairs of a training and a test example, strongest first; arrays [k].

    Influence = accuracy on the test example of the models with the training example in their subset, minus that of
    the others: the estimates' `score`.
    """

    train: np.ndarray
    test: np.ndarray
    estimates: MemorizationScores
    halves: Agreement | None  # None: not every example is in and out of models of both halves


@dataclass(frozen=True)
class _Half:
    """Models that are summed over: membership bool [models, n] and correctness float32 [models, m]."""

    membership: np.ndarray
    correct: np.ndarray

    @cached_property
    def hits(self) -> np.ndarray:
        """How many are right on each test example, float64 [m]."""
        found: np.ndarray = self.correct.sum(axis=0, dtype=np.float64)
        return found


def influence_pairs(
    membership: np.ndarray, correct: np.ndarray, first_half: np.ndarray, *, examples: np.ndarray, threshold: float
) -> InfluencePairs:
    """All pairs of one of `examples` (training indices) and a test example with an influence of `threshold` or more.

    After Feldman and Zhang (2020, section 4). membership bool [models, n], correct bool [models, m] on test, first_half
    bool [models]. Sums over models are products of float32 matrices, exact below 2^24 models, a tile at a time: beside
    its arguments it holds a few times 64 MB, and the pairs. Raises InputError for more than five million of them, and
    ValueError where an example was never in, or never out of, a subset.
    """
    if len(membership) >= 2**24:
        raise ValueError(f"there are {len(membership)} models; allowed: fewer than 2^24, whose counts float32 can hold")
    if not _is_whole(membership[:, examples]):
        raise ValueError("every example must be in at least one subset and out of at least one")
    side = max(1, _ENTRIES // len(membership))
    nothing = np.zeros(0, dtype=np.int64)
    found, parts = [(nothing, nothing, nothing)], [membership[chosen] for chosen in (first_half, ~first_half)]
    whole = all(_is_whole(part[:, examples]) for part in parts)
    agreements: list[Agreement] = []
    for tests in _slices(correct.shape[1], side):
        halves = [
            _Half(part, correct[chosen, tests].astype(np.float32))
            for part, chosen in zip(parts, (first_half, ~first_half), strict=True)
        ]
        for tile in _slices(len(examples), min(side, max(1, _ENTRIES // (tests.stop - tests.start)))):
            pairs, agreement = _tile(halves, examples[tile], threshold, whole)
            found.append((examples[tile][pairs[0]], pairs[1] + tests.start, pairs[2]))
            agreements += [agreement] if agreement is not None else []
            if sum(len(train) for train, *_ in found) > MOST_PAIRS:
                raise InputError(
                    f"more than {MOST_PAIRS} pairs have an influence of {threshold:g} or more; "
                    "raise --threshold or --memorization, or train more models: few models make many pairs by chance"
                )
    train, test, in_hits = (np.concatenate(parts) for parts in zip(*found, strict=True))
    estimates = _estimates(membership, correct, train, test, in_hits)
    order = np.lexsort((test, train, -estimates.score))
    sorted_estimates = MemorizationScores(**{name: part[order] for name, part in vars(estimates).items()})
    both = Agreement(*(sum(getattr(a, name) for a in agreements) for name in ("first", "second", "both")))
    return InfluencePairs(train[order], test[order], sorted_estimates, both if whole else None)


def _tile(
    halves: list[_Half], examples: np.ndarray, threshold: float, can_compare: bool
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], Agreement | None]:
    """The pairs of a tile: place in `examples`, place among its test examples, and hits of the models with it in."""
    parts = [half.membership[:, examples] for half in halves]
    in_hits = [part.T.astype(np.float32) @ half.correct for part, half in zip(parts, halves, strict=True)]
    in_totals = [part.sum(axis=0) for part in parts]
    agreement = None
    if can_compare:
        sets = []
        for hits, total, half in zip(in_hits, in_totals, halves, strict=True):
            above = _above(hits, total, len(half.membership), half.hits, threshold)
            sets.append(np.asarray(np.ravel_multi_index(above, hits.shape)))
        agreement = Agreement(len(sets[0]), len(sets[1]), len(np.intersect1d(sets[0], sets[1], assume_unique=True)))
    in_hits[0] += in_hits[1]
    num_models = sum(len(half.membership) for half in halves)
    all_hits = halves[0].hits + halves[1].hits
    rows, columns = _above(in_hits[0], in_totals[0] + in_totals[1], num_models, all_hits, threshold)
    return (rows, columns, in_hits[0][rows, columns].astype(np.int64)), agreement


def _above(
    in_hits: np.ndarray, in_total: np.ndarray, num_models: int, hits: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns where in_hits / in_total - out_hits / out_total is the threshold or more.

    in_hits float32 [t, m], in_total [t], hits of all models [m].
    """
    out_total = num_models - in_total
    same = slice(1) if np.ptp(in_total) == 0 else slice(None)  # one row of bounds serves all where subsets are balanced
    share = (1 / in_total + 1 / out_total)[same, None]
    bounds = (threshold - _SLACK + hits[None, :] / out_total[same, None]) / share
    found = np.flatnonzero(in_hits >= bounds.astype(np.float32))  # five times as fast as nonzero in two dimensions
    rows, columns = np.divmod(found, in_hits.shape[1])
    inside = in_hits[rows, columns].astype(np.float64)
    exact = inside / in_total[rows] - (hits[columns] - inside) / out_total[rows]
    kept = exact >= threshold
    return rows[kept], columns[kept]


def _estimates(
    membership: np.ndarray, correct: np.ndarray, train: np.ndarray, test: np.ndarray, in_hits: np.ndarray
) -> MemorizationScores:
    in_total, hits = membership.sum(axis=0)[train], correct.sum(axis=0)[test]
    return estimate(Counts(in_hits, in_total, hits - in_hits, len(membership) - in_total))


def _is_whole(membership: np.ndarray) -> bool:
    return bool(len(membership) and (membership.any(axis=0) & ~membership.all(axis=0)).all())


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
