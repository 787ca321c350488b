import io
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.forget_sets import FORGET_SETS, ranked
from orchestrator.registry import InputError

LABELS = np.tile(np.arange(4), 25)
TRUE = np.where(np.arange(100) % 10 == 3, (LABELS + 1) % 4, LABELS)  # ten flipped: 3, 13, ...

NAMES = ("cat", "dog", "emu", "fox")
REQUIRED: dict[str, dict[str, Any]] = {
    "file": {"path": "mine.txt"},
    "random_of_classes": {"classes": "dog,3"},
    "whole_class": {"label": "emu"},
}


def draw(name: str, seed: int = 0, memorization: Any = None, **options: Any) -> np.ndarray:
    available = {
        "labels": LABELS,
        "true_labels": TRUE,
        "memorization": np.linspace(0, 1, 100) if memorization is None else memorization,
        "rng": np.random.default_rng(seed),
        "class_names": NAMES,
        "files": {"mine.txt": b"3 1\n2 99"}.__getitem__,
    }
    indices: np.ndarray = FORGET_SETS[name](available, FORGET_SETS[name].resolve(options))
    return indices


@pytest.mark.parametrize("name", FORGET_SETS)
def test_a_forget_set_is_a_sorted_proper_part_of_the_training_set(name: str) -> None:
    options = REQUIRED.get(name, {})
    indices = draw(name, **options)
    assert indices.dtype == np.int64
    assert (np.diff(indices) > 0).all()
    assert 0 < len(indices) < 100
    assert 0 <= indices[0] <= indices[-1] < 100
    assert (indices == draw(name, **options)).all()


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


def test_a_draw_from_classes_holds_nothing_else_and_counts_by_the_whole_set() -> None:
    indices = draw("random_of_classes", classes=("dog", "3"), fraction=0.2)
    assert len(indices) == 20
    assert set(LABELS[indices]) == {1, 3}
    assert (indices == draw("random_of_classes", classes=("1", "fox"), fraction=0.2)).all()
    with pytest.raises(InputError, match=r"fraction 0\.6 of 100 examples is 60; allowed: 1 to 50"):
        draw("random_of_classes", classes=("dog", "3"), fraction=0.6)


@pytest.mark.parametrize("label", ["4", "cow", "-1", ""])
def test_a_class_that_does_not_exist_is_refused(label: str) -> None:
    with pytest.raises(InputError, match=r"does not exist; .*cat, dog, emu, fox or 0 to 3"):
        draw("whole_class", label=label)


def test_a_whole_class_by_name_or_number() -> None:
    assert draw("whole_class", label="emu").tolist() == np.flatnonzero(LABELS == 2).tolist()
    assert (draw("whole_class", label="2") == draw("whole_class", label="emu")).all()


def test_the_released_draws_are_those_of_the_code_of_del() -> None:
    """50,000 examples, random.seed(25), random.sample: the first five drawn are known (reference/del.md)."""
    labels = np.arange(50_000) % 10
    rng = np.random.default_rng(0)
    ours = FORGET_SETS["random"]({"labels": labels, "rng": rng}, {"fraction": 0.1, "as_released": True})
    assert len(ours) == 5000
    assert {24704, 1005, 14027, 19972, 41711} <= set(ours)
    random.seed(25)
    expected = random.sample([i for i in range(50_000) if labels[i] in {2, 5}], 5000)
    options = {"classes": ("2", "5"), "fraction": 0.1, "as_released": True}
    names = tuple(map(str, range(10)))
    drawn = FORGET_SETS["random_of_classes"]({"labels": labels, "class_names": names, "rng": rng}, options)
    assert drawn.tolist() == sorted(expected)


def test_the_released_code_rounds_down() -> None:
    svhn = np.arange(73_257) % 10
    ours = FORGET_SETS["random"]({"labels": svhn, "rng": None}, {"fraction": 0.1, "as_released": True})
    assert ours.tolist() == sorted(random.Random(25).sample(range(73_257), 7_325))


def test_least_and_middle_memorized_by_hand() -> None:
    scores = np.linspace(0.6, 1, 100)
    scores[[7, 30, 80]] = [0.1, 0.52, 0.3]
    assert draw("least_memorized", memorization=scores, count=2).tolist() == [7, 80]
    assert draw("middle_memorized", memorization=scores, count=2).tolist() == [0, 30]
    assert draw("middle_memorized", memorization=scores, count=1, centre=0.15).tolist() == [7]


def content(kind: str, indices: list[int]) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, np.array(indices))
    elif kind == "parquet":
        pq.write_table(pa.table({"name": ["x"] * len(indices), "index": indices}), buffer)
    elif kind == "headless.csv":
        buffer.write("".join(f"{i}\r\n" for i in indices).encode())
    elif kind == "csv":
        buffer.write(("index,why\n" + "".join(f"{i},old\n" for i in indices)).encode())
    else:
        buffer.write("\n".join(map(str, indices)).encode())
    return buffer.getvalue()


def from_file(kind: str, indices: list[int]) -> list[int]:
    available = {"labels": LABELS, "files": lambda _: content(kind, indices)}
    drawn: list[int] = FORGET_SETS["file"](available, {"path": f"mine.{kind}"}).tolist()
    return drawn


@pytest.mark.parametrize("kind", ["txt", "csv", "headless.csv", "parquet", "npy"])
def test_a_users_file_is_read_sorted_and_checked(kind: str) -> None:
    assert from_file(kind, [99, 0, 17]) == [0, 17, 99]
    with pytest.raises(InputError, match=r"'mine\.\S+' has the index 100; allowed: 0 to 99"):
        from_file(kind, [3, 100])
    with pytest.raises(InputError, match="has the index -1; allowed: 0 to 99"):
        from_file(kind, [-1, 5])
    with pytest.raises(InputError, match="has the index 5 twice"):
        from_file(kind, [5, 3, 5])
    with pytest.raises(InputError, match="has 100 indices; allowed: 1 to 99"):
        from_file(kind, list(range(100)))


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [
        ("a.txt", b"1 two 3"),
        ("a.txt", b"\xff\xfe"),
        ("a.csv", b""),
        ("a.csv", b"x,y\n1,2\n"),
        ("a.csv", b"1,2\n3,4\n"),
        ("a.csv", b"index\n1.5\n"),
        ("a.parquet", b"PAR1"),
        ("a.npy", b"nothing"),
        ("a.txt", b""),
    ],
)
def test_a_file_that_holds_no_indices_is_refused_in_one_sentence(name: str, bytes_: bytes) -> None:
    with pytest.raises(InputError, match=f"forget file '{name}' .*allowed|name one of them index") as caught:
        FORGET_SETS["file"]({"labels": LABELS, "files": lambda _: bytes_}, {"path": name})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["least_memorized", "middle_memorized", "mixed_memorized"])
def test_ties_do_not_go_by_the_order_of_the_data(name: str) -> None:
    labels = np.repeat(np.arange(5), 200)  # sorted by class, as a folder of images is
    entry = FORGET_SETS[name]
    drawn = entry({"labels": labels, "memorization": np.zeros(1000)}, entry.resolve({"count": 100}))
    assert len(drawn) == 100
    assert np.bincount(labels[drawn], minlength=5).min() > 8


def test_ranks_are_those_of_the_values_whatever_the_ties() -> None:
    values = np.random.default_rng(0).integers(0, 5, 200).astype(float)
    order = ranked(values)
    assert sorted(order) == list(range(200))
    assert (np.diff(values[order]) >= 0).all()
    assert not np.array_equal(order, np.argsort(values, kind="stable"))
