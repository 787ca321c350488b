"""Runs of a work order on a machine without a store: no Ray, MLflow or pydantic, only torch, numpy and a data reader.

`unlearn pack` writes the order, `python -m orchestrator.offline order.json --out DIR` performs it (on a borrowed
accelerator, say), `unlearn unpack` brings what it wrote into a store, where it is like any other result.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator import pipeline
from orchestrator.data import DATASETS, Dataset, Splits
from orchestrator.localization import Scores, rank
from orchestrator.models import MODELS, head_names
from orchestrator.pipeline import Finished, Lab
from orchestrator.registry import Chosen, InputError, Plugin, load_plugin
from orchestrator.seeds import generator
from orchestrator.stages import PlainStage, StageMask
from orchestrator.training import Mask, Training

FORMAT = 1  # of parts
ORDER_FORMAT = 2
_KEPT_SCORES = 16  # each as large as the model
PART_BYTES = 12 * 2**20  # a part is closed when the outputs in it reach this size,
PART_SECONDS = 100.0  # or when it is this old: what is in it is lost with the process
_ORDER_FIELDS = {
    "format",
    "recipe",
    "study",
    "data",
    "fingerprint",
    "plugins",
    "git_commit",
    "labels",
    "forget_sets",
    "memorization",
    "runs",
}

_RUN_FIELDS = {"id", "arm", "spec", "forget", "memorization", "localizations"}


@dataclass(frozen=True)
class Order:
    """Runs to perform, in plain values.

    data: a data set by name and options. labels: their digest. forget_sets: key -> training indices. memorization:
    key -> one value for each index of a forget set. runs: each with `id` (its key), `arm`, `spec` (as JSON), `forget`
    (a key of forget_sets), `memorization` (a key, or None) and `localizations`: the specs of its localization, base
    first.
    """

    format: int
    recipe: str
    study: Mapping[str, Any]
    data: Mapping[str, Any]
    fingerprint: str
    plugins: Sequence[Mapping[str, Any]]
    git_commit: str | None
    labels: str
    forget_sets: Mapping[str, list[int]]
    memorization: Mapping[str, list[float]]
    runs: Sequence[Mapping[str, Any]]


def load_plugins(plugins: Sequence[Mapping[str, Any]]) -> None:
    """Load the modules that an order or a part carries."""
    for plugin in plugins:
        try:
            made = Plugin(**plugin)
        except TypeError:
            raise InputError("a plugin in it is not whole; run `unlearn pack` again") from None
        load_plugin(made)


def read_order(path: Path) -> Order:
    """An order from a file; InputError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != ORDER_FORMAT or set(content) != _ORDER_FIELDS:
            raise InputError(f"{path} is an order of another version of this code; run `unlearn pack` again")
        order = Order(**content)
        for run in order.runs:
            if not set(run) >= _RUN_FIELDS or run["forget"] not in order.forget_sets:
                raise InputError(
                    f"{path} is damaged: run {str(run.get('id'))[:8]} is not whole; run `unlearn pack` again"
                )
        return order
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
        values = None
        if run["memorization"] is not None:
            values = np.array(self.order.memorization[run["memorization"]])
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
            memorization=values,
            stages=[_stage(stage) for stage in spec["stages"]],
        )
        return finished, seconds

    def start_anew(self) -> None:
        """Drop what a run that failed may have left changed; it is cut and loaded anew."""
        self.lab.forget()
        self._splits.clear()
        self._originals.clear()

    def _cut(self, name: str) -> tuple[np.ndarray, Splits]:
        if name not in self._splits:
            self._splits.clear()  # one forget set at a time: it is a copy of the training set
            indices = np.array(self.order.forget_sets[name], dtype=np.int64)
            self._splits[name] = indices, pipeline.split_examples(self.lab, indices)
        return self._splits[name]

    def _original(self, model: Chosen, training: Training, seed: int) -> nn.Module:
        named = [self.lab.dataset.fingerprint, asdict(model), MODELS[model.name].version, asdict(training), seed]
        text = json.dumps([*named, self.lab.numerics], sort_keys=True)
        name = f"original-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
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


def _stage(stage: Mapping[str, Any]) -> PlainStage:
    mask = stage["mask"]
    if mask is not None:
        base = None if mask["base"] is None else _chosen(mask["base"])
        mask = StageMask(**{**mask, "strategy": _chosen(mask["strategy"]), "base": base})
    return PlainStage(_chosen(stage["method"]), mask)


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
    _failed: list[dict[str, Any]] = field(default_factory=list)
    _opened: float = field(default_factory=time.monotonic)

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
        late = time.monotonic() - self._opened > PART_SECONDS
        if late or sum(array.nbytes for array in self._arrays.values()) >= PART_BYTES:
            self.close()

    def fail(self, run: Mapping[str, Any], error: str, trace: str) -> None:
        """Keep a run that came to nothing."""
        facts = {field: run[field] for field in ("id", "arm", "spec")}
        self._failed.append({**facts, "error": error, "traceback": trace, "time": time.time()})

    def close(self) -> None:
        """Write what has come since the last part, if anything has, and remember that it is done."""
        if not self._runs and not self._failed:
            return
        order: dict[str, Any] = {
            "recipe": self.order.recipe,
            "study": self.order.study,
            "git_commit": self.order.git_commit,
        }
        order |= {"plugins": self.order.plugins, "runs": self._runs, "failed": self._failed}
        text = json.dumps({"format": FORMAT, **order, **self.facts})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, json=np.frombuffer(text.encode(), dtype=np.uint8), **self._arrays)  # type: ignore[arg-type]
        first = (self._runs or self._failed)[0]
        _whole(self.folder / f"part-{first['id'][:12]}.npz", buffer.getvalue())
        self.done |= {run["id"] for run in self._runs}
        _whole(self.remembered, "\n".join(sorted(self.done)).encode())
        self._arrays, self._runs, self._failed = {}, [], []
        self._opened = time.monotonic()


def perform(
    order: Order,
    dataset: Dataset,
    out: Path,
    scratch: Path,
    *,
    device: str,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> tuple[int, int]:
    """Perform an order's runs that `scratch` does not remember as done; returns how many are left, and how many failed.

    `seconds`: no run begins that would, at the length of the longest so far, end later. A run that fails is kept as
    such, and the others go on; what is finished is written whatever ends this. Raises InputError for a forget set
    that does not fit the data.
    """
    _check_indices(order, dataset)
    lab = Lab(dataset, device)
    remembered = scratch / f"done-{dataset.fingerprint[:16]}.txt"
    done = set(remembered.read_text().split()) if remembered.is_file() else set()
    todo = [run for run in order.runs if run["id"] not in done]
    if len(todo) < len(order.runs):
        earlier = f"{len(order.runs) - len(todo)} runs were done before, their parts written then"
        say(f"{earlier} (remove {remembered} to do them again)")
    worker = Performer(order, lab, scratch)
    facts = {"fingerprint": dataset.fingerprint, "numerics": lab.numerics, "host": platform.node()}
    parts = Parts(out, order, facts, remembered, done)
    begin, longest, tried, failed = time.perf_counter(), 0.0, 0, 0
    try:
        for number, run in enumerate(todo):
            start = time.perf_counter()
            if seconds is not None and number and start - begin + longest > seconds:
                break
            said = f"{number + 1}/{len(todo)} {run['arm']} on {run['spec']['forget']['rule']['name']}"
            try:
                with pipeline.steady(device):
                    results, cost = worker.perform(run)
            except (Exception, SystemExit) as error:  # one failed run is a result: the others go on
                failed += 1
                worker.start_anew()
                parts.fail(run, f"{type(error).__name__}: {error}", traceback.format_exc())
                say(f"{said}: failed, {type(error).__name__}: {error}")
            else:
                parts.add(run, results, cost)
                say(f"{said}: {time.perf_counter() - start:.1f} s")
            tried += 1
            longest = max(longest, time.perf_counter() - start)
    finally:
        parts.close()
    return len(todo) - tried, failed


def _check_indices(order: Order, dataset: Dataset) -> None:
    size = len(dataset.splits["train"])
    for indices in order.forget_sets.values():
        if not indices or min(indices) < 0 or max(indices) >= size:
            raise InputError(
                f"a forget set of the order does not fit these data; allowed: indices from 0 to {size - 1}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every run is done, 1 when some failed, 3 when the time ran out before, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.offline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("order", type=Path, help="what `unlearn pack` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts that `unlearn unpack` reads")
    parser.add_argument(
        "--scratch", type=Path, default=Path("scratch"), help="folder for originals, kept between calls"
    )
    parser.add_argument("--data", action="append", default=[], metavar="OPTION=VALUE", help="where the data lie here")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=sorted({device, "cpu"}))
    parser.add_argument("--seconds", type=float, help="begin no run that would end later")
    given = parser.parse_args(arguments)
    try:
        order = read_order(given.order)
        load_plugins(order.plugins)
        dataset = _dataset(order, given.data)
        if labels_digest(dataset) != order.labels:
            raise InputError("the labels here are not those of the order, which drew its forget sets; check --data")
        if dataset.fingerprint != order.fingerprint:
            print("the pixels here differ from those of the order: its runs will have keys of their own", flush=True)
        _check_folders(given.out, given.scratch)
        say = partial(print, flush=True)
        options = {"device": given.device, "seconds": given.seconds, "say": say}
        left, failed = perform(order, dataset, given.out, given.scratch, **options)
    except InputError as error:
        print(f"offline: {error}", file=sys.stderr)
        return 2
    if failed:
        print(f"{failed} runs failed", flush=True)
    print(f"{left} runs are left" if left else "all other runs are done" if failed else "all runs are done", flush=True)
    return 3 if left else 1 if failed else 0


def _check_folders(*folders: Path) -> None:
    """Refuse a folder that cannot be written to, before anything is trained."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / "probe.partial"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"{folder} cannot be written to: {error.strerror}; name another folder") from None


def labels_digest(dataset: Dataset) -> str:
    """What of a data set forget sets are drawn by: the labels of each split, given and true."""
    digest = hashlib.sha256()
    for split in ("train", "validation", "test"):
        for labels in (dataset.split_labels(split), dataset.split_true_labels(split)):
            digest.update(f"{split}:{len(labels)}:".encode() + np.ascontiguousarray(labels, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _dataset(order: Order, overrides: Sequence[str]) -> Dataset:
    entry = DATASETS[order.data["name"]]
    changes = dict(text.partition("=")[::2] for text in overrides)
    try:
        dataset: Dataset = entry({}, entry.resolve({**order.data["options"], **changes}))
    except ModuleNotFoundError as error:
        raise InputError(f"data set {entry.name} needs {error.name}, which is not installed here") from None
    return dataset


if __name__ == "__main__":
    sys.exit(main())
