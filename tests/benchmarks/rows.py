"""10,000 finished rows: seconds of a complete sweep's command (with and without MLflow), and of an export.

The rows are those of the recipe `digits` with many seeds: real specs and keys, made metrics, and outputs of the size
that digits have. `python -m tests.benchmarks.rows [--seeds 132] [--storage FOLDER] [--mlflow]`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from jobs import sweep, track
from jobs.session import Options, open_session
from orchestrator import export, results
from orchestrator.data import Outputs, SplitOutputs
from orchestrator.metrics import METRICS, Values
from orchestrator.pipeline import Layer
from orchestrator.specs import RunSpec, key
from orchestrator.store import Store


def options(storage: str, seeds: int, uri: str) -> Options:
    given = [f"seeds={','.join(map(str, range(seeds)))}", "forget_sets=random,mislabelled", "references=5"]
    return Options("digits", given, storage, tracking_uri=uri, workers=1)


def made_outputs(rng: np.random.Generator) -> Outputs:
    """Outputs of the size of digits, with the mistakes of an ordinary model."""
    found = {}
    for split, size in (("forget", 60), ("retain", 1200), ("validation", 180), ("test", 357)):
        labels = rng.integers(10, size=size)
        logits = rng.normal(size=(size, 10)) + 4 * np.eye(10)[labels]
        found[split] = SplitOutputs(logits.astype(np.float16), labels, labels)
    return found


def put(store: Store, values: Values, numbered: tuple[int, RunSpec]) -> None:
    """One made row and its outputs."""
    number, spec = numbered
    rng, name = np.random.default_rng(number), key(spec)
    row = results.Row(
        key=name,
        spec=spec.model_dump(mode="json"),
        metrics={metric: {split: rng.random() for split in by_split} for metric, by_split in values.items()},
        metric_versions={metric: METRICS[metric].version for metric in METRICS},
        series={"loss": list(rng.random(10))},
        measurements={"steps": 100.0, "steps_ratio": 0.1, "realised_budget": 0.3, "moved": 900.0},
        layers=tuple(Layer(f"layer{n}.weight", 1000, 100, 900, 950) for n in range(6)),
        provenance={
            "data": "digits",
            "model": "small_cnn",
            "seconds": 0.3,
            "numerics": "made",
            "git_commit": None,
            "host": "made",
            "finished_at": 1.8e9 + number,
            results.COMPARABLE: results.comparable(spec.setting, spec.forget),
        },
    )
    results.put_outputs(store, name, made_outputs(rng))
    results.put_row(store, row)


def fill(given: Options) -> int:
    """Put a made row for every run of the study, in a store without any; returns how many there are."""
    plan = open_session(given).plan
    specs = [task.spec for task in (*plan.references(), *plan.runs())]
    values = {name: METRICS[name]({"outputs": made_outputs(np.random.default_rng(0))}, {}) for name in METRICS}
    numbered = [(number, spec) for number, spec in enumerate(specs) if isinstance(spec, RunSpec)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(partial(put, Store(given.storage), values), numbered))
    results.put_sweep(Store(given.storage), plan.sweep({"created_at": 0.0}))
    return len(numbered)


def timed(what: str, action: Callable[[], object]) -> float:
    """Seconds that it took, printed."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        action()
    seconds = time.perf_counter() - start
    print(f"{what}: {seconds:.1f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=132)
    parser.add_argument("--storage")
    parser.add_argument("--mlflow", action="store_true", help="first bring MLflow level, which takes ten minutes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storage = arguments.storage or folder
        given = options(storage, arguments.seeds, "none")
        if not (Path(storage) / "rows").exists():
            start = time.perf_counter()
            print(f"{fill(given)} rows made in {time.perf_counter() - start:.1f} s", flush=True)
        store = Store(storage)
        timed("export", lambda: export.export(store))
        timed("complete sweep, no MLflow", lambda: sweep.run(given))
        if not arguments.mlflow:
            return
        uri = f"sqlite:///{storage}/mlflow.db"
        timed("unlearn track, all rows new", lambda: track.run(storage, uri))
        timed("complete sweep, MLflow is level", lambda: sweep.run(options(storage, arguments.seeds, uri)))


if __name__ == "__main__":
    main()
