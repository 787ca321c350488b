"""Blocks of ten subset models in a store: one model after another, put together when all are there, read in part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.arrays import CHECKSUMS, metadata_of, pack, unpack, unpack_some
from orchestrator.data import Dataset
from orchestrator.memorization import BLOCK_SIZE
from orchestrator.store import Store
from orchestrator.subset_outputs import SubsetOutputs, is_of, unpacked

_MODELS = "models"  # the metadata that says of each model where it was trained


def block_name(campaign: str, block: int) -> str:
    """The object of a whole block."""
    return f"campaigns/{campaign}/blocks/{block}.safetensors"


def parts_of(campaign: str, block: int) -> str:
    """The folder of the models of a block that is not complete yet."""
    return f"campaigns/{campaign}/parts/{block}"


def model_name(campaign: str, block: int, member: int) -> str:
    """The object of one model of a block that is not complete yet."""
    return f"{parts_of(campaign, block)}/{member}.safetensors"


def put_together(store: Store, campaign: str, block: int, membership: np.ndarray) -> None:
    """Store a block whose ten models are there, and remove them; two workers may both try, to the same end."""
    names = [model_name(campaign, block, member) for member in range(BLOCK_SIZE)]
    folder, whole = parts_of(campaign, block), block_name(campaign, block)
    if not set(names) <= {f"{folder}/{name}" for name in store.names(folder)}:
        return
    try:
        parts = [unpack(store, name) for name in names]
        said = [metadata_of(store, name) for name in names]
        for each in said:
            each.pop(CHECKSUMS, None)  # of the model's arrays; the block has its own
    except FileNotFoundError:
        if store.exists(whole):
            return
        raise
    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    if not store.exists(whole):
        metadata = {_MODELS: json.dumps(said)}
        store.put(whole, pack({"membership": membership, **arrays}, metadata))
    for name in names:
        store.delete(name)


def remove_leftovers(store: Store, present: Iterable[str]) -> None:
    """Remove the models beside a block that is whole: who put it together was killed before."""
    names = set(present)
    for name in names:
        campaign, folder, rest = name.removeprefix("campaigns/").partition("/parts/")
        if folder and block_name(campaign, int(rest.partition("/")[0])) in names:
            store.delete(name)


@dataclass(frozen=True)
class SubsetModel:
    """How one subset model was made, and its accuracy on its subset and on test; None: from before it was kept."""

    in_accuracy: float
    test_accuracy: float
    seconds: float
    host: str | None
    numerics: str | None
    stream: str | None  # what names its random draws: JSON of a seed and its purposes


@dataclass(frozen=True)
class Block:
    """What a block holds: membership bool [10, n], outputs on the splits asked for, and its ten models."""

    membership: np.ndarray
    outputs: Mapping[str, SubsetOutputs]
    models: tuple[SubsetModel, ...]


def get_block(store: Store, campaign: str, block: int, dataset: Dataset, splits: Sequence[str]) -> Block:
    """Read of a block what is asked for; raises InputError where it is damaged."""
    small = ("membership", "in_accuracy", "test_accuracy", "seconds")
    arrays, metadata = unpack_some(
        store, block_name(campaign, block), lambda name: name in small or any(is_of(split, name) for split in splits)
    )
    said = json.loads(metadata[_MODELS]) if _MODELS in metadata else [{}] * BLOCK_SIZE
    models = tuple(
        SubsetModel(
            in_accuracy=arrays["in_accuracy"][member].item(),
            test_accuracy=arrays["test_accuracy"][member].item(),
            seconds=arrays["seconds"][member].item(),
            **{name: said[member].get(name) for name in ("host", "numerics", "stream")},
        )
        for member in range(BLOCK_SIZE)
    )
    outputs = {split: unpacked(split, arrays, dataset.split_labels(split)) for split in splits}
    return Block(arrays["membership"].astype(bool, copy=False), outputs, models)
