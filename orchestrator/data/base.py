"""Data sets: uint8 images with given and true labels and a fixed split. Refuses files that it cannot decode.

Also the two containers that the core passes around: Examples (images and given labels; the true labels are left
behind on purpose) and Outputs (the logits of one model).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.cache import remembered
from orchestrator.registry import InputError, Registry
from orchestrator.seeds import numpy_generator

SPLITS = ("train", "validation", "test")
_DIGEST_BYTES = 2**24


Augment = Literal["none", "crop_flip", "resized_crop_flip"]
"""What training does to images at random: nothing; a crop after four black pixels on each side and a flip (usual for
32x32 pixels); or a resized crop and a flip (usual for ImageNet)."""


@dataclass(frozen=True)
class Examples:
    """Images uint8 [n, height, width, channels] and given labels int64 [n], and how training augments them."""

    images: Tensor
    labels: Tensor
    augment: Augment = "none"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | np.ndarray) -> Examples:
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def to(self, device: torch.device | str) -> Examples:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def augmented(self, augment: Augment) -> Examples:
        """The same images, to be augmented in training."""
        return replace(self, augment=augment)

    def relabelled(self, labels: Tensor) -> Examples:
        """The same images under other labels."""
        return replace(self, labels=labels)

    def followed_by(self, other: Examples) -> Examples:
        """These examples, then others."""
        images, labels = torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels])
        return replace(self, images=images, labels=labels)


@dataclass(frozen=True)
class Splits:
    """What a localization strategy may look at; labels are the given ones."""

    train: Examples
    forget: Examples
    retain: Examples

    def augmented(self, augment: Augment) -> Splits:
        """The same examples, to be augmented in training."""
        return Splits(*(part.augmented(augment) for part in (self.train, self.forget, self.retain)))


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

    def __reduce__(self) -> tuple[Any, ...]:
        # a mapped file may not be where a worker is: what travels is a plain array
        plain = np.asarray(self.images).view(np.ndarray)
        return Dataset, (plain, self.labels, self.true_labels, dict(self.splits), self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the final arrays and splits: what data means in a key. Kept beside images of the cache."""
        return remembered(self.images, self._digest({}), lambda: self._digest({"images": self.images}))

    def _digest(self, images: Mapping[str, np.ndarray]) -> str:
        digest = hashlib.sha256()
        named = {**images, "labels": self.labels, "true_labels": self.true_labels, **self.splits}
        for name, array in sorted(named.items()):
            digest.update(f"{name}:{array.dtype.str}:{array.shape}:".encode())
            rows = max(1, _DIGEST_BYTES * len(array) // max(1, array.nbytes))
            for start in range(0, len(array), rows):  # a part at a time: images may be larger than memory
                digest.update(np.ascontiguousarray(array[start : start + rows]).data)
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
        rows = self.splits[split]  # an index array: what it takes out is a copy already
        images, labels = np.ascontiguousarray(self.images[rows]), np.ascontiguousarray(self.labels[rows])
        return Examples(torch.from_numpy(images), torch.from_numpy(labels))

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


def noisy(labels: np.ndarray, train: np.ndarray, fraction: float, num_classes: int, seed: int) -> np.ndarray:
    if not 0 <= fraction < 1:
        raise InputError(f"label_noise is {fraction}; allowed: a share of the training labels in [0, 1)")
    rng = numpy_generator(seed, "label noise")
    count = round(fraction * len(train))
    return flip_labels(labels, rng.choice(train, count, replace=False), num_classes, rng)


@dataclass(frozen=True)
class Sizes:
    """How much of a data set is used (None: all), how many training labels are flipped, and the seed of both draws."""

    num_train: int | None = None
    num_validation: int = 0
    num_test: int | None = None
    label_noise: float = 0.0
    seed: int = 0


def assemble(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    class_names: Sequence[str],
    sizes: Sizes,
    *,
    purpose: str = "split",
    whole: np.ndarray | None = None,
) -> Dataset:
    """Draw the splits (stratified, in the given order; all of a part without a size) and flip labels.

    With `whole`, the images of both parts in one array, nothing is copied and the splits are rows of it.
    """
    chosen, chosen_test = draw_rows(train_labels, test_labels, sizes, purpose)
    if whole is not None:
        splits = {**chosen, "test": chosen_test + len(train_labels)}
        labels = np.concatenate([train_labels, test_labels])
        images = whole
    else:
        rows = np.concatenate([chosen["train"], chosen["validation"]])
        if train_images.shape[1:] != test_images.shape[1:]:
            raise InputError(
                f"test images have shape {test_images.shape[1:]}, training images {train_images.shape[1:]}; "
                "allowed: one size"
            )
        images = np.concatenate([train_images[rows], test_images[chosen_test]])
        labels = np.concatenate([train_labels[rows], test_labels[chosen_test]])
        splits = consecutive(chosen, chosen_test)
    given = noisy(labels, splits["train"], sizes.label_noise, len(class_names), sizes.seed)
    return Dataset(images, given, labels, splits, tuple(class_names))


def draw_rows(
    labels: np.ndarray, test_labels: np.ndarray, sizes: Sizes, purpose: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sorted rows of the training part (train, validation) and of the test part."""
    rng = numpy_generator(sizes.seed, purpose)
    size = len(labels) - sizes.num_validation if sizes.num_train is None else sizes.num_train
    chosen = stratified_split(labels, {"train": size, "validation": sizes.num_validation}, rng)
    num_test = len(test_labels) if sizes.num_test is None else sizes.num_test
    chosen_test = stratified_split(test_labels, {"test": num_test}, rng)["test"]
    if not (len(chosen["train"]) and len(chosen_test)):
        raise InputError(f"num_train is {size} and num_test is {len(chosen_test)}; allowed: 1 or more")
    return chosen, chosen_test


def consecutive(chosen: Mapping[str, np.ndarray], chosen_test: np.ndarray) -> dict[str, np.ndarray]:
    """The splits of images that lie one after another: train, validation, test."""
    bounds = np.cumsum([0, len(chosen["train"]), len(chosen["validation"]), len(chosen_test)])
    return {name: np.arange(bounds[i], bounds[i + 1]) for i, name in enumerate(SPLITS)}
