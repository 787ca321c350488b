"""Images in Parquet files. Refuses files that it cannot decode."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.data.base import DATASETS, Dataset, Sizes, assemble, consecutive, draw_rows, noisy
from orchestrator.data.cache import check_sizes, first_line, mapped, one_shape, prepared
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
    given one: short sides to `resize`, then the middle square of side `crop`. With `cache`, a folder, all images are
    decoded once into a memory-mapped file there, a part of a file at a time: for sets that memory holds only once.
    """
    check_sizes(resize, crop)
    paths = {"train": train, "test": test}
    tables = {part: _read_table(path, part, without_images=cache is not None) for part, path in paths.items()}
    labels = {part: _labels_of(table, paths[part]) for part, table in tables.items()}
    num_classes = int(max(part.max() for part in labels.values())) + 1
    sizes = Sizes(num_train, num_validation, num_test, label_noise, seed)
    names = _class_names(tables["train"], num_classes)
    both = labels["train"], labels["test"]
    if cache is not None:
        images = _mapped(paths, len(both[0]) + len(both[1]), Path(cache), resize, crop)
        return assemble(images, both[0], images, both[1], names, sizes, purpose=PURPOSE, whole=images)
    chosen, chosen_test = draw_rows(*both, sizes, PURPOSE)
    rows = np.concatenate([chosen["train"], chosen["validation"]])
    parts = [
        _decode(tables[part], wanted, paths[part], resize, crop)
        for part, wanted in (("train", rows), ("test", chosen_test))
    ]
    if parts[0].shape[1:] != parts[1].shape[1:]:
        raise InputError(
            f"the images of {test!r} have shape {parts[1].shape[1:]}, those of {train!r} {parts[0].shape[1:]}; "
            "allowed: one size"
        )
    true_labels = np.concatenate([both[0][rows], both[1][chosen_test]])
    used = int(true_labels.max()) + 1
    splits = consecutive(chosen, chosen_test)
    given = noisy(true_labels, splits["train"], label_noise, used, seed)
    return Dataset(np.concatenate(parts), given, true_labels, splits, _class_names(tables["train"], used))


PURPOSE = "image_parquet split"


def _mapped(paths: Mapping[str, str], count: int, folder: Path, resize: int | None, crop: int | None) -> np.ndarray:
    """The images of both files, training first, from the cache."""
    digest = hashlib.sha256(repr((resize, crop)).encode())
    for path in paths.values():
        facts = Path(path).stat()
        digest.update(f"{Path(path).absolute()}:{facts.st_size}:{facts.st_mtime_ns}\n".encode())
    cells = (cell for path in paths.values() for cell in _cells(path))
    place = folder / f"{digest.hexdigest()[:32]}.npy"
    return mapped(place, count, cells, lambda cell: _image(cell[2], cell[1], cell[0], resize, crop))


def _cells(path: str) -> Iterator[tuple[str, int, Any]]:
    """Path, row and undecoded image of every row, read a batch at a time."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    name = next((name for name in ("image", "img") if name in file.schema_arrow.names), None)
    if name is None:
        raise InputError(
            f"data file {path!r} has the columns {', '.join(file.schema_arrow.names)}; image or img is needed"
        )
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=[name]):
        for cell in batch.column(0).to_pylist():
            yield path, row, cell
            row += 1


def _read_table(path: str, option: str, without_images: bool = False) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise InputError(
            f"data file {path!r} does not exist; give the path of a Parquet file with --set data.{option}=PATH"
        )
    try:
        names = [name for name in pq.read_schema(path).names if not (without_images and name in ("image", "img"))]
        table = pq.read_table(path, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data file {path!r} is not a readable Parquet file: {first_line(error)}") from None
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


def _decode(table: pa.Table, rows: np.ndarray, path: str, resize: int | None, crop: int | None) -> np.ndarray:
    column = _column(table, ("image", "img"), path)
    cells = column.take(rows).to_pylist()
    return one_shape([_image(cell, row, path, resize, crop) for row, cell in zip(rows, cells, strict=True)], rows, path)


def _image(cell: Any, row: int, path: str, resize: int | None, crop: int | None) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        content = cell["bytes"] if isinstance(cell, dict) else cell
        with Image.open(io.BytesIO(content)) as image:
            return prepared(image, resize, crop, f"image {row} of {path!r}")
    except (UnidentifiedImageError, OSError, TypeError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"image {row} of {path!r} cannot be decoded: {first_line(error)}") from None


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
