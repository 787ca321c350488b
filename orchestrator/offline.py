"""Runs of a work order on a machine without a store: no Ray, MLflow or pydantic, only torch and numpy.

`unlearn pack` writes the order, `python -m orchestrator.offline order.json --out DIR` performs it (on a borrowed
accelerator, say), `unlearn unpack` brings what it wrote into a store, where it is like any other result.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator import pipeline
from orchestrator.data import DATASETS, Dataset, Splits
from orchestrator.localization import Scores, rank
from orchestrator.models import head_names
from orchestrator.pipeline import Finished, Lab
from orchestrator.registry import Chosen, InputError, Plugin, load_plugin
from orchestrator.seeds import generator
from orchestrator.training import Mask, Training

FORMAT = 1
_KEPT_SCORES = 16  # each as large as the model
PART_BYTES = 12 * 2**20  # a part is closed when the outputs in it reach this size
_ORDER_FIELDS = {"format", "recipe", "study", "data", "fingerprint", "plugins", "git_commit", "forget_sets", "runs"}


@dataclass(frozen=True)
class Order:
    """Runs to perform, in plain values.

    data: a data set by name and options. forget_sets: key -> training indices. runs: each with `id` (its key),
    `arm`, `spec` (as JSON), `forget` (a key of forget_sets) and `localizations`: the specs of its localization, base
    first.
    """

    format: int
    recipe: str
    study: Mapping[str, Any]
    data: Mapping[str, Any]
    fingerprint: str
    plugins: Sequence[Mapping[str, Any]]
    git_commit: str | None
    forget_sets: Mapping[str, list[int]]
    runs: Sequence[Mapping[str, Any]]


def read_order(path: Path) -> Order:
    """An order from a file; InputError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or set(content) != _ORDER_FIELDS:
            raise InputError(f"{path} is an order of another version of this code; run `unlearn pack` again")
        return Order(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no work order ({error}); `unlearn pack` writes one") from None


@dataclass
class Performer:
    """Performs runs one after another; originals and scores are kept in memory, and originals in `scratch` too."""

    order: Order
    lab: Lab
    scratch: Path
    _originals: dict[str, nn.Module] = field(default_factory=dict)
    _scores: dict[str, tuple[Scores, float]] = field(default_factory=dict)
    _splits: dict[str, tuple[np.ndarray, Splits]] = field(default_factory=dict)

    def perform(self, run: Mapping[str, Any]) -> tuple[Finished, float | None]:
        """A run's results, and the seconds that its localization cost."""
        spec = run["spec"]
        model, training = _chosen(spec["setting"]["model"]), Training(**spec["setting"]["training"])
        forget, splits = self._cut(run["forget"])
        original = None
        if spec["original_seed"] is not None:
            original = self._original(model, training, spec["original_seed"])
        mask, seconds = None, None
        if spec["mask"] is not None and original is not None:
            mask, seconds = self._mask(run, original, splits)
        finished = pipeline.run(
            self.lab,
            model,
            training,
            _chosen(spec["method"]),
            forget=forget,
            splits=splits,
            original=original,
            original_seed=spec["original_seed"],
            mask=mask,
            seed=spec["seed"],
        )
        return finished, seconds

    def _cut(self, name: str) -> tuple[np.ndarray, Splits]:
        if name not in self._splits:
            self._splits.clear()  # one forget set at a time: it is a copy of the training set
            indices = np.array(self.order.forget_sets[name], dtype=np.int64)
            self._splits[name] = indices, pipeline.split_examples(self.lab, indices)
        return self._splits[name]

    def _original(self, model: Chosen, training: Training, seed: int) -> nn.Module:
        name = f"original-{seed}"
        if name not in self._originals:
            made = self.lab.fresh(model)(generator(seed, "original"))
            path = self.scratch / f"{name}.pt"
            if path.is_file():
                made.load_state_dict(torch.load(path, map_location=self.lab.device, weights_only=True))
            else:
                made = pipeline.train_original(self.lab, model, training, seed)
                _whole(path, _saved(made))
            self._originals[name] = made
        return self._originals[name]

    def _mask(self, run: Mapping[str, Any], original: nn.Module, splits: Splits) -> tuple[Mask, float]:
        scores, seconds = self._score(run, original, splits)
        asked = run["spec"]["mask"]
        mask = rank(scores, asked["granularity"], asked["h"]).mask(
            asked["budget"],
            head=head_names(original),
            train_head=asked["train_head"],
            freeze_statistics=asked["freeze_statistics"],
        )
        return mask, seconds

    def _score(self, run: Mapping[str, Any], original: nn.Module, splits: Splits) -> tuple[Scores, float]:
        base: Scores | None = None
        scores: Scores = {}
        seconds = 0.0
        for part in run["localizations"]:  # the base first, then what builds on it
            name = json.dumps([part, run["forget"], run["spec"]["original_seed"]], sort_keys=True)
            if name not in self._scores:
                while len(self._scores) >= _KEPT_SCORES:
                    del self._scores[next(iter(self._scores))]
                start = time.perf_counter()
                made = pipeline.score(
                    _chosen(part["strategy"]),
                    original,
                    splits,
                    seed=part["seed"] or 0,
                    granularity=part["granularity"],
                    base=base,
                )
                self._scores[name] = made, time.perf_counter() - start
            scores, seconds = self._scores[name]
            base = scores
        return scores, seconds


def _chosen(part: Mapping[str, Any]) -> Chosen:
    return Chosen(part["name"], part["options"])


def _saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def _whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(content)
    temporary.replace(path)


@dataclass
class Parts:
    """Writes finished runs into files of a bounded size, each whole or not at all: arrays and one JSON text."""

    folder: Path
    order: Order
    facts: Mapping[str, Any]
    remembered: Path
    done: set[str]
    _arrays: dict[str, np.ndarray] = field(default_factory=dict)
    _runs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, run: Mapping[str, Any], finished: Finished, localization_seconds: float | None) -> None:
        name = run["id"]
        for split, part in finished.outputs.items():
            for kind, array in (("logits", part.logits), ("labels", part.labels), ("true_labels", part.true_labels)):
                self._arrays[f"{name}/{split}/{kind}"] = array if kind == "logits" else array.astype(np.int16)
        self._runs.append(
            {
                **{field: run[field] for field in ("id", "arm", "spec")},
                "series": dict(finished.series),
                "measurements": dict(finished.measurements),
                "layers": [asdict(layer) for layer in finished.layers],
                "seconds": finished.seconds,
                "localization_seconds": localization_seconds,
                "finished_at": time.time(),
            }
        )
        if sum(array.nbytes for array in self._arrays.values()) >= PART_BYTES:
            self.close()

    def close(self) -> None:
        """Write what has come since the last part, if anything has, and remember that it is done."""
        if not self._runs:
            return
        order = {"recipe": self.order.recipe, "study": self.order.study, "git_commit": self.order.git_commit}
        text = json.dumps({"format": FORMAT, **order, **self.facts, "runs": self._runs, "plugins": self.order.plugins})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, json=np.frombuffer(text.encode(), dtype=np.uint8), **self._arrays)  # type: ignore[arg-type]
        _whole(self.folder / f"part-{self._runs[0]['id'][:12]}.npz", buffer.getvalue())
        self.done |= {run["id"] for run in self._runs}
        _whole(self.remembered, "\n".join(sorted(self.done)).encode())
        self._arrays, self._runs = {}, []


def perform(
    order: Order,
    dataset: Dataset,
    out: Path,
    scratch: Path,
    *,
    device: str,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Perform an order's runs that `scratch` does not remember as done; returns how many are left.

    `seconds`: no run begins that would, at the length of the longest so far, end later.
    """
    lab = Lab(dataset, device)
    remembered = scratch / "done.txt"
    done = set(remembered.read_text().split()) if remembered.is_file() else set()
    todo = [run for run in order.runs if run["id"] not in done]
    worker = Performer(order, lab, scratch)
    facts = {"fingerprint": dataset.fingerprint, "numerics": lab.numerics, "host": platform.node()}
    parts = Parts(out, order, facts, remembered, done)
    begin, longest, finished = time.perf_counter(), 0.0, 0
    for number, run in enumerate(todo):
        start = time.perf_counter()
        if seconds is not None and number and start - begin + longest > seconds:
            break
        with pipeline.single_thread() if device == "cpu" else nullcontext():
            results, cost = worker.perform(run)
        parts.add(run, results, cost)
        finished += 1
        spent = time.perf_counter() - start
        longest = max(longest, spent)
        say(f"{number + 1}/{len(todo)} {run['arm']} on {run['spec']['forget']['rule']['name']}: {spent:.1f} s")
    parts.close()
    return len(todo) - finished


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every run is done, 3 when the time ran out before, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.offline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("order", type=Path, help="what `unlearn pack` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts that `unlearn unpack` reads")
    parser.add_argument(
        "--scratch", type=Path, default=Path("scratch"), help="folder for originals, kept between calls"
    )
    parser.add_argument("--data", action="append", default=[], metavar="OPTION=VALUE", help="where the data lie here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="begin no run that would end later")
    given = parser.parse_args(arguments)
    try:
        order = read_order(given.order)
        for plugin in order.plugins:
            load_plugin(Plugin(**plugin))
        dataset = _dataset(order, given.data)
        if dataset.fingerprint != order.fingerprint:
            print("the data here differ from those of the order: its runs will have keys of their own", flush=True)
        options = {"device": given.device, "seconds": given.seconds}
        left = perform(order, dataset, given.out, given.scratch, **options, say=lambda text: print(text, flush=True))
    except InputError as error:
        print(f"offline: {error}", file=sys.stderr)
        return 2
    print(f"{left} runs are left" if left else "all runs are done", flush=True)
    return 3 if left else 0


def _dataset(order: Order, overrides: Sequence[str]) -> Dataset:
    entry = DATASETS[order.data["name"]]
    changes = dict(text.partition("=")[::2] for text in overrides)
    dataset: Dataset = entry({}, entry.resolve({**order.data["options"], **changes}))
    return dataset


if __name__ == "__main__":
    sys.exit(main())
