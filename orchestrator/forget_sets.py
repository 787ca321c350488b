"""Forget sets: which training examples are to be forgotten. The only choice that may look at true labels."""

from __future__ import annotations

import io
import random as python_random
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np

from orchestrator.registry import Added, Count, File, InputError, Registry, suggest
from orchestrator.seeds import numpy_generator

FORGET_SETS: Registry[Callable[..., np.ndarray]] = Registry(
    "forget set", frozenset({"labels", "true_labels", "class_names", "memorization", "rng", "files"})
)
"""Functions of training labels int64 [n] (and `true_labels`, `class_names`, `memorization` scores float64 [n], `rng`,
`files`: a user's file by the value of an option marked File) that return sorted training indices int64."""

RELEASED_SEED = 25  # random.seed of the code released with DEL


@FORGET_SETS
def random(
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    fraction: float = 0.1,
    as_released: Annotated[bool, Added()] = False,
) -> np.ndarray:
    """A uniform draw from the training set.

    `fraction` of it, rounded; `as_released`: the one draw of the code of DEL, which rounds down.
    """
    return _drawn("random", np.arange(len(labels)), len(labels), fraction, None if as_released else rng)


@FORGET_SETS
def random_of_classes(
    labels: np.ndarray,
    class_names: Sequence[str],
    rng: np.random.Generator,
    *,
    classes: tuple[str, ...],
    fraction: float = 0.1,
    as_released: bool = False,
) -> np.ndarray:
    """A uniform draw from some classes (`fraction` of the whole training set), DEL's Non-IID setting.

    `classes` are names or numbers from 0. `as_released`: the draw of the released code, `random.seed(25)`, whose size
    is rounded down.
    """
    numbers = [class_number(name, class_names) for name in classes]
    candidates = np.flatnonzero(np.isin(labels, numbers))
    return _drawn("random_of_classes", candidates, len(labels), fraction, None if as_released else rng)


def _drawn(
    name: str, candidates: np.ndarray, total: int, fraction: float, rng: np.random.Generator | None
) -> np.ndarray:
    """Draw `fraction` of `total` from the candidates; without a generator as released with DEL."""
    count = round(fraction * total) if rng is not None else int(fraction * total)
    allowed = min(len(candidates), total - 1)
    if not 0 < count <= allowed:
        raise InputError(
            f"forget set {name}: fraction {fraction} of {total} examples is {count}; allowed: 1 to {allowed}"
        )
    if rng is None:
        return np.sort(np.array(python_random.Random(RELEASED_SEED).sample(candidates.tolist(), count)))
    return np.sort(rng.choice(candidates, count, replace=False))


def class_number(name: str, class_names: Sequence[str]) -> int:
    """The number of a class given by name or number; InputError where there is none."""
    if name in class_names:
        return list(class_names).index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    raise InputError(f"class {name!r} does not exist; {suggest(name, class_names)} or 0 to {len(class_names) - 1}")


@FORGET_SETS
def whole_class(labels: np.ndarray, class_names: Sequence[str], *, label: str) -> np.ndarray:
    """All training examples of one class, given by name or number."""
    indices = np.flatnonzero(labels == class_number(label, class_names))
    if not 0 < len(indices) < len(labels):
        raise InputError(f"forget set whole_class: class {label!r} has {len(indices)} of {len(labels)} examples")
    return indices


@FORGET_SETS
def file(labels: np.ndarray, files: Callable[[str], bytes], *, path: Annotated[str, File()]) -> np.ndarray:
    """A user's own training indices, from 0: text, CSV or Parquet (column `index`, or the only one) or npy."""
    what = f"forget file {path!r}"
    return checked_indices(parse_indices(path, files(path), what), len(labels), what)


def checked_indices(indices: np.ndarray, total: int, what: str) -> np.ndarray:
    """Sorted training indices; InputError naming `what` where they are not distinct ones, fewer than `total`."""
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise InputError(f"{what} holds {indices.dtype} {indices.shape}; allowed: a list of whole numbers")
    outside = indices[(indices < 0) | (indices >= total)]
    if len(outside):
        raise InputError(f"{what} has the index {outside[0]}; allowed: 0 to {total - 1}")
    values, counts = np.unique(indices, return_counts=True)
    if len(values) < len(indices):
        raise InputError(f"{what} has the index {values[counts > 1][0]} twice; allowed: distinct indices")
    if not 0 < len(values) < total:
        raise InputError(f"{what} has {len(values)} indices; allowed: 1 to {total - 1}")
    return values.astype(np.int64)


def parse_indices(path: str, content: bytes, what: str) -> np.ndarray:
    """What a file of indices holds, unchecked; InputError naming `what` where it cannot be read."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        if path.endswith(".npy"):
            loaded: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
            return loaded
        if path.endswith((".parquet", ".csv")):
            source = pa.BufferReader(content)
            if path.endswith(".parquet"):
                return _only_column(parquet.read_table(source), what)
            first = content.decode().partition("\n")[0].split(",")
            headed = csv.ReadOptions(autogenerate_column_names=all(_is_number(cell) for cell in first))
            return _only_column(csv.read_csv(source, headed), what)
        words = content.decode("utf-8-sig").split()
        if wrong := [word for word in words if not _is_number(word)]:
            raise ValueError(f"{wrong[0]!r} is not a whole number")
        return np.array([int(word) for word in words], dtype=np.int64)
    except (ValueError, OverflowError, OSError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"{what} cannot be read: {reason}; allowed: numbers in text, .csv, .parquet or .npy") from None


def _is_number(text: str) -> bool:
    return text.strip().strip('"').removeprefix("-").isdecimal()


def _only_column(table: Any, what: str) -> np.ndarray:
    if "index" not in table.column_names and len(table.column_names) != 1:
        raise InputError(f"{what} has the columns {', '.join(table.column_names)}; name one of them index")
    column: np.ndarray = table["index" if "index" in table.column_names else 0].to_numpy()
    return column


@FORGET_SETS
def mislabelled(labels: np.ndarray, true_labels: np.ndarray) -> np.ndarray:
    """The training examples whose given label is not their true one."""
    flipped = np.flatnonzero(labels != true_labels)
    if not len(flipped):
        raise InputError(
            "forget set mislabelled: no label is flipped; set data.label_noise above 0, or leave this set out"
        )
    return flipped


@FORGET_SETS
def most_memorized(
    labels: np.ndarray, true_labels: np.ndarray, memorization: np.ndarray, *, count: int = 60, unflipped: bool = True
) -> np.ndarray:
    """The training examples with the highest memorization scores (`unflipped`: among those correctly labelled)."""
    candidates = np.flatnonzero(labels == true_labels) if unflipped else np.arange(len(labels))
    if not 0 < count < min(len(candidates) + 1, len(labels)):
        raise InputError(f"forget set most_memorized: count is {count}; allowed: 1 to {len(candidates)}")
    order = np.argsort(-memorization[candidates], kind="stable")
    return np.sort(candidates[order[:count]])


@FORGET_SETS(version=2)
def least_memorized(labels: np.ndarray, memorization: np.ndarray, *, count: Count = 60) -> np.ndarray:
    """The training examples with the lowest memorization scores; ties in an order drawn once."""
    return _nearest("least_memorized", labels, memorization, count)


@FORGET_SETS(version=2)
def middle_memorized(
    labels: np.ndarray, memorization: np.ndarray, *, count: Count = 60, centre: float = 0.5
) -> np.ndarray:
    """The training examples whose memorization scores are nearest to `centre` (Zhao et al. 2024: one half)."""
    return _nearest("middle_memorized", labels, np.abs(memorization - centre), count)


@FORGET_SETS(version=2)
def mixed_memorized(labels: np.ndarray, memorization: np.ndarray, *, count: Count = 60) -> np.ndarray:
    """A third each of the least, middle and most memorized training examples: the forget set of RUM (Zhao et al. 2024).

    The middle third are the remaining examples nearest to the centre: halfway between the mean of the least and the
    mean of the most memorized. For memorization scores that is about one half, as in RUM; for a proxy, of whatever
    scale, the one rule in place of the several of the released code. Thirds are of equal size within one.
    """
    if not 3 <= count < len(labels):
        raise InputError(f"forget set mixed_memorized: count is {count}; allowed: 3 to {len(labels) - 1}")
    low, high = -(-count // 3), count // 3
    order = ranked(memorization)
    least, rest, most = order[:low], order[low : len(order) - high], order[len(order) - high :]
    centre = (memorization[least].mean() + memorization[most].mean()) / 2
    middle = rest[ranked(np.abs(memorization[rest] - centre))[: count - low - high]]
    return np.sort(np.concatenate([least, middle, most]))


def _nearest(name: str, labels: np.ndarray, distance: np.ndarray, count: int) -> np.ndarray:
    if count >= len(labels):
        raise InputError(f"forget set {name}: count is {count}; allowed: 1 to {len(labels) - 1}")
    return np.sort(ranked(distance)[:count])


def ranked(values: np.ndarray) -> np.ndarray:
    """The order of values, lowest first. Ties, which 0/1 scores have by the hundred, rank in an order drawn once.

    By position they would favour the first classes of data that are sorted by class.
    """
    ties = numpy_generator(0, "ties").permutation(len(values))
    order: np.ndarray = np.lexsort((ties, values))
    return order
