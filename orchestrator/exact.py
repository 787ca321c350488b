"""Exact scores: training with and without single examples, kept one model an object, and what the models come to."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from orchestrator import pipeline, results
from orchestrator.arrays import pack, unpack
from orchestrator.data import Dataset
from orchestrator.forget_sets import checked_indices, parse_indices
from orchestrator.memorization import MemorizationScores, Tallied, count, estimate, moments
from orchestrator.pipeline import Lab
from orchestrator.registry import InputError
from orchestrator.specs import ExactSpec, SingleSpec, key
from orchestrator.store import Store

SINGLES_FOLDER, TABLES_FOLDER = "exact/models", "exact/scores"
GIVEN = "given"  # the selection of indices that a user named
_COLUMNS = ("estimator", "index", "label", "true_label", *MemorizationScores.__dataclass_fields__)


# ---- which examples ------------------------------------------------------------------------------------------------


def _top(scores: np.ndarray, number: int) -> np.ndarray:
    """The highest scores; ties by position."""
    return np.argsort(-scores, kind="stable")[:number]


def _spread(scores: np.ndarray, number: int) -> np.ndarray:
    """Even over the ranks, the highest and the lowest among them: a sample of the whole training set."""
    places = np.linspace(0, len(scores) - 1, number).round().astype(np.int64)
    return np.argsort(-scores, kind="stable")[places]


def _range(scores: np.ndarray, number: int) -> np.ndarray:
    """Even over the values: from the highest score to the lowest in equal steps, each time the nearest one left."""
    left, chosen = np.ones(len(scores), dtype=bool), []
    for wanted in np.linspace(scores.max(), scores.min(), number):
        chosen.append(int(np.where(left, np.abs(scores - wanted), np.inf).argmin()))
        left[chosen[-1]] = False
    return np.array(chosen)


RULES: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {"top": _top, "spread": _spread, "range": _range}


def by_scores(text: str) -> bool:
    """Whether examples are asked for by the campaign's scores: `top:20`, `spread:20`, `range:20`."""
    rule, colon, _ = text.partition(":")
    return bool(colon) and rule in RULES


_LONGEST = 18  # digits of a number that an int64 holds


def select(text: str, total: int, scores: Callable[[], np.ndarray]) -> tuple[int, ...]:
    """The sorted training indices that a text asks for: `12,57`, a file of them, or a rule and a number.

    `scores` gives what a rule goes by, float64 [total]. Raises InputError for anything else, and for indices that are
    not distinct ones of the `total` training examples.
    """
    what, (rule, _, number) = f"--exact {text}", text.partition(":")
    if by_scores(text):
        if not number.isdecimal() or not 0 < int(number) < total:
            raise InputError(f"--exact is {text!r}; allowed: {rule}:N with N from 1 to {total - 1}")
        found = RULES[rule](scores(), int(number))
    elif text and not text.strip("0123456789-, "):
        words = text.replace(",", " ").split()
        if not all(word.removeprefix("-").isdecimal() for word in words):
            raise InputError(f"--exact is {text!r}; allowed: training indices such as 12,57,300")
        if long := [word for word in words if len(word) > _LONGEST]:
            raise InputError(f"{what} has the index {long[0]}; allowed: 0 to {total - 1}")
        found = np.array([int(word) for word in words], dtype=np.int64)
    elif Path(text).is_file():
        found = parse_indices(text, Path(text).read_bytes(), what)
    else:
        rules = ", ".join(f"{name}:N" for name in RULES)
        raise InputError(f"--exact is {text!r}; allowed: training indices such as 12,57,300, a file of them, {rules}")
    return tuple(int(index) for index in checked_indices(found, total, what))


# ---- single trainings ----------------------------------------------------------------------------------------------


def single_object(name: str) -> str:
    """The stored object of a single training, by its key."""
    return f"{SINGLES_FOLDER}/{name}.safetensors"


def side(spec: SingleSpec) -> str:
    """What a single training is trained on, in words."""
    return "on all examples" if spec.left_out is None else f"without example {spec.left_out}"


def train(lab: Lab, store: Store, spec: SingleSpec) -> None:
    """Train one model and keep what it says of all training examples, or of the one that it never saw."""
    setting = spec.setting
    arrays = pipeline.train_single(lab, setting.model, setting.training.build(), spec.left_out, spec.seed)
    metadata = {"host": socket.gethostname(), "numerics": lab.subset_numerics}
    store.put(single_object(key(spec)), pack(arrays, metadata))


# ---- scores --------------------------------------------------------------------------------------------------------


def put_scores(store: Store, spec: ExactSpec, dataset: Dataset, selection: str = GIVEN) -> str:
    """Estimate exact scores from single trainings that are all in the store, keep them, and return their key.

    Of correctness and of the given label's probability, in that order. `selection` says how the examples were chosen:
    provenance, that of who asked first.
    """
    name = f"{TABLES_FOLDER}/{key(spec)}.parquet"
    if store.exists(name):
        return key(spec)
    with ThreadPoolExecutor(16) as threads:
        singles = list(threads.map(partial(_unpacked, store), spec.singles))
    chosen, seeds = np.array(spec.indices), spec.seeds
    membership = np.repeat([True, False], seeds)[:, None] & np.ones(len(chosen), dtype=bool)

    def outcomes(part: str) -> np.ndarray:
        rounds = [singles[start : start + 1 + len(chosen)] for start in range(0, len(singles), 1 + len(chosen))]
        with_all = [first[part][chosen] for first, *_ in rounds]
        without = [[single[part][0] for single in rest] for _, *rest in rounds]
        return np.array([*with_all, *without])

    tallied: dict[str, Tallied] = {
        "correctness": count(membership, outcomes("correct")),
        "probability": moments(membership, outcomes("probability").astype(np.float64)),
    }
    said = {
        "index": chosen,
        "label": dataset.split_labels("train")[chosen],
        "true_label": dataset.split_true_labels("train")[chosen],
    }
    parts = [
        pa.table({"estimator": [estimator] * len(chosen), **said, **vars(estimate(tally))}).select(_COLUMNS)
        for estimator, tally in tallied.items()
    ]
    facts = {
        "setting": key(spec.setting),
        "selection": selection,
        "accuracy": float(np.mean([single["accuracy"] for single in singles])),
        "test_accuracy": float(np.mean([single["test_accuracy"] for single in singles])),
        "model_seconds": float(np.sum([single["seconds"] for single in singles])),
    }
    results.put_table(store, name, pa.concat_tables(parts), {"facts": json.dumps(facts)})
    return key(spec)


def _unpacked(store: Store, single: SingleSpec) -> dict[str, np.ndarray]:
    return unpack(store, single_object(key(single)))
