"""Data sets that ship with a dependency: no download."""

from __future__ import annotations

import numpy as np

from orchestrator.data.base import DATASETS, Dataset, noisy, stratified_split
from orchestrator.seeds import numpy_generator


@DATASETS
def digits(*, label_noise: float = 0.0, seed: int = 0) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels that ship with scikit-learn: 1,200 train, 197 validation, 400 test.

    `label_noise`: share of the training labels flipped to a wrong class. Pixels 0..16 become 0..255.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    splits = stratified_split(
        labels, {"train": 1200, "validation": 197, "test": 400}, numpy_generator(seed, "digits split")
    )
    given = noisy(labels, splits["train"], label_noise, 10, seed)
    return Dataset(images, given, labels, splits, tuple(map(str, range(10))))
