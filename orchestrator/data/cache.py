"""Decoded images in memory-mapped files: each image is decoded once, and a cache is there whole or not at all."""

from __future__ import annotations

import itertools
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from orchestrator.registry import InputError

if TYPE_CHECKING:
    from PIL import Image as Images

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0


def mapped(path: Path, count: int, items: Iterable[T], decode: Callable[[T], np.ndarray]) -> np.ndarray:
    """The images of `items` (uint8 [count, height, width, channels]) from a file, which is made if it is not whole.

    `decode` gives one image each, all of one shape, and is called from several threads. Raises what it raises, and
    InputError for another shape; then no file is left.
    """
    found = _whole(path, count)
    if found is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.partial")
    try:
        _write(temporary, count, items, decode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    made = _whole(path, count)
    if made is None:
        raise InputError(f"the image cache {str(path)!r} cannot be read back; is its disk full?")
    return made


def _whole(path: Path, count: int) -> np.ndarray | None:
    try:
        images: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return images if images.dtype == np.uint8 and images.ndim == 4 and len(images) == count else None


def _write(path: Path, count: int, items: Iterable[T], decode: Callable[[T], np.ndarray]) -> None:
    images: Any = None
    with ThreadPoolExecutor() as pool:
        for place, image in enumerate(_shown(_in_order(pool, decode, items), count)):
            if images is None:
                images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, *image.shape))
            if image.shape != images.shape[1:]:
                raise InputError(
                    f"image {place} has the shape {image.shape}, the first {images.shape[1:]}; allowed: one size, "
                    "which data.resize and data.crop give to all"
                )
            images[place] = image
    images.flush()


def _in_order(pool: ThreadPoolExecutor, decode: Callable[[T], np.ndarray], items: Iterable[T]) -> Iterator[np.ndarray]:
    """Decode a chunk at a time: a map over all at once would hold every undecoded image in memory."""
    source = iter(items)
    while chunk := list(itertools.islice(source, 256)):
        yield from pool.map(decode, chunk)


def _shown(images: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Say on standard error how far decoding is, every few seconds."""
    began = said = time.monotonic()
    for done, image in enumerate(images, 1):
        now = time.monotonic()
        if now - said > SECONDS_BETWEEN_LINES:
            said = now
            left = (now - began) / done * (count - done)
            print(f"decoding images: {done}/{count} ({left:.0f} s left)", file=sys.stderr, flush=True)
        yield image


def prepared(image: Images.Image, resize: int | None, crop: int | None, name: str) -> np.ndarray:
    """An image as uint8 [height, width, 3]: short side to `resize`, then the middle square of side `crop`."""
    from PIL import Image

    image = image.convert("RGB")
    if resize is not None:
        factor = resize / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
    if crop is not None:
        if crop > min(image.size):
            size = f"{image.width}x{image.height}"
            raise InputError(f"{name} is {size}; data.crop={crop} needs data.resize={crop} or more")
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    return np.asarray(image)


def check_sizes(resize: int | None, crop: int | None) -> None:
    """Raise InputError for sizes below one pixel."""
    for name, value in (("resize", resize), ("crop", crop)):
        if value is not None and value < 1:
            raise InputError(f"data.{name} is {value}; allowed: 1 pixel or more, or none")


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error) or type(error).__name__).split("\n", 1)[0]


def one_shape(images: Sequence[np.ndarray], names: Iterable[object], path: str) -> np.ndarray:
    """Stack images that share a shape; InputError naming the first that does not."""
    for name, image in zip(names, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(
                f"image {name} of {path!r} has shape {image.shape}, the first {images[0].shape}; allowed: one size"
            )
    return np.stack(images)
