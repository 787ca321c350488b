"""Decoded images, in memory or in a memory-mapped file. Refuses what cannot be decoded and images of several sizes."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from orchestrator.registry import InputError

SUFFIX = ".images.npy"  # of the files made here; no other file has its fingerprint remembered
LAYOUT = "2"  # part of every name: raise it when the same options give other pixels
SECONDS_BETWEEN_LINES = 5.0
CHUNK = 256


class Encoded(NamedTuple):
    """An undecoded image (a file, or its bytes), its row in the result, and what errors call it."""

    row: int
    name: str
    content: Any


def images_of(
    encoded: Iterable[Encoded], count: int, resize: int | None, crop: int | None, path: Path | None
) -> np.ndarray:
    """The images, uint8 [count, height, width, 3], mapped from the file `path`, which is made if it is not whole.

    Without `path` they are decoded into memory. `encoded` is not touched where the file is whole. Raises InputError
    for an image that cannot be decoded, for one of another size, and for a file that cannot be written.
    """
    if path is not None and (found := _whole(path, count)) is not None:
        return found
    images = _shown(_decoded(encoded, resize, crop), count)
    if path is None:
        return _in_memory(images, count)
    try:
        with replacing(path) as file:
            _write(file, images, count)
        made = _whole(path, count)
    except OSError as error:
        raise InputError(
            f"image cache {str(path)!r} cannot be written: {first_line(error)}; "
            "set data.cache to a folder that can be written and has room"
        ) from None
    if made is None:
        raise InputError(f"image cache {str(path)!r} cannot be read back; set data.cache to another folder")
    return made


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when it is whole, or leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remembered(images: np.ndarray, salt: str, compute: Callable[[], str]) -> str:
    """What `compute` says of the images, kept beside them where they are one whole file that was made here.

    A part of such a file, or a file of any other origin, is computed every time: nothing tells that it is the same.
    """
    path = _own_file(images)
    if path is None:
        return compute()
    facts = path.stat()
    known = (salt, images.shape, images.dtype.str, facts.st_size, facts.st_mtime_ns, facts.st_ino)
    kept = path.with_name(f"{path.name}.{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.fingerprint")
    with suppress(OSError, UnicodeDecodeError):
        text = kept.read_text(encoding="ascii")
        if len(text) == 64:
            return text
    content = compute()
    with suppress(OSError), replacing(kept) as file:  # a cache that may only be read serves as well
        file.write(content.encode())
    return content


def _own_file(images: np.ndarray) -> Path | None:
    if not isinstance(images, np.memmap) or images.filename is None:
        return None
    path = Path(images.filename)
    is_fixed = images.flags.c_contiguous and not images.flags.writeable
    if not (is_fixed and path.name.endswith(SUFFIX) and path.is_file()):
        return None
    return path if images.offset + images.nbytes == path.stat().st_size else None


def _whole(path: Path, count: int) -> np.ndarray | None:
    try:
        images: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return images if images.dtype == np.uint8 and images.ndim == 4 and len(images) == count else None


def _in_memory(images: Iterable[tuple[int, np.ndarray]], count: int) -> np.ndarray:
    result = np.empty(0, np.uint8)
    for done, (row, image) in enumerate(images):
        if not done:
            result = np.empty((count, *image.shape), np.uint8)
        result[row] = image
    return result


def _write(file: IO[bytes], images: Iterable[tuple[int, np.ndarray]], count: int) -> None:
    # written, not mapped: a full disk is then an error and not a bus error that ends the process
    start = 0
    for row, image in images:
        if not start:
            header = {"descr": np.lib.format.dtype_to_descr(image.dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *image.shape)})
            start = file.tell()
        if file.tell() != start + row * image.nbytes:
            file.seek(start + row * image.nbytes)
        file.write(np.ascontiguousarray(image).data)


def _decoded(encoded: Iterable[Encoded], resize: int | None, crop: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Rows and images, a chunk at a time: a map over all at once would hold every undecoded image in memory."""
    source, shape = iter(encoded), None
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(source, CHUNK)):
            for item, image in zip(chunk, pool.map(lambda each: _decode(each, resize, crop), chunk), strict=True):
                shape = shape or image.shape
                if image.shape != shape:
                    raise InputError(
                        f"{item.name} has shape {image.shape}, the first {shape}; "
                        "allowed: one size, which data.resize and data.crop give to all"
                    )
                yield item.row, image


def _decode(item: Encoded, resize: int | None, crop: int | None) -> np.ndarray:
    import struct

    from PIL import Image, UnidentifiedImageError

    # all that Pillow's readers raise on damaged files; UnidentifiedImageError is an OSError
    damaged = (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, SyntaxError, OverflowError, struct.error)
    try:
        content = item.content if isinstance(item.content, Path) else io.BytesIO(item.content)
        with Image.open(content) as opened:
            image = opened.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{item.name} cannot be decoded: it is no image that Pillow knows") from None
    except (*damaged, Image.DecompressionBombError) as error:
        raise InputError(f"{item.name} cannot be decoded: {first_line(error)}") from None
    return prepared(image, resize, crop, item.name)


def prepared(image: Any, resize: int | None, crop: int | None, name: str) -> np.ndarray:
    """An RGB image as uint8 [height, width, 3]: short side to `resize`, then the middle square of side `crop`.

    Pixel for pixel torchvision's Resize and CenterCrop of an image.
    """
    from PIL import Image

    if resize is not None:
        short = min(image.size)
        image = image.resize(tuple(int(resize * side / short) for side in image.size), Image.Resampling.BILINEAR)
    if crop is not None:
        if crop > min(image.size):
            size = f"{image.width}x{image.height}"
            raise InputError(f"{name} is {size}; data.crop={crop} needs data.resize={crop} or more")
        left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
        image = image.crop((left, top, left + crop, top + crop))
    return np.asarray(image)


def check_sizes(resize: int | None, crop: int | None) -> None:
    """Raise InputError for sizes below one pixel."""
    for name, value in (("resize", resize), ("crop", crop)):
        if value is not None and value < 1:
            raise InputError(f"data.{name} is {value}; allowed: 1 pixel or more, or none")


def _shown(images: Iterator[tuple[int, np.ndarray]], count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Say on standard error how far decoding is: a bar on a terminal, else a line every few seconds."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(images, "decoding images", total=count, console=console, transient=True)
        return
    began = said = time.monotonic()
    for done, image in enumerate(images, 1):
        now = time.monotonic()
        if now - said > SECONDS_BETWEEN_LINES:
            said = now
            left = (now - began) / done * (count - done)
            print(f"decoding images: {done}/{count} ({left:.0f} s left)", file=sys.stderr, flush=True)
        yield image


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error) or type(error).__name__).split("\n", 1)[0]
