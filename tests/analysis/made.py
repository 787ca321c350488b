"""A made export of realistic size: what a demo with known effects could have written. No training, no project code."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestrator.schemas import SCHEMA_VERSION, TABLES

FORGET_SETS = {"random": 120, "mislabelled": 60, "most_memorized": 60}
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
ARMS: Mapping[str, tuple[tuple[float | None, ...], bool]] = {  # rates, masked
    "identity": ((None,), False),
    "retrain_short": ((0.1,), False),
    "del": ((0.03, 0.1), True),
    "random_within_tensor": ((0.03, 0.1), True),
    "salun": ((0.003, 0.01), True),
    "finetune": ((0.03, 0.1), False),
    "neg_grad_plus": ((0.01, 0.03), False),
    "random_labels": ((0.003, 0.01), False),
}
LEVELS = {"random": 0.94, "mislabelled": 0.02, "most_memorized": 0.48}  # the references' accuracy on the forget set
LAYERS = {"0.weight": 144, "1.weight": 16, "1.bias": 16, "3.weight": 4608, "7.weight": 9216, "12.weight": 320}

Lines = dict[str, list[dict[str, Any]]]


@dataclass
class Made:
    """The lines of every table; edit them, then `write`."""

    lines: Lines = field(default_factory=lambda: {name: [] for name in TABLES})

    def write(self, folder: Path, export_id: str = "0123456789abcdef", only: Iterable[str] = TABLES) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        footer = {"export_id": export_id, "schema_version": SCHEMA_VERSION}
        for name in only:
            table = pa.Table.from_pylist(self.lines[name], schema=TABLES[name])
            pq.write_table(table.replace_schema_metadata(footer), folder / f"{name}.parquet")
        return folder

    def run(self, arm: str, key: str, forget_set: str, seed: int, **columns: Any) -> None:
        """Add a run and its membership of the sweep."""
        rate = columns.get("learning_rate")
        line: dict[str, Any] = {
            "key": key,
            "status": "done",
            "data": "digits(label_noise=0.05)",
            "model": "small_cnn",
            "forget_set": forget_set,
            "forget_draw": 0,
            "method": {"reference": "retrain", "del": "reset_and_finetune"}.get(arm, arm),
            "seed": seed,
            "original_seed": None if arm in {"reference", "retrain_short"} else seed,
            "options": json.dumps({"epochs": 5} | ({} if rate is None else {"lr": rate})),
            "numerics": "cpu AVX2 torch-2.7.0 1-thread eager",
            "git_commit": "0f1e2d3c4b5a69788796a5b4c3d2e1f001234567",
        }
        self.lines["runs"].append(line | columns)
        self.lines["members"].append(
            {"sweep": "5eed" * 8, "recipe": "digits", "arm": arm, "key": key, "role": "reported"}
        )

    def measure(self, key: str, **values: float) -> None:
        """Add metrics named `<metric>__<split>`."""
        for name, value in values.items():
            metric, split = name.split("__")
            self.lines["metrics"].append({"key": key, "metric": metric, "split": split, "value": float(value)})

    def compare(self, key: str, reference: str, metric: str, split: str, value: float) -> None:
        line = {"key": key, "reference_key": reference, "metric": metric, "split": split, "value": float(value)}
        self.lines["comparisons"].append(line)


def tug_of_war(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Product of 1 - |gap| over forget, retain and test."""
    product = 1.0
    for a, b in zip(ours, theirs, strict=True):
        product *= 1 - abs(a - b)
    return product


def _level(arm: str, forget_set: str, budget: float | None, rate_place: int) -> tuple[float, float, float]:
    """Made forget, retain and test accuracy of a setting."""
    target = LEVELS[forget_set]
    kept = {"identity": 1.0, "finetune": 0.8 - 0.3 * rate_place, "neg_grad_plus": 0.6 - 0.4 * rate_place}
    kept |= {"random_labels": 0.75 - 0.3 * rate_place, "retrain_short": 0.0}
    if arm == "salun":
        share = 0.92 - 0.2 * rate_place - 0.3 * (budget or 0)
    elif arm in {"del", "random_within_tensor"}:
        share = 0.1 - 0.1 * rate_place + (0.02 if arm == "del" else 0.0)
    else:
        share = kept[arm]
    harm = {"identity": 0.0, "retrain_short": 0.015}.get(arm, 0.004)
    if arm in {"del", "random_within_tensor"}:
        harm = (0.10 if rate_place == 0 else 0.04) * (1 - 1.2 * (budget or 0))
    forget = target + share * (1 - target) - (harm if forget_set == "random" else 0)
    return forget, 0.998 - harm, 0.975 - harm


def _accuracies(rng: np.random.Generator, level: Sequence[float], size: int) -> tuple[float, float, float]:
    """Accuracies on so many forget, 1,100 retain and 400 test examples, with some spread among seeds."""
    counts = (size, 1140, 400)
    noisy = [float(np.clip(value + rng.normal(0, 0.008), 0, 1)) for value in level]
    forget, retain, test = (float(rng.binomial(n, p)) / n for p, n in zip(noisy, counts, strict=True))
    return forget, retain, test


def _metrics(made: Made, key: str, found: Sequence[float], forget_set: str, rng: np.random.Generator) -> None:
    forget, retain, test = found
    auc = 0.5 * forget + rng.normal(0, 0.01)
    made.measure(
        key,
        accuracy__forget=forget,
        accuracy__retain=retain,
        accuracy__test=test,
        accuracy__validation=test,
        accuracy__forget_true=1 - forget,
        membership_auc__forget=auc,
        published_svc_confidence__forget=1 - forget,
        published_svc_correctness__forget=1 - forget,
    )
    if forget_set == "random":
        made.measure(key, accuracy__forget_flipped=forget / 2, accuracy__forget_unflipped=forget)


def _pairs(made: Made, keys: Iterable[str], references: Iterable[str], accuracies: Mapping[str, Any]) -> None:
    references = list(references)
    for key in keys:
        for reference in references:
            if key != reference:
                ours, theirs = accuracies[key], accuracies[reference]
                made.compare(key, reference, "tug_of_war", "all", tug_of_war(ours, theirs))
                made.compare(key, reference, "disagreement", "forget", abs(ours[0] - theirs[0]) + 0.01)
                for split, a, b in zip(("forget", "retain", "test"), ours, theirs, strict=True):
                    made.compare(key, reference, "accuracy_difference", split, b - a)


def _layers(made: Made, key: str, budget: float) -> None:
    for place, (parameter, entries) in enumerate(LAYERS.items()):
        reset = int(entries * min(1.0, budget * 2.5 / (0.4 + place)))
        made.lines["layers"].append(
            {"key": key, "parameter": parameter, "entries": entries, "reset": reset, "trainable": reset}
        )


def sweep(num_references: int = 5, num_seeds: int = 3, forget_sets: Iterable[str] = FORGET_SETS) -> Made:
    """Make a sweep of 38 settings on each forget set, and 1,200 scores with 60 flipped labels."""
    rng, made = np.random.default_rng(0), Made()
    for forget_set in forget_sets:
        size = FORGET_SETS[forget_set]
        accuracies: dict[str, tuple[float, float, float]] = {}
        references = [f"reference-{forget_set}-{seed}" for seed in range(num_references)]
        for seed, key in enumerate(references):
            accuracies[key] = _accuracies(rng, (LEVELS[forget_set], 0.998, 0.975), size)
            made.run("reference", key, forget_set, seed, steps_ratio=1.0, seconds=1.6)
        for arm, (rates, masked) in ARMS.items():
            for place, rate in enumerate(rates):
                for budget in BUDGETS if masked else (None,):
                    for seed in range(num_seeds):
                        key = f"{arm}-{forget_set}-{rate}-{budget}-{seed}"
                        level = _level(arm, forget_set, budget, place)
                        accuracies[key] = _accuracies(rng, level, size)
                        realised = {} if budget is None else {"realised_budget": budget - 1e-5}
                        steps = None if arm == "identity" else 0.25
                        made.run(
                            arm, key, forget_set, seed, learning_rate=rate, budget=budget, steps_ratio=steps,
                            seconds=float(rng.uniform(0.3, 0.5)), strategy="weighted_gradient" if masked else None,
                            effective_budget=None if budget is None else budget + 0.02, **realised,
                        )  # fmt: skip
                        if budget is not None:
                            _layers(made, key, budget)
        for key, found in accuracies.items():
            _metrics(made, key, found, forget_set, rng)
        _pairs(made, accuracies, references, accuracies)
    _scores(made, rng)
    return made


def _scores(made: Made, rng: np.random.Generator, num_examples: int = 1200, num_flipped: int = 60) -> None:
    for index in range(num_examples):
        flipped = index % (num_examples // num_flipped) == 7
        true = int(rng.integers(10))
        label = (true + int(rng.integers(1, 10))) % 10 if flipped else true
        rate = rng.beta(0.2, 12) if flipped else rng.beta(2, 4) if rng.random() < 0.04 else rng.beta(18, 0.4)
        out = float(rng.binomial(60, rate)) / 60
        within = float(rng.binomial(140, 0.985 if flipped else 0.9995)) / 140
        made.lines["memorization"].append(
            {
                "scores_key": "5c0e" * 8, "index": index, "label": label, "true_label": true, "in_mean": within,
                "out_mean": out, "score": within - out, "standard_error": 0.02, "low": within - out - 0.05,
                "high": within - out + 0.05, "num_in": 140, "num_out": 60,
            }
        )  # fmt: skip
    highest = sorted(made.lines["memorization"], key=lambda line: -line["score"])[:25]
    for line in highest:
        names = {"label_name": str(line["label"]), "true_label_name": str(line["true_label"])}
        image = {"scores_key": line["scores_key"], "index": line["index"], "png": digit(line["true_label"], rng)}
        made.lines["examples"].append(image | names)


def digit(number: int, rng: np.random.Generator) -> bytes:
    """An 8 x 8 grey image, as PNG, with so many bright columns."""
    pixels = rng.integers(0, 60, (8, 8)).astype(np.uint8)
    pixels[1:7, : min(8, number)] = 220
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
