"""Images in Parquet files. Refuses files that it cannot decode."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.data.base import DATASETS, Dataset, Sizes, consecutive, draw_rows, noisy
from orchestrator.data.cache import LAYOUT, SUFFIX, Encoded, check_sizes, first_line, images_of
from orchestrator.registry import InputError

if TYPE_CHECKING:
    import pyarrow as pa


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
    resize: int | None = None,
    crop: int | None = None,
    cache: str | None = None,
) -> Dataset:
    """Images in Parquet files, as data sets are commonly published: `image: struct<bytes, path>` and `label`.

    The columns may also be called `img` and `labels`. Training and validation examples are a seeded stratified draw
    from the file `train`, test examples from `test`; without sizes, all of each. Images must share one size, or are
    given one: short sides to `resize`, then the middle square of side `crop`. With `cache`, a folder, the images
    are decoded once into a memory-mapped file there; the same examples with the same fingerprint.
    """
    check_sizes(resize, crop)
    files = _opened(train, "train"), _opened(test, "test")
    sizes = Sizes(num_train, num_validation, num_test, label_noise, seed)
    chosen, chosen_test = draw_rows(files[0].labels, files[1].labels, sizes, "image_parquet split")
    rows = np.concatenate([chosen["train"], chosen["validation"]]), chosen_test
    place = None if cache is None else Path(cache) / _cache_name(files, rows, resize, crop)
    encoded = itertools.chain(_encoded(files[0], rows[0], 0), _encoded(files[1], rows[1], len(rows[0])))
    images = images_of(encoded, len(rows[0]) + len(rows[1]), resize, crop, place)
    true_labels = np.concatenate([file.labels[part] for file, part in zip(files, rows, strict=True)])
    num_classes = int(true_labels.max()) + 1
    splits = consecutive(chosen, chosen_test)
    given = noisy(true_labels, splits["train"], label_noise, num_classes, seed)
    return Dataset(images, given, true_labels, splits, _class_names(files[0].metadata, num_classes))


@dataclass(frozen=True)
class _File:
    """A Parquet file of images: the name of their column, labels int64 [n], and what its schema says besides."""

    path: str
    column: str
    labels: np.ndarray
    metadata: Mapping[bytes, bytes]


def _opened(path: str, option: str) -> _File:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise InputError(f"data file {path!r} {what}; give the path of a Parquet file with --set data.{option}=PATH")
    try:
        schema = pq.read_schema(path)
        column, label = (_column(schema.names, names, path) for names in (("image", "img"), ("label", "labels")))
        labels = pq.read_table(path, columns=[label])[label]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    if not len(labels):
        raise InputError(f"data file {path!r} holds no rows")
    return _File(path, column, _checked_labels(labels, path), schema.metadata or {})


def _unreadable(path: str, error: Exception) -> InputError:
    return InputError(f"data file {path!r} is not a readable Parquet file: {first_line(error)}")


def _column(present: Sequence[str], names: Sequence[str], path: str) -> str:
    for name in names:
        if name in present:
            return name
    raise InputError(f"data file {path!r} has the columns {', '.join(present)}; one of {', '.join(names)} is needed")


def _checked_labels(column: pa.ChunkedArray, path: str) -> np.ndarray:
    if not str(column.type).startswith(("int", "uint")) or column.null_count:
        raise InputError(
            f"the labels of {path!r} are {column.type} with {column.null_count} nulls; allowed: whole numbers"
        )
    labels: np.ndarray = column.to_numpy().astype(np.int64)
    if labels.min() < 0:
        raise InputError(f"the labels of {path!r} go down to {labels.min()}; allowed: whole numbers from 0")
    return labels


def _cache_name(files: Sequence[_File], rows: Sequence[np.ndarray], resize: int | None, crop: int | None) -> str:
    """Names the images as they will lie: of these rows in this order, so that a cache never changes a fingerprint."""
    digest = hashlib.sha256(repr((LAYOUT, resize, crop)).encode())
    for file, part in zip(files, rows, strict=True):
        facts = Path(file.path).stat()
        digest.update(f"{Path(file.path).absolute()}:{facts.st_size}:{facts.st_mtime_ns}:{len(part)}\n".encode())
        digest.update(np.ascontiguousarray(part, dtype="<i8").data)
    return f"{digest.hexdigest()[:32]}{SUFFIX}"


def _encoded(file: _File, rows: np.ndarray, first: int) -> Iterator[Encoded]:
    """The undecoded images of `rows`, which lie from row `first` on in the result, in the order of the file."""
    import pyarrow as pa

    order = np.argsort(rows)
    wanted = rows[order]
    for begin, batch in _batches(file, wanted):
        low, high = np.searchsorted(wanted, (begin, begin + len(batch)))
        cells = batch.take(pa.array(wanted[low:high] - begin)).to_pylist()
        for place, row, cell in zip(order[low:high], wanted[low:high], cells, strict=True):
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            yield Encoded(first + int(place), f"image {row} of {file.path!r}", content)


def _batches(file: _File, wanted: np.ndarray) -> Iterator[tuple[int, pa.Array]]:
    """The column of images a few hundred rows at a time, with the number of the first; groups without any are skipped.

    `wanted` is sorted. A file is never read whole: it may be as large as memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    start = 0
    try:
        with pq.ParquetFile(file.path, buffer_size=2**20) as source:
            for group in range(source.num_row_groups):
                stop = start + source.metadata.row_group(group).num_rows
                if np.searchsorted(wanted, start) < np.searchsorted(wanted, stop):
                    begin = start
                    for batch in source.iter_batches(batch_size=256, row_groups=[group], columns=[file.column]):
                        yield begin, batch.column(0)
                        begin += len(batch)
                start = stop
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file.path, error) from None


def _class_names(metadata: Mapping[bytes, bytes], num_classes: int) -> tuple[str, ...]:
    """Class names from the metadata that published Parquet files carry, else the numbers."""
    import json

    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = (features.get("label") or features.get("labels"))["names"]
        if len(names) >= num_classes:
            return tuple(map(str, names[:num_classes]))
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # absent or of another layout: numbers name the classes just as well
    return tuple(map(str, range(num_classes)))
