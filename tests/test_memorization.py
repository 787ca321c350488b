import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom, binomtest, spearmanr, ttest_ind

from orchestrator.memorization import (
    BLOCK_SIZE,
    Counts,
    block_membership,
    count,
    deal,
    estimate,
    moments,
    split_half_correlation,
    wilson,
)

# ---- the design ----------------------------------------------------------------------------------------------------

LABELS = {
    "one class": np.zeros(37, dtype=np.int64),
    "two classes": np.repeat([0, 1], [19, 8]),
    "seven uneven classes": np.random.default_rng(0).choice(7, 233, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.02]),
    "ten even classes": np.tile(np.arange(10), 50),
    "as few as folds": np.array([0, 1, 0, 1, 2, 2, 0, 1, 2, 0]),
}


@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("block", [0, 3])
def test_a_block_is_balanced(name: str, tenths: int, block: int) -> None:
    labels = LABELS[name]
    membership = block_membership(labels, tenths / 10, 5, block)
    assert membership.shape == (10, len(labels))
    assert membership.dtype == bool
    assert ((~membership).sum(axis=0) == 10 - tenths).all()
    sizes = membership.sum(axis=1)
    assert np.ptp(sizes) <= 1
    for label in np.unique(labels):
        assert np.ptp(membership[:, labels == label].sum(axis=1)) <= 1


@pytest.mark.parametrize("tenths", range(1, 10))
def test_a_block_is_a_function_of_seed_and_number(tenths: int) -> None:
    labels = LABELS["ten even classes"]
    blocks = {
        (seed, block): block_membership(labels, tenths / 10, seed, block) for seed in (0, 1) for block in (0, 1, 2)
    }
    for (seed, block), membership in blocks.items():
        assert (membership == block_membership(labels, tenths / 10, seed, block)).all()
    subsets = {row.tobytes() for membership in blocks.values() for row in membership}
    assert len(subsets) == 60, "two models share a subset, within a block or between blocks"


def groups_and_folds(num_held_out: int) -> tuple[int, int]:
    groups = math.gcd(num_held_out, BLOCK_SIZE)
    return groups, BLOCK_SIZE // groups


def enumerated_orders(labels: np.ndarray) -> list[np.ndarray]:
    """Every order that keeps the classes together: what block_membership draws from."""
    per_class = [list(itertools.permutations(np.flatnonzero(labels == label))) for label in np.unique(labels)]
    return [np.concatenate([np.array(part) for part in parts]) for parts in itertools.product(*per_class)]


DRAWABLE = [(4, 4, 7), (5, 4, 7), (4, 4, 5), (4, 3, 6), (5, 3, 8), (3, 3, 9), (4, 4, 2)]


@pytest.mark.parametrize(("first", "second", "tenths"), DRAWABLE)
def test_every_subset_with_a_models_class_counts_is_equally_likely(first: int, second: int, tenths: int) -> None:
    labels = np.repeat([0, 1], [first, second])
    groups, folds = groups_and_folds(10 - tenths)
    drawn: list[Counter[bytes]] = [Counter() for _ in range(folds)]
    for order in enumerated_orders(labels):
        membership = deal(np.stack([order] * groups), 10 - tenths)
        for model in range(folds):  # sub-blocks draw their orders alike, so the first stands for all
            drawn[model][membership[model].tobytes()] += 1
    for model in range(folds):
        members = np.frombuffer(next(iter(drawn[model])), dtype=bool)
        counts = [int(members[labels == label].sum()) for label in (0, 1)]
        possible = {
            np.isin(np.arange(len(labels)), [*zero, *one]).tobytes()
            for zero in itertools.combinations(range(first), counts[0])
            for one in itertools.combinations(range(first, first + second), counts[1])
        }
        assert set(drawn[model]) == possible
        assert len(set(drawn[model].values())) == 1


# ---- the estimator -------------------------------------------------------------------------------------------------


def test_scores_equal_a_case_worked_by_hand() -> None:
    membership = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]], dtype=bool)
    correct = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 1, 1], [0, 0, 1]], dtype=bool)
    counts = count(membership, correct)
    assert counts.in_hits.tolist() == [2, 2, 2]
    assert counts.in_total.tolist() == [3, 2, 3]
    assert counts.out_hits.tolist() == [0, 1, 2]
    assert counts.out_total.tolist() == [2, 3, 2]
    scores = estimate(counts)
    assert scores.in_mean == pytest.approx([2 / 3, 1, 2 / 3])
    assert scores.out_mean == pytest.approx([0, 1 / 3, 1])
    assert scores.score == pytest.approx([2 / 3, 2 / 3, -1 / 3])
    # Agresti-Caffo: p = (hits + 1) / (total + 2); example 0: 3/5 of 5 and 1/4 of 4
    assert scores.standard_error[0] == pytest.approx(math.sqrt(0.6 * 0.4 / 5 + 0.25 * 0.75 / 4))
    assert scores.standard_error[1] == pytest.approx(math.sqrt(0.75 * 0.25 / 4 + 0.4 * 0.6 / 5))
    assert (scores.num_in.tolist(), scores.num_out.tolist()) == ([3, 2, 3], [2, 3, 2])
    # Newcombe, example 0: Wilson of 2/3 is (.20766, .93851), of 0/2 is (0, .65762), by the textbook formula
    assert scores.low[0] == pytest.approx(2 / 3 - math.hypot(2 / 3 - 0.20766, 0.65762), abs=2e-5)
    assert scores.high[0] == pytest.approx(2 / 3 + math.hypot(0.93851 - 2 / 3, 0), abs=2e-5)


def test_blocks_add_up() -> None:
    rng = np.random.default_rng(3)
    membership, correct = rng.random((2, 20, 9)) < 0.6
    whole = count(membership, correct)
    parts = count(membership[:10], correct[:10]) + count(membership[10:], correct[10:])
    for name in ("in_hits", "in_total", "out_hits", "out_total"):
        assert (getattr(whole, name) == getattr(parts, name)).all()


def one_sided(hits: int, total: int) -> Counts:
    return Counts(np.array([3, hits]), np.array([5, total]), np.array([1, 1]), np.array([2, 2]))


@pytest.mark.parametrize("swapped", [False, True])
def test_an_example_never_in_or_never_out_is_refused(swapped: bool) -> None:
    counts = one_sided(0, 0)
    if swapped:
        counts = Counts(counts.out_hits, counts.out_total, counts.in_hits, counts.in_total)
    with pytest.raises(ValueError, match="in at least one subset and out of at least one"):
        estimate(counts)


Learner = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Features and labels of the subset, features of all: predicted labels. Deterministic."""


def nearest_neighbours(k: int) -> Learner:
    def predict(features: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
        order = np.argsort(np.abs(features[None, :] - queries[:, None]), axis=1, kind="stable")[:, :k]
        return (labels[order].mean(axis=1) > 0.5).astype(np.int64)

    return predict


def majority(features: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    counts = np.bincount(labels, minlength=2)
    return np.full(len(queries), counts.argmax())


FEATURES = np.array([0.0, 1.1, 2.3, 2.9, 7.0, 1.6, 3.1, 4.6, 6.4])


@pytest.mark.parametrize(
    "learner", [nearest_neighbours(1), nearest_neighbours(3), majority], ids=["1nn", "3nn", "majority"]
)
@pytest.mark.parametrize(("first", "second", "tenths"), DRAWABLE)
def test_the_estimator_is_unbiased_over_every_block_that_can_be_drawn(
    first: int, second: int, tenths: int, learner: Learner
) -> None:
    labels = np.repeat([0, 1], [first, second])
    size, features = len(labels), FEATURES[: len(labels)]
    learned: dict[bytes, np.ndarray] = {}

    def correct_on(members: np.ndarray) -> np.ndarray:
        name = members.tobytes()
        if name not in learned:
            learned[name] = learner(features[members], labels[members], features) == labels
        return learned[name]

    groups, _ = groups_and_folds(10 - tenths)
    orders = enumerated_orders(labels)
    rng = np.random.default_rng(0)
    # every sub-block meets every order once; how orders are combined over sub-blocks cannot change a mean
    combined = np.stack([rng.permutation(len(orders)) if group else np.arange(len(orders)) for group in range(groups)])
    total = np.zeros(size)
    class_counts: list[tuple[int, ...]] = []
    for chosen in combined.T:
        membership = deal(np.stack([orders[i] for i in chosen]), 10 - tenths)
        correct = np.stack([correct_on(members) for members in membership])
        total += estimate(count(membership, correct)).score
        if not class_counts:
            class_counts = [tuple(int(m[labels == label].sum()) for label in (0, 1)) for m in membership]

    # independently: each model's subset is uniform among those with its class counts
    weight: dict[bool, np.ndarray] = defaultdict(lambda: np.zeros(size))
    hits: dict[bool, np.ndarray] = defaultdict(lambda: np.zeros(size))
    for zero_count, one_count in class_counts:
        subsets = [
            np.isin(np.arange(size), [*zero, *one])
            for zero in itertools.combinations(range(first), zero_count)
            for one in itertools.combinations(range(first, size), one_count)
        ]
        for members in subsets:
            for side in (True, False):
                weight[side] += (members == side) / len(subsets)
                hits[side] += (members == side) * correct_on(members) / len(subsets)
    expected = hits[True] / weight[True] - hits[False] / weight[False]
    assert total / len(orders) == pytest.approx(expected, abs=1e-10)
    assert np.ptp(expected) > 0.1 or learner is majority


def test_scores_rank_examples_as_exact_leave_one_out_does() -> None:
    rng = np.random.default_rng(7)
    centres = np.repeat(np.arange(12) * 10.0, 5)
    features = centres + rng.uniform(-1, 1, 60)
    true = (np.repeat(np.arange(12), 5) % 2).astype(np.int64)
    labels = true.copy()
    labels[rng.choice(60, 14, replace=False)] ^= 1
    learner = nearest_neighbours(1)

    def correct_on(members: np.ndarray) -> np.ndarray:
        return learner(features[members], labels[members], features) == labels

    everyone = np.ones(60, dtype=bool)
    exact = np.array(
        [int(correct_on(everyone)[i]) - int(correct_on(everyone & (np.arange(60) != i))[i]) for i in range(60)]
    )
    assert 10 < exact.sum() < 50
    counts = None
    for block in range(20):
        membership = block_membership(labels, 0.9, 0, block)
        tally = count(membership, np.stack([correct_on(members) for members in membership]))
        counts = tally if counts is None else counts + tally
    assert counts is not None
    assert spearmanr(estimate(counts).score, exact).statistic >= 0.8


# ---- intervals -----------------------------------------------------------------------------------------------------


def single(in_hits: int, in_total: int, out_hits: int, out_total: int) -> tuple[float, float]:
    scores = estimate(Counts(*(np.array([x]) for x in (in_hits, in_total, out_hits, out_total))))
    return float(scores.low[0]), float(scores.high[0])


@pytest.mark.parametrize("total", [1, 3, 10, 140])
def test_wilson_equals_scipy(total: int) -> None:
    hits = np.arange(total + 1)
    low, high = wilson(hits, np.full(total + 1, total))
    theirs = [binomtest(int(h), total).proportion_ci(method="wilson") for h in hits]
    assert low == pytest.approx([ci.low for ci in theirs], abs=1e-12)
    assert high == pytest.approx([ci.high for ci in theirs], abs=1e-12)


# Newcombe (1998), Statistics in Medicine 17, table II, method 10
PUBLISHED = [
    ((56, 70, 48, 80), (0.0524, 0.3339)),
    ((9, 10, 3, 10), (0.1705, 0.8090)),
    ((10, 10, 0, 20), (0.6791, 1.0000)),
    ((10, 10, 0, 10), (0.6075, 1.0000)),
]


@pytest.mark.parametrize(("counts", "published"), PUBLISHED)
def test_intervals_equal_the_published_ones(counts: tuple[int, int, int, int], published: tuple[float, float]) -> None:
    assert single(*counts) == pytest.approx(published, abs=5.1e-5)


def score_limits(hits: int, total: int) -> tuple[float, float]:
    """Wilson's limits as the roots of (p - hits/total)^2 = z^2 p (1 - p) / total, another way to the same numbers."""
    z = 1.959963984540054
    share = hits / total
    low, high = np.sort(np.roots([1 + z**2 / total, -2 * share - z**2 / total, share**2]).real)
    return float(low), float(high)


@pytest.mark.parametrize("counts", [(7, 7, 0, 3), (0, 14, 6, 6), (31, 70, 11, 30), (140, 140, 59, 60), (1, 1, 1, 1)])
def test_intervals_equal_an_independent_implementation(counts: tuple[int, int, int, int]) -> None:
    a, m, b, n = counts
    (l1, u1), (l2, u2) = score_limits(a, m), score_limits(b, n)
    p1, p2 = a / m, b / n
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 + (u2 - p2) ** 2)
    high = p1 - p2 + math.sqrt((u1 - p1) ** 2 + (p2 - l2) ** 2)
    assert single(*counts) == pytest.approx((low, high), abs=1e-7)


QS = (0.05, 0.25, 0.5, 0.75, 0.95)


def exact_coverages() -> dict[tuple[int, float, float], float]:
    """Probability that the interval holds the true difference, summed over all outcomes of two binomials."""
    covered = {}
    for n in (50, 200, 1000):
        n_in, n_out = 7 * n // 10, 3 * n // 10
        ins, outs = (grid.ravel() for grid in np.meshgrid(np.arange(n_in + 1), np.arange(n_out + 1), indexing="ij"))
        scores = estimate(Counts(ins, np.full(len(ins), n_in), outs, np.full(len(ins), n_out)))
        for q_in, q_out in itertools.product(QS, QS):
            probability = binom.pmf(ins, n_in, q_in) * binom.pmf(outs, n_out, q_out)
            holds = (scores.low <= q_in - q_out) & (q_in - q_out <= scores.high)
            covered[n, q_in, q_out] = float(probability[holds].sum())
    return covered


def test_intervals_cover_as_promised() -> None:
    covered = exact_coverages()
    assert len(covered) == 75
    assert min(covered.values()) >= 0.90
    assert np.mean(list(covered.values())) >= 0.95


def test_split_half_correlation_equals_scipy() -> None:
    rng = np.random.default_rng(1)
    halves = [Counts(rng.integers(0, 8, 30), np.full(30, 7), rng.integers(0, 4, 30), np.full(30, 3)) for _ in range(2)]
    expected = spearmanr(estimate(halves[0]).score, estimate(halves[1]).score).statistic
    assert split_half_correlation(*halves) == pytest.approx(expected)
    flat = Counts(np.full(30, 7), np.full(30, 7), np.full(30, 3), np.full(30, 3))
    assert split_half_correlation(halves[0], flat) is None


# ---- scores of a probability ---------------------------------------------------------------------------------------


def test_scores_of_probabilities_are_welchs() -> None:
    rng = np.random.default_rng(0)
    membership = np.concatenate([block_membership(np.zeros(12, int), 0.7, 0, block) for block in range(3)])
    values = rng.beta(2, 1 + membership, size=membership.shape)
    scores = estimate(moments(membership, values))
    for index in range(12):
        inside, outside = values[membership[:, index], index], values[~membership[:, index], index]
        found = ttest_ind(inside, outside, equal_var=False)
        interval = found.confidence_interval(0.95)
        assert scores.score[index] == pytest.approx(inside.mean() - outside.mean())
        assert (scores.low[index], scores.high[index]) == pytest.approx((interval.low, interval.high))
        assert scores.standard_error[index] == pytest.approx(abs(scores.score[index] / found.statistic))
    assert scores.num_in.tolist() == [21] * 12


def test_moments_of_blocks_add_up_and_bear_no_spread() -> None:
    rng = np.random.default_rng(1)
    blocks = [(block_membership(np.zeros(9, int), 0.7, 0, b), rng.random((10, 9))) for b in range(2)]
    added = moments(*blocks[0]) + moments(*blocks[1])
    whole = moments(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))
    assert estimate(added).low == pytest.approx(estimate(whole).low)
    flat = estimate(moments(blocks[0][0], np.full((10, 9), 0.25)))
    assert (flat.score == 0).all()
    assert (flat.low == flat.high).all()
    with pytest.raises(ValueError, match="at least two subsets"):
        estimate(moments(block_membership(np.zeros(20, int), 0.9, 0, 0), rng.random((10, 20))))


def test_intervals_of_probabilities_cover() -> None:
    """Skewed outcomes, as confidences are: 200 models of which 60 leave an example out, 4,000 examples."""
    rng = np.random.default_rng(2)
    membership = np.zeros((200, 4000), dtype=bool)
    membership[:140] = True
    for shape in ((8, 1), (1, 1), (1, 4)):
        values = np.where(membership, rng.beta(30, 1, membership.shape), rng.beta(*shape, membership.shape))
        scores = estimate(moments(membership, values))
        truth = 30 / 31 - shape[0] / sum(shape)
        assert ((scores.low <= truth) & (truth <= scores.high)).mean() >= 0.93
