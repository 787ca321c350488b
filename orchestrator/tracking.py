"""MLflow: rows become runs under one parent per sweep. Idempotent, replayable, and never in a sweep's way."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.registry import InputError, canonical_json
from orchestrator.results import Row, Sweep
from orchestrator.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "unlearn"
SWEEP_TAG, KEY_TAG, KIND_TAG = "unlearn.sweep", "unlearn.key", "unlearn.kind"
_QUEUE_SIZE = 10_000

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # the defaults keep a caller for minutes when the server is gone
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def tracking_uri(store: Store, given: str | None) -> str | None:
    """Where to track: what is given, else MLFLOW_TRACKING_URI, else SQLite beside a local store; None for nowhere."""
    if given == "none":
        return None
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    return f"sqlite:///{store.path('mlflow.db')}" if store.is_local else None


@dataclass
class Tracker:
    """Writes one sweep's rows to MLflow, each at most once: a run is known by (sweep key, run key)."""

    client: MlflowClient
    experiment_id: str
    sweep: Sweep
    _runs: dict[str, str] = field(default_factory=dict)  # run key -> MLflow run id
    _parent: str = ""

    def start(self) -> None:
        """Find what an earlier command wrote for this sweep, and the parent, or make it."""
        finished = set()
        for run in _search(self.client, self.experiment_id, f"tags.`{SWEEP_TAG}` = '{self.sweep.key}'"):
            if run.data.tags.get(KIND_TAG) == "sweep":
                self._parent = run.info.run_id
            elif run.info.status == "FINISHED":
                finished.add(run.data.tags[KEY_TAG])
                self._runs[run.data.tags[KEY_TAG]] = run.info.run_id
            else:  # left half-written by a driver that died: written again, under the same id
                self._runs.setdefault(run.data.tags[KEY_TAG], run.info.run_id)
        self._finished = finished
        if not self._parent:
            tags = {
                SWEEP_TAG: self.sweep.key,
                KIND_TAG: "sweep",
                "unlearn.recipe": self.sweep.recipe,
                "mlflow.runName": f"{self.sweep.recipe} {self.sweep.key[:8]}",
                "mlflow.note.content": f"{len(self.sweep.members)} runs of the recipe {self.sweep.recipe}",
            }
            self._parent = self.client.create_run(self.experiment_id, tags=tags).info.run_id
            self.client.log_dict(self._parent, dict(self.sweep.study), "study.json")
        else:
            self.client.update_run(self._parent, status="RUNNING")

    def write(self, row: Row, arm: str) -> bool:
        """Write a row as a child run; False where it is there already."""
        from mlflow.entities import Metric, Param

        if row.key in self._finished:
            return False
        stamp = int(row.provenance["finished_at"] * 1000)  # fixed, so that writing again adds no point
        run_id = self._runs.get(row.key) or self._create(row, arm, stamp)
        metrics = [Metric(name, value, stamp, 0) for name, value in flat_metrics(row).items()]
        metrics += [
            Metric(f"epoch/{name}", value, stamp, epoch)
            for name, values in row.series.items()
            for epoch, value in enumerate(values, 1)
        ]
        params = [Param(name, str(value)) for name, value in flat_params(row, arm).items()]
        self.client.log_batch(run_id, metrics=metrics, params=params)
        self.client.set_terminated(run_id, "FINISHED", end_time=stamp)
        self._finished.add(row.key)
        return True

    def _create(self, row: Row, arm: str, stamp: int) -> str:
        tags = {
            SWEEP_TAG: self.sweep.key,
            KEY_TAG: row.key,
            KIND_TAG: "run",
            "mlflow.parentRunId": self._parent,
            "mlflow.runName": f"{arm} {row.spec['forget']['rule']['name']} {row.key[:8]}",
        }
        if row.provenance.get("git_commit"):
            tags["mlflow.source.git.commit"] = str(row.provenance["git_commit"])
        begin = stamp - int(row.provenance["seconds"] * 1000)
        run_id: str = self.client.create_run(self.experiment_id, start_time=begin, tags=tags).info.run_id
        self._runs[row.key] = run_id
        return run_id

    def finish(self, status: str, artifacts: Iterable[str] = ()) -> None:
        """End the parent run as FINISHED, FAILED or KILLED, with files attached to it."""
        for path in artifacts:
            self.client.log_artifact(self._parent, path)
        self.client.set_terminated(self._parent, status)


def flat_params(row: Row, arm: str) -> dict[str, str | int | float | bool]:
    """A row's parameters by MLflow name; what is absent is left out."""
    spec, mask = row.spec, row.spec["mask"] or {}
    params = {
        "arm": arm,
        "data": row.provenance["data"],
        "model": row.provenance["model"],
        "forget_set": spec["forget"]["rule"]["name"],
        "forget_draw": spec["forget"]["draw"],
        "method": spec["method"]["name"],
        "strategy": mask["strategy"]["name"] if mask else None,
        "granularity": mask.get("granularity"),
        "budget": mask.get("budget"),
        "seed": spec["seed"],
        "original_seed": spec["original_seed"],
        "numerics": row.provenance["numerics"],
        **{f"option.{name}": value for name, value in spec["method"]["options"].items()},
        "training": canonical_json(spec["setting"]["training"]),
    }
    return {name: value for name, value in params.items() if value is not None}


def flat_metrics(row: Row) -> dict[str, float]:
    """A row's numbers by MLflow name: metrics by split, measurements, and the parameters that people filter by range
    (MLflow compares parameters as text)."""
    numbers = {f"{name}/{split}": value for name, values in row.metrics.items() for split, value in values.items()}
    numbers |= {f"measured/{name}": value for name, value in row.measurements.items()}
    numbers["measured/seconds"] = row.provenance["seconds"]
    axes = {"budget": (row.spec["mask"] or {}).get("budget"), "lr": row.spec["method"]["options"].get("lr")}
    return numbers | {f"param/{name}": value for name, value in axes.items() if value is not None}


_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


def connect(uri: str, store: Store, sweep: Sweep) -> Tracker:
    """A tracker for a sweep; raises InputError at once where MLflow does not answer at the URI."""
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    artifacts = f"file://{store.path('mlflow-artifacts')}" if uri.startswith("sqlite:") and store.is_local else None
    try:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            with contextlib.suppress(MlflowException):  # another command may make it at the same time
                client.create_experiment(EXPERIMENT, artifact_location=artifacts)
            experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise InputError(
                f"the MLflow experiment {EXPERIMENT!r} at {uri} is deleted; restore it, or use another server"
            )
        tracker = Tracker(client, experiment.experiment_id, sweep)
        tracker.start()
    except InputError:
        raise
    except Exception as error:  # mlflow raises whatever its store raises (sqlalchemy, requests, its own)
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0][:200]
        scheme = uri.partition(":")[0]
        if "://" in uri and scheme.partition("+")[0] not in _SCHEMES:
            raise InputError(f"--tracking-uri is {uri!r}; allowed: {', '.join(_SCHEMES)} addresses, or none") from None
        raise InputError(
            f"MLflow does not answer at {uri!r}: {reason}; start `mlflow server` there, or use --tracking-uri none "
            "and `unlearn track` later"
        ) from None
    return tracker


def _search(client: MlflowClient, experiment_id: str, filter_string: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment_id], filter_string, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


class LiveTracking:
    """Writes rows in a thread of its own: a slow or lost server never holds a sweep up; what is lost, `unlearn track`
    brings later. Rows that do not fit the bounded queue, or fail, are counted in `missed`."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.missed, self.error = tracker, 0, ""
        self._rows: queue.Queue[tuple[Row, str] | None] = queue.Queue(_QUEUE_SIZE)
        self._thread = threading.Thread(target=self._drain, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, row: Row, arm: str) -> None:
        try:
            self._rows.put_nowait((row, arm))
        except queue.Full:
            self.missed += 1

    def _drain(self) -> None:
        failures = 0
        while (item := self._rows.get()) is not None:
            if failures >= 3:  # the server is gone: what is left waits for `unlearn track`
                self.missed += 1
                continue
            try:
                self.tracker.write(*item)
                failures = 0
            except Exception as error:  # tracking never fails a sweep
                failures += 1
                self.missed += 1
                self.error = str(error).strip().split("\n", 1)[0][:200]

    def close(self, status: str, artifacts: Iterable[str] = ()) -> None:
        """Write what is queued, then end the parent run."""
        self._rows.put(None)
        self._thread.join()
        try:
            self.tracker.finish(status, artifacts)
        except Exception as error:  # as above
            self.missed += 1
            self.error = str(error).strip().split("\n", 1)[0][:200]


def replay(tracker: Tracker, rows: Iterable[Row], arms: Mapping[str, str]) -> int:
    """Write the rows that MLflow lacks; returns how many."""
    return sum(tracker.write(row, arms[row.key]) for row in rows)
