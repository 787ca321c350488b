"""Data sets that ship with a dependency: no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from orchestrator.data.base import DATASETS, Dataset, noisy, stratified_split
from orchestrator.seeds import numpy_generator


@DATASETS
def digits(*, label_noise: float = 0.0, seed: int = 0) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels that ship with scikit-learn: 1,200 train, 197 validation, 400 test.

    `label_noise`: share of the training labels flipped to a wrong class. Pixels 0..16 become 0..255.
    """
    table = _digits()
    images = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]
    labels = table[:, -1].astype(np.int64)
    splits = stratified_split(
        labels, {"train": 1200, "validation": 197, "test": 400}, numpy_generator(seed, "digits split")
    )
    given = noisy(labels, splits["train"], label_noise, 10, seed)
    return Dataset(images, given, labels, splits, tuple(map(str, range(10))))


def _digits() -> np.ndarray:
    """The digits as scikit-learn ships them, float64 [1797, 65]: 64 pixels and a label, without importing it.

    Its import takes longer than all else that a short command does.
    """
    found = importlib.util.find_spec("sklearn")
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (file := Path(folder, "datasets", "data", "digits.csv.gz")).is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack((bunch.data, bunch.target))
