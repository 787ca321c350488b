"""Published data sets through torchvision: downloaded on demand, in their canonical order."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from orchestrator.data.base import DATASETS, Dataset, Sizes, assemble
from orchestrator.registry import InputError

SECONDS_WITHOUT_ANSWER = 30.0
# what torchvision's readers and downloads raise on files and servers that are not as they should be
FAILURES = (RuntimeError, OSError, ValueError, AssertionError, LookupError, EOFError, HTTPException, UnpicklingError)


@dataclass(frozen=True)
class Part:
    """Images uint8 [n, height, width, channels] and labels int64 [n] of a training or test part."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images and {len(self.labels)} labels")


def _parts(name: str, root: str, download: bool, read: Callable[[Any, bool], Part]) -> tuple[Part, Part]:
    """Training and test part; InputError where the files are not there, or not whole, and cannot be had."""
    from torchvision import datasets

    kind = getattr(datasets, name)

    def both(fetch: bool) -> tuple[Part, Part]:
        def made(**which: Any) -> Any:
            return kind(root, download=fetch, **which)

        return read(made, True), read(made, False)

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return both(False)
    except FAILURES as error:
        reason = f"reading: {_told(error)}"
    lacking = _lacking(kind, root)
    if lacking and download:
        try:
            with _downloading(name, root):
                return both(True)
        except FAILURES as error:
            reason, lacking = f"download: {_told(error)}", _lacking(kind, root)
    elif lacking:
        reason = "download is false"
    files = lacking or _files(kind, root)
    which = "missing or damaged" if lacking else "one of"
    raise InputError(
        f"{name} is not whole in {os.path.abspath(files[0][0].parent)!r}: "
        f"{which} {', '.join(path.name for path, _ in files)} ({reason}); put the published files there, "
        f"set data.root to another folder than {root!r}, or read images from Parquet with data=image_parquet"
    )


def _files(kind: Any, root: str) -> list[tuple[Path, str | None]]:
    """The files that torchvision reads, and the MD5 sums that it holds them to."""
    if hasattr(kind, "base_folder"):  # CIFAR
        listed = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        return [(Path(root, kind.base_folder, name), md5) for name, md5 in listed]
    if hasattr(kind, "split_list"):  # SVHN
        return [(Path(root, name), md5) for _, name, md5 in (kind.split_list[part] for part in ("train", "test"))]
    return [(Path(root, kind.__name__, "raw", name.removesuffix(".gz")), None) for name, _ in kind.resources]


def _lacking(kind: Any, root: str) -> list[tuple[Path, str | None]]:
    from torchvision.datasets.utils import check_integrity

    return [(path, md5) for path, md5 in _files(kind, root) if not check_integrity(path, md5)]


@contextlib.contextmanager
def _downloading(name: str, root: str) -> Iterator[None]:
    """Bars on a terminal's standard error only; a server that does not answer is given up."""
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    print(f"downloading {name} to {os.path.abspath(root)}", file=sys.stderr, flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_WITHOUT_ANSWER)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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
