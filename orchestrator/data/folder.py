"""Images in one folder per class. Refuses files that it cannot decode."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.data.base import DATASETS, Dataset, Sizes, assemble
from orchestrator.data.cache import LAYOUT, SUFFIX, Encoded, check_sizes, images_of
from orchestrator.registry import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@DATASETS
def image_folder(
    *,
    root: str,
    resize: int | None = None,
    crop: int | None = None,
    cache: str | None = None,
    num_train: int | None = None,
    num_validation: int = 0,
    num_test: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Images in root/train/CLASS and root/test/CLASS (or root/val/CLASS), as ImageNet and its subsets come.

    Short sides are resized to `resize` and the middle square of side `crop` is kept (ImageNet: 160 and 128 for DEL).
    Images are decoded once into a memory-mapped file in `cache` (default: root/.unlearn).
    """
    check_sizes(resize, crop)
    folder = Path(root)
    train, test = _files(folder / "train"), _files(_test_part(folder))
    classes = _same_classes(train, test, folder)
    paths = [path for part in (train, test) for name in classes for path in part[name]]
    digest = hashlib.sha256(repr((LAYOUT, resize, crop)).encode())
    for path in paths:
        facts = path.stat()
        digest.update(f"{path.relative_to(folder)}:{facts.st_size}:{facts.st_mtime_ns}\n".encode())
    place = Path(cache or folder / ".unlearn") / f"{digest.hexdigest()[:32]}{SUFFIX}"
    encoded = (Encoded(row, f"image {str(path)!r}", path) for row, path in enumerate(paths))
    images = images_of(encoded, len(paths), resize, crop, place)
    labels = [np.repeat(np.arange(len(classes)), [len(part[name]) for name in classes]) for part in (train, test)]
    count = len(labels[0])
    sizes = Sizes(num_train, num_validation, num_test, label_noise, seed)
    return assemble(images[:count], labels[0], images[count:], labels[1], classes, sizes, whole=images)


def _test_part(folder: Path) -> Path:
    """The folder `test`, or `val` where the former is absent or has no classes (the unlabelled part of a challenge)."""
    parts = [folder / "test", folder / "val"]
    return next((part for part in parts if part.is_dir() and any(map(_is_class, part.iterdir()))), parts[0])


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _files(folder: Path) -> dict[str, list[Path]]:
    """The images of each class, sorted by path."""
    if not folder.is_dir():
        raise InputError(
            f"image folder {str(folder)!r} does not exist; set data.root to a folder with train/CLASS and test/CLASS"
        )
    classes = sorted(part.name for part in folder.iterdir() if _is_class(part))
    found = {name: sorted(filter(_is_image, (folder / name).rglob("*"))) for name in classes}
    for name, paths in found.items():
        if not paths:
            raise InputError(
                f"class folder {str(folder / name)!r} holds no images; allowed: {', '.join(sorted(SUFFIXES))}"
            )
    if not found:
        raise InputError(f"image folder {str(folder)!r} holds no class folders")
    return found


def _same_classes(train: dict[str, list[Path]], test: dict[str, list[Path]], folder: Path) -> tuple[str, ...]:
    different: Sequence[str] = sorted(set(train) ^ set(test))
    if different:
        raise InputError(
            f"class {different[0]!r} is in one part of {str(folder)!r} only; allowed: the same class folders in both"
        )
    return tuple(sorted(train))
