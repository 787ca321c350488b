"""What a trial costs beyond its work: ours, store and MLflow included, against plain Tune with Ray's MLflow callback.

Each trial works for 0.3 s (it sleeps). Ours then puts outputs and a row of the size that digits have into a store, and
the driver has the row written to `mlflow server` (SQLite, on this machine), live. The rival is a plain Tune function,
at Tune's defaults, that reports the same numbers once at its end, with Ray's own MLflowLoggerCallback on the same
server; it stores nothing, and runs fewer trials. From the first trial's end, so start-up is apart; to the moment at
which MLflow has the last row. `python -m tests.benchmarks.trials [--trials 500] [--rival-trials 60] [--rounds 1]`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from jobs.session import Options, open_session
from jobs.tracked import LiveTracking
from orchestrator import logged, results
from orchestrator.cluster import Cluster, ray_cluster
from orchestrator.metrics import METRICS
from orchestrator.results import Sweep
from orchestrator.specs import RunSpec, key
from orchestrator.store import Store
from orchestrator.tracking import connect
from tests.benchmarks.rows import Values, made_outputs, options, put
from tests.servers import mlflow_server

SECONDS, WORKERS = 0.3, 4


def work(made: tuple[Store, Values], item: tuple[int, RunSpec]) -> str:
    """A trial of ours: the work, then outputs and row."""
    time.sleep(SECONDS)
    put(*made, item)
    return key(item[1])


def ours(cluster: Cluster, given: Options, values: Values, url: str, count: int) -> tuple[float, float]:
    """Seconds beyond the work per trial and slot: to the last result, and until MLflow has all."""
    from orchestrator.sweep import run_trials

    session = open_session(given)
    specs = [task.spec for task in session.plan.runs() if isinstance(task.spec, RunSpec)][:count]
    assert len(specs) == count
    sweep: Sweep = replace(session.plan.sweep({"created_at": time.time()}), key=uuid.uuid4().hex)
    members = {member.key: member for member in sweep.members}
    live, times = LiveTracking(connect(url, session.store, sweep, live=True), session.store), list[float]()

    def done(name: str) -> None:
        live.put([name], members)
        times.append(time.perf_counter())

    run_trials(
        work,
        list(enumerate(specs)),
        setup=lambda: (Store(given.storage), values),
        inputs=(),
        workers=cluster.workers,
        gpus_per_worker=0.0,
        done=done,
    )
    live.end(partial(live.tracker.finish, "FINISHED"))
    assert len(times) == count
    assert not live.missing, live.error
    return tuple(_beyond(times[0], last, count, cluster.workers) for last in (times[-1], time.perf_counter()))  # type: ignore[return-value]


def _beyond(first: float, last: float, count: int, workers: int) -> float:
    return (last - first) * workers / (count - 1) - SECONDS


def rival(cluster: Cluster, url: str, config: Mapping[str, Any], numbers: Mapping[str, float], count: int) -> float:
    """The same of the rival: a sweep as a user of Tune and MLflow writes it."""
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    ours_only = [name for name in os.environ if name.startswith(("TUNE_", "MLFLOW_")) or name == "RAY_AIR_NEW_OUTPUT"]
    kept = {name: os.environ.pop(name) for name in ours_only}

    def trainable(config: dict[str, Any]) -> None:
        time.sleep(SECONDS)
        tune.report(dict(numbers))

    times = list[float]()

    class Ends(tune.Callback):
        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        callbacks = [MLflowLoggerCallback(tracking_uri=url, experiment_name=uuid.uuid4().hex), Ends()]
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={**config, "index": tune.grid_search(list(range(count)))},
            run_config=tune.RunConfig(storage_path=folder, callbacks=callbacks, verbose=0),
        ).fit()
    os.environ.update(kept)
    assert len(times) == count
    return _beyond(times[0], times[-1], count, cluster.workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--rival-trials", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    values = {name: METRICS[name]({"outputs": made_outputs(np.random.default_rng(0))}, {}) for name in METRICS}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        cluster = stack.enter_context(ray_cluster(workers=WORKERS))
        server = stack.enter_context(mlflow_server(f"sqlite:///{folder}/server.db", f"{folder}/artifacts"))
        ours(cluster, options(f"{folder}/warm", 1, "none"), values, server.url, 8)  # what is imported once
        for number in range(arguments.rounds):
            given = options(f"{folder}/{number}", -(-arguments.trials // 70), "none")
            results_in, all_in = ours(cluster, given, values, server.url, arguments.trials)
            store = Store(given.storage)
            row = results.get_row(store, min(results.row_keys(store)))
            typed = logged.typed_params(row, "del")
            numbers = {name.replace("/", "."): v for name, v in logged.numbers(row, typed).items()}
            theirs = rival(cluster, server.url, typed, numbers, arguments.rival_trials)
            print(
                f"{arguments.trials} trials of {SECONDS} s on {cluster.workers} workers: {results_in:.3f} s beyond "
                f"the work per trial and slot, {all_in:.3f} s until MLflow had all of them; plain Tune with Ray's "
                f"MLflow callback ({arguments.rival_trials} trials): {theirs:.3f} s; ratio {theirs / all_in:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
