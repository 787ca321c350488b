"""Published data sets through torchvision: downloaded on demand, in their canonical order."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.base import DATASETS, Dataset, Sizes, assemble
from orchestrator.registry import InputError

FILES = {
    "CIFAR10": "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta",
    "CIFAR100": "cifar-100-python/ with train, test and meta",
    "SVHN": "train_32x32.mat and test_32x32.mat",
    "FashionMNIST": "FashionMNIST/raw/ with train- and t10k- images-idx3-ubyte and labels-idx1-ubyte",
}
"""Where torchvision looks for each data set below its root."""


@dataclass(frozen=True)
class Part:
    """Images uint8 [n, height, width, channels] and labels int64 [n] of a training or test part."""

    images: np.ndarray
    labels: np.ndarray


def _parts(name: str, root: str, download: bool, read: Callable[[Any, bool], Part]) -> tuple[Part, Part]:
    """Training and test part; InputError where the files are not there, or not whole, and cannot be had."""
    from torchvision import datasets

    def both(fetch: bool) -> tuple[Part, Part]:
        def made(**which: Any) -> Any:
            return getattr(datasets, name)(root, download=fetch, **which)

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return read(made, True), read(made, False)

    try:
        return both(False)
    except (RuntimeError, OSError):
        pass  # not there, or not whole: what a download is for
    try:
        if download:
            return both(True)
        reason = "download is false"
    except (RuntimeError, OSError) as error:
        reason = str(error).split("\n", 1)[0]
    raise InputError(
        f"{name} is not whole in {os.path.abspath(root)!r} and cannot be downloaded: {reason}; put there "
        f"{FILES[name]}, set data.root to where they are, or read images from Parquet with data=image_parquet"
    )


def _cifar(made: Any, train: bool) -> Part:
    part = made(train=train)
    return Part(part.data, np.array(part.targets, dtype=np.int64))


def _svhn(made: Any, train: bool) -> Part:
    part = made(split="train" if train else "test")
    return Part(np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)), part.labels.astype(np.int64))


def _grey(made: Any, train: bool) -> Part:
    part = made(train=train)
    return Part(part.data.numpy()[..., None], part.targets.numpy().astype(np.int64))


def _made(name: str, root: str, download: bool, read: Callable[[Any, bool], Part], sizes: Sizes) -> Dataset:
    train, test = _parts(name, root, download, read)
    return assemble(train.images, train.labels, test.images, test.labels, CLASSES[name], sizes)


@DATASETS
def cifar10(
    *,
    root: str = "data",
    download: bool = True,
    num_train: int | None = None,
    num_validation: int = 0,
    num_test: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32 pixels, ten classes.

    Without sizes all of it, in the canonical order; else seeded stratified draws.
    """
    return _made("CIFAR10", root, download, _cifar, Sizes(num_train, num_validation, num_test, label_noise, seed))


@DATASETS
def cifar100(
    *,
    root: str = "data",
    download: bool = True,
    num_train: int | None = None,
    num_validation: int = 0,
    num_test: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32 pixels, a hundred classes."""
    return _made("CIFAR100", root, download, _cifar, Sizes(num_train, num_validation, num_test, label_noise, seed))


@DATASETS
def svhn(
    *,
    root: str = "data",
    download: bool = True,
    num_train: int | None = None,
    num_validation: int = 0,
    num_test: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """SVHN (Netzer et al. 2011): 73,257 training and 26,032 test images of house numbers, 32x32 pixels, ten digits."""
    return _made("SVHN", root, download, _svhn, Sizes(num_train, num_validation, num_test, label_noise, seed))


@DATASETS
def fashion_mnist(
    *,
    root: str = "data",
    download: bool = True,
    num_train: int | None = None,
    num_validation: int = 0,
    num_test: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 test images of 28x28 grey pixels, ten classes."""
    return _made("FashionMNIST", root, download, _grey, Sizes(num_train, num_validation, num_test, label_noise, seed))


CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel "
    "can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur "
    "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion "
    "lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree "
    "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea "
    "seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table "
    "tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman "
    "worm"
)  # in alphabetical order, as its meta file has them

CLASSES: dict[str, tuple[str, ...]] = {
    "CIFAR10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "CIFAR100": tuple(CIFAR100_CLASSES.split()),
    "SVHN": tuple(map(str, range(10))),
    "FashionMNIST": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
