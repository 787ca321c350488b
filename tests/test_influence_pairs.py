"""Influence of training on test examples: by hand, against a double loop, and in bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from orchestrator import influence_pairs as module
from orchestrator.influence_pairs import influence_pairs
from orchestrator.memorization import Counts, block_membership, estimate
from orchestrator.registry import InputError

# five models, three training and two test examples
MEMBERSHIP = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]], dtype=bool)
CORRECT = np.array([[1, 0], [1, 1], [0, 1], [1, 1], [0, 1]], dtype=bool)
HALVES = np.array([True, True, True, False, False])


def test_influence_equals_a_case_worked_by_hand() -> None:
    """Test example 0 is right for the models with training example 0 alone; 1 is wrong for model 0 alone."""
    found = influence_pairs(MEMBERSHIP, CORRECT, HALVES, examples=np.arange(3), threshold=1 / 3)
    # train 0, test 0: 3/3 - 0/2; train 2, test 1: 3/3 - 1/2; by the same rule train 1, test 0: 1/2 - 2/3
    assert list(zip(found.train.tolist(), found.test.tolist(), strict=True)) == [(0, 0), (2, 1)]
    assert found.estimates.score == pytest.approx([1.0, 0.5])
    # Agresti-Caffo: 4/5 of 5 and 1/4 of 4
    assert found.estimates.standard_error[0] == pytest.approx(np.sqrt(0.8 * 0.2 / 5 + 0.25 * 0.75 / 4))
    assert found.halves is None, "two models have none with training example 1 in its subset"


def campaign(blocks: int, train: int, test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Membership, correctness and halves of made models, and training example i helps test example i."""
    rng = np.random.default_rng(seed)
    membership = np.concatenate([block_membership(np.arange(train) % 3, 0.7, seed, block) for block in range(blocks)])
    rate = np.full((len(membership), test), 0.6)
    helped = min(5, train, test)
    rate[:, :helped] = np.where(membership[:, :helped], 0.9, 0.3)
    return membership, rng.random(rate.shape) < rate, np.arange(len(membership)) // 10 % 2 == 0


def double_loop(
    membership: np.ndarray, correct: np.ndarray, examples: np.ndarray, threshold: float
) -> dict[tuple[int, int], float]:
    found = {}
    for i in examples:
        inside = membership[:, i]
        for j in range(correct.shape[1]):
            value = correct[inside, j].mean() - correct[~inside, j].mean()
            if value >= threshold:
                found[int(i), j] = float(value)
    return found


@pytest.mark.parametrize("is_balanced", [True, False])
def test_pairs_are_those_of_a_double_loop_whatever_the_tiles(
    is_balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership, correct, first = campaign(6, 50, 30)
    if not is_balanced:
        membership = np.random.default_rng(1).random(membership.shape) < 0.6
    examples = np.flatnonzero(np.arange(50) % 7 != 3)
    monkeypatch.setattr(module, "_ENTRIES", 700)  # eleven test examples and as many training examples at a time
    found = influence_pairs(membership, correct, first, examples=examples, threshold=0.15)
    expected = double_loop(membership, correct, examples, 0.15)
    keys = list(zip(found.train.tolist(), found.test.tolist(), strict=True))
    assert len(keys) == len(expected) > 40
    assert dict(zip(keys, found.estimates.score.tolist(), strict=True)) == pytest.approx(expected)
    assert (np.diff(found.estimates.score) <= 0).all()
    j, inside = keys[7][1], membership[:, keys[7][0]]
    numbers = correct[inside, j].sum(), inside.sum(), correct[~inside, j].sum(), (~inside).sum()
    single = estimate(Counts(*(np.array([number]) for number in numbers)))
    assert (found.estimates.low[7], found.estimates.high[7]) == pytest.approx((single.low[0], single.high[0]))
    halves = [set(double_loop(membership[side], correct[side], examples, 0.15)) for side in (first, ~first)]
    assert found.halves is not None
    assert (found.halves.first, found.halves.second) == (len(halves[0]), len(halves[1]))
    assert found.halves.jaccard == pytest.approx(len(halves[0] & halves[1]) / len(halves[0] | halves[1]))


def test_many_models_find_what_was_planted_and_nothing_else() -> None:
    """600 models; planted influence .6, every other 0: an estimate is within five standard errors of what it is of."""
    membership, correct, first = campaign(60, 40, 30)
    found = influence_pairs(membership, correct, first, examples=np.arange(40), threshold=0.25)
    assert sorted(zip(found.train.tolist(), found.test.tolist(), strict=True)) == [(i, i) for i in range(5)]
    assert found.estimates.score == pytest.approx(0.6, abs=5 * found.estimates.standard_error.max())
    assert found.halves is not None
    assert found.halves.jaccard == 1.0


def test_nothing_above_the_threshold_is_no_pair() -> None:
    membership, correct, first = campaign(4, 9, 6)
    for examples in (np.arange(9), np.arange(0)):
        found = influence_pairs(membership, correct & False, first, examples=examples, threshold=0.15)
        assert (len(found.train), len(found.estimates.low)) == (0, 0)
        assert found.halves is not None
        assert found.halves.jaccard is None


def test_too_many_pairs_and_examples_without_a_comparison_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    membership, correct, first = campaign(2, 60, 40)
    monkeypatch.setattr(module, "MOST_PAIRS", 20)
    with pytest.raises(InputError, match=r"more than 20 pairs have an influence of 0\.1 or more"):
        influence_pairs(membership, correct, first, examples=np.arange(60), threshold=0.1)
    membership[:, 7] = True
    with pytest.raises(ValueError, match="in at least one subset and out of at least one"):
        influence_pairs(membership, correct, first, examples=np.arange(60), threshold=0.1)


@pytest.mark.parametrize(("blocks", "train", "test"), [(8, 4000, 3000), (150, 400, 2000)], ids=["pairs", "models"])
def test_memory_is_bounded_by_a_tile(blocks: int, train: int, test: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs in float32 are 48 MB, all outcomes of the many models 12 MB; tiles have 100,000 entries."""
    monkeypatch.setattr(module, "_ENTRIES", 100_000)
    membership, correct, first = campaign(blocks, train, test)
    tracemalloc.start()
    influence_pairs(membership, correct, first, examples=np.arange(train), threshold=0.6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
