"""Data sets: uint8 images with given and true labels and a fixed split. Refuses files that it cannot decode.

Also the two containers that the core passes around: Examples (images and given labels; the true labels are left
behind on purpose) and Outputs (the logits of one model).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.registry import InputError, Registry
from orchestrator.seeds import numpy_generator

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Examples:
    """Images uint8 [n, height, width, channels] and given labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | np.ndarray) -> Examples:
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        return Examples(self.images[chosen], self.labels[chosen])

    def to(self, device: torch.device | str) -> Examples:
        return Examples(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """What a localization strategy may look at; labels are the given ones."""

    train: Examples
    forget: Examples
    retain: Examples


@dataclass(frozen=True)
class SplitOutputs:
    """One model on one split: logits float16 [n, classes], given and true labels int64 [n].

    Raises ValueError where there are no examples or a logit is not finite, so no metric can pass a NaN on.
    """

    logits: np.ndarray
    labels: np.ndarray
    true_labels: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.logits):
            raise ValueError("the outputs of a split hold no examples; leave the split out")
        bad = np.count_nonzero(~np.isfinite(self.logits).all(axis=1))
        if bad:
            raise ValueError(f"the logits of {bad} of {len(self.logits)} examples are NaN or infinite; allowed: finite")

    @cached_property
    def log_probabilities(self) -> np.ndarray:
        """Log-softmax of the logits, float64 [n, classes]."""
        logits = self.logits.astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return result

    @cached_property
    def confidences(self) -> np.ndarray:
        """Probability of the given label, float64 [n]."""
        chosen: np.ndarray = np.exp(self.log_probabilities[np.arange(len(self.labels)), self.labels])
        return chosen

    @cached_property
    def predictions(self) -> np.ndarray:
        """Predicted class, int64 [n]; ties go to the lower class."""
        predicted: np.ndarray = self.logits.argmax(axis=1)
        return predicted

    def take(self, chosen: np.ndarray) -> SplitOutputs:
        return SplitOutputs(self.logits[chosen], self.labels[chosen], self.true_labels[chosen])


Outputs = Mapping[str, SplitOutputs]
"""The outputs of one run by split: forget, retain, validation, test."""


@dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, height, width, channels], labels int64 [N], and which rows are train, validation and test.

    `labels` are the given ones, `true_labels` differ where label noise was drawn (in the training part only).
    Indices of training examples everywhere else count within `splits["train"]`.
    """

    images: np.ndarray
    labels: np.ndarray
    true_labels: np.ndarray
    splits: Mapping[str, np.ndarray]
    class_names: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the final arrays and splits: what data means in a key."""
        digest = hashlib.sha256()
        named = {"images": self.images, "labels": self.labels, "true_labels": self.true_labels, **self.splits}
        for name, array in sorted(named.items()):
            digest.update(f"{name}:{array.dtype.str}:{array.shape}:".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def examples(self, split: str) -> Examples:
        """One split as tensors, with the given labels."""
        rows = self.splits[split]
        return Examples(torch.tensor(self.images[rows]), torch.tensor(self.labels[rows]))

    def split_labels(self, split: str) -> np.ndarray:
        labels: np.ndarray = self.labels[self.splits[split]]
        return labels

    def split_true_labels(self, split: str) -> np.ndarray:
        labels: np.ndarray = self.true_labels[self.splits[split]]
        return labels


DATASETS: Registry[Callable[..., Dataset]] = Registry("data set", frozenset())


def stratified_split(labels: np.ndarray, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw disjoint sorted index sets of the given sizes, each class in proportion (largest remainders first)."""
    if min(sizes.values()) < 0:
        raise InputError(f"the splits {dict(sizes)} have a negative size; there are {len(labels)} examples")
    if sum(sizes.values()) > len(labels):
        raise InputError(f"the splits {dict(sizes)} need {sum(sizes.values())} examples; there are {len(labels)}")
    left = {int(label): rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)}
    splits = {}
    for name, size in sizes.items():
        available = np.array([len(rows) for rows in left.values()])
        exact = size * available / max(1, available.sum())
        counts = np.floor(exact).astype(int)
        order = np.argsort(-(exact - counts), kind="stable")
        counts[order[: size - counts.sum()]] += 1
        taken = []
        for label, count in zip(left, counts, strict=True):
            taken.append(left[label][:count])
            left[label] = left[label][count:]
        splits[name] = np.sort(np.concatenate(taken))
    return splits


def flip_labels(labels: np.ndarray, rows: np.ndarray, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Give each of `rows` a uniformly drawn wrong label; returns a copy."""
    flipped = labels.copy()
    flipped[rows] = (labels[rows] + rng.integers(1, num_classes, len(rows))) % num_classes
    return flipped


def _noisy(labels: np.ndarray, train: np.ndarray, fraction: float, num_classes: int, seed: int) -> np.ndarray:
    if not 0 <= fraction < 1:
        raise InputError(f"label_noise is {fraction}; allowed: a share of the training labels in [0, 1)")
    rng = numpy_generator(seed, "label noise")
    count = round(fraction * len(train))
    return flip_labels(labels, rng.choice(train, count, replace=False), num_classes, rng)


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
    given = _noisy(labels, splits["train"], label_noise, 10, seed)
    return Dataset(images, given, labels, splits, tuple(map(str, range(10))))


@DATASETS
def image_parquet(
    *,
    train: str,
    test: str,
    num_train: int | None = None,
    num_validation: int = 0,
    num_test: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Images in Parquet files, as data sets are commonly published: `image: struct<bytes, path>` and `label`.

    The columns may also be called `img` and `labels`. Training and validation examples are a seeded stratified draw
    from the file `train`, test examples from `test`; without sizes, all of each. Images must share one size.
    """
    first, second = _read_table(train, "train"), _read_table(test, "test")
    rng = numpy_generator(seed, "image_parquet split")
    labels, test_labels = _labels_of(first, train), _labels_of(second, test)
    size = len(labels) - num_validation if num_train is None else num_train
    chosen = stratified_split(labels, {"train": size, "validation": num_validation}, rng)
    chosen_test = stratified_split(test_labels, {"test": len(test_labels) if num_test is None else num_test}, rng)[
        "test"
    ]
    if not (len(chosen["train"]) and len(chosen_test)):
        raise InputError(f"num_train is {size} and num_test is {len(chosen_test)}; allowed: 1 or more")
    rows = np.concatenate([chosen["train"], chosen["validation"]])
    train_images, test_images = _decode(first, rows, train), _decode(second, chosen_test, test)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InputError(
            f"the images of {test!r} have shape {test_images.shape[1:]}, those of {train!r} {train_images.shape[1:]}; "
            "allowed: one size"
        )
    images = np.concatenate([train_images, test_images])
    true_labels = np.concatenate([labels[rows], test_labels[chosen_test]])
    bounds = np.cumsum([0, len(chosen["train"]), len(chosen["validation"]), len(chosen_test)])
    splits = {name: np.arange(bounds[i], bounds[i + 1]) for i, name in enumerate(SPLITS)}
    num_classes = int(true_labels.max()) + 1
    given = _noisy(true_labels, splits["train"], label_noise, num_classes, seed)
    return Dataset(images, given, true_labels, splits, _class_names(first, num_classes))


def _read_table(path: str, option: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise InputError(
            f"data file {path!r} does not exist; give the path of a Parquet file with --set data.{option}=PATH"
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data file {path!r} is not a readable Parquet file: {_first_line(error)}") from None
    if not len(table):
        raise InputError(f"data file {path!r} holds no rows")
    return table


def _column(table: pa.Table, names: Sequence[str], path: str) -> Any:
    for name in names:
        if name in table.column_names:
            return table[name]
    raise InputError(
        f"data file {path!r} has the columns {', '.join(table.column_names)}; one of {', '.join(names)} is needed"
    )


def _labels_of(table: pa.Table, path: str) -> np.ndarray:
    column = _column(table, ("label", "labels"), path)
    if not str(column.type).startswith(("int", "uint")) or column.null_count:
        raise InputError(
            f"the labels of {path!r} are {column.type} with {column.null_count} nulls; allowed: whole numbers"
        )
    labels: np.ndarray = column.to_numpy().astype(np.int64)
    if labels.min() < 0:
        raise InputError(f"the labels of {path!r} go down to {labels.min()}; allowed: whole numbers from 0")
    return labels


def _decode(table: pa.Table, rows: np.ndarray, path: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    column = _column(table, ("image", "img"), path)
    images: list[np.ndarray] = []
    for row, cell in zip(rows, column.take(rows).to_pylist(), strict=True):
        try:
            content = cell["bytes"] if isinstance(cell, dict) else cell
            with Image.open(io.BytesIO(content)) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (UnidentifiedImageError, OSError, TypeError, KeyError, ValueError) as error:
            raise InputError(f"image {row} of {path!r} cannot be decoded: {_first_line(error)}") from None
        if images[-1].shape != images[0].shape:
            raise InputError(
                f"image {row} of {path!r} has shape {images[-1].shape}, the first {images[0].shape}; allowed: one size"
            )
    return np.stack(images)


def _class_names(table: pa.Table, num_classes: int) -> tuple[str, ...]:
    """Class names from the metadata that published Parquet files carry, else the numbers."""
    import json

    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = (features.get("label") or features.get("labels"))["names"]
        if len(names) >= num_classes:
            return tuple(map(str, names[:num_classes]))
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # absent or of another layout: numbers name the classes just as well
    return tuple(map(str, range(num_classes)))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n", 1)[0]
