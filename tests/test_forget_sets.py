from typing import Any

import numpy as np
import pytest

from orchestrator.forget_sets import FORGET_SETS
from orchestrator.registry import InputError

LABELS = np.tile(np.arange(4), 25)
TRUE = np.where(np.arange(100) % 10 == 3, (LABELS + 1) % 4, LABELS)  # ten flipped: 3, 13, ...


def draw(name: str, seed: int = 0, memorization: Any = None, **options: Any) -> np.ndarray:
    available = {
        "labels": LABELS,
        "true_labels": TRUE,
        "memorization": np.linspace(0, 1, 100) if memorization is None else memorization,
        "rng": np.random.default_rng(seed),
    }
    indices: np.ndarray = FORGET_SETS[name](available, FORGET_SETS[name].resolve(options))
    return indices


@pytest.mark.parametrize("name", FORGET_SETS)
def test_a_forget_set_is_a_sorted_proper_part_of_the_training_set(name: str) -> None:
    indices = draw(name)
    assert indices.dtype == np.int64
    assert (np.diff(indices) > 0).all()
    assert 0 < len(indices) < 100
    assert 0 <= indices[0] <= indices[-1] < 100
    assert (indices == draw(name)).all()


def test_random_draws_anew_with_another_seed_and_leaves_nobody_out() -> None:
    draws = [draw("random", seed, fraction=0.29) for seed in range(60)]
    assert {len(indices) for indices in draws} == {29}
    assert len({indices.tobytes() for indices in draws}) == 60
    assert set(np.concatenate(draws)) == set(range(100))


@pytest.mark.parametrize("fraction", [0.0, 0.004, 0.996, 1.0, -0.5, 2.0])
def test_random_refuses_to_forget_nothing_or_everything(fraction: float) -> None:
    with pytest.raises(InputError, match=r"fraction .* allowed: 1 to 99"):
        draw("random", fraction=fraction)


def test_mislabelled_are_those_whose_labels_differ() -> None:
    assert draw("mislabelled").tolist() == list(range(3, 100, 10))


def test_without_flipped_labels_there_is_no_mislabelled_set() -> None:
    with pytest.raises(InputError, match=r"set data\.label_noise above 0"):
        FORGET_SETS["mislabelled"]({"labels": LABELS, "true_labels": LABELS}, {})


def test_most_memorized_by_hand() -> None:
    scores = np.zeros(100)
    scores[[3, 13, 50, 60, 70]] = [0.9, 0.8, 0.7, 0.6, 0.5]  # 3 and 13 are flipped
    assert draw("most_memorized", memorization=scores, count=2).tolist() == [50, 60]
    assert draw("most_memorized", memorization=scores, count=3, unflipped=False).tolist() == [3, 13, 50]


def test_ties_in_memorization_break_by_position() -> None:
    scores = np.repeat([0.2, 0.5], 50)
    assert draw("most_memorized", memorization=scores, count=4, unflipped=False).tolist() == [50, 51, 52, 53]
    assert draw("most_memorized", memorization=scores, count=4).tolist() == [50, 51, 52, 54]  # 53 is flipped


@pytest.mark.parametrize(("count", "unflipped"), [(0, True), (-1, True), (91, True), (100, False)])
def test_most_memorized_refuses_more_than_there_are(count: int, unflipped: bool) -> None:
    with pytest.raises(InputError, match=f"count is {count}; allowed: 1 to"):
        draw("most_memorized", count=count, unflipped=unflipped)
