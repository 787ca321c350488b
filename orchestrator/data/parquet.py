"""Images in Parquet files. Refuses files that it cannot decode."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.data.base import DATASETS, SPLITS, Dataset, noisy, stratified_split
from orchestrator.registry import InputError
from orchestrator.seeds import numpy_generator

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
    given = noisy(true_labels, splits["train"], label_noise, num_classes, seed)
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
