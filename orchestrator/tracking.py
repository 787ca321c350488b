"""MLflow: a sweep's rows become runs under one parent, a campaign one run. Idempotent, replayable, never in the way."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.costs import Point, Stretch
from orchestrator.registry import InputError, canonical_json
from orchestrator.results import Role, Row, Sweep
from orchestrator.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "unlearn"
SWEEP_TAG, KEY_TAG, KIND_TAG = "unlearn.sweep", "unlearn.key", "unlearn.kind"
ROLE_TAG = "unlearn.role"  # of a sweep's runs: reported, confirmed, or tuning, which settings were chosen by
CAMPAIGN_TAG, SCORES_TAG, GATE_TAG = "unlearn.campaign", "unlearn.scores", "unlearn.gate"
_LAST_SECONDS = 60.0  # for what is queued when a command ends
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

    def write(self, row: Row, arm: str, role: Role = "reported") -> bool:
        """Write a row as a child run; False where it is there already."""
        from mlflow.entities import Metric, Param

        if row.key in self._finished:
            return False
        stamp = int(row.provenance["finished_at"] * 1000)  # fixed, so that writing again adds no point
        run_id = self._runs.get(row.key) or self._create(row, arm, role, stamp)
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

    def _create(self, row: Row, arm: str, role: Role, stamp: int) -> str:
        tags = {
            SWEEP_TAG: self.sweep.key,
            KEY_TAG: row.key,
            KIND_TAG: "run",
            ROLE_TAG: role,
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


@dataclass
class CampaignTracker:
    """Writes one campaign to MLflow: a single run, known by the campaign's key, that goes on as the campaign grows."""

    client: MlflowClient
    experiment_id: str
    stretch: Stretch
    _run: str = ""

    def start(self) -> None:
        """Find the campaign's run, or make it."""
        from mlflow.entities import Param

        campaign = self.stretch.campaign
        found = next(_search(self.client, self.experiment_id, f"tags.`{CAMPAIGN_TAG}` = '{campaign}'"), None)
        if found is None:
            recipe = self.stretch.recipe
            tags = {
                CAMPAIGN_TAG: str(campaign),
                KIND_TAG: "campaign",
                "unlearn.recipe": recipe,
                "mlflow.runName": f"{recipe} campaign {str(campaign)[:8]}",
                "mlflow.note.content": "Subset models of one memorization estimate; a step is the number of models.",
            }
            begin = int(self.stretch.created * 1000)
            found = self.client.create_run(self.experiment_id, start_time=begin, tags=tags)
        else:
            self.client.update_run(found.info.run_id, status="RUNNING")
        self._run = found.info.run_id
        known = found.data.params
        params = [Param(n, str(v)) for n, v in campaign_params(self.stretch).items() if n not in known]
        if params:
            self.client.log_batch(self._run, params=params)

    def write(self, points: Sequence[Point]) -> None:
        """Write points; MLflow keeps one that it has already as it is, since moment, step and value are the same."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(point.time * 1000), point.models)
            for point in points
            for name, value in point.values.items()
        ]
        self.client.log_batch(self._run, metrics=metrics)

    def num_points(self) -> int:
        """How many points MLflow holds."""
        return len(self.client.get_metric_history(self._run, POINT_METRIC))

    def finish(self, stretch: Stretch, artifacts: Mapping[str, bytes]) -> None:
        """Say what the campaign came to and end the run, with files of these names attached to it."""
        if stretch.scores_key is not None:
            self.client.set_tag(self._run, SCORES_TAG, stretch.scores_key)
            self.client.set_tag(self._run, GATE_TAG, "passed" if stretch.passes_gate else "failed")
        with tempfile.TemporaryDirectory() as folder:
            for name, content in artifacts.items():
                (Path(folder) / name).write_bytes(content)
                self.client.log_artifact(self._run, str(Path(folder) / name))
        status = {"finished": "FINISHED", "failed": "FAILED"}.get(stretch.status, "KILLED")
        self.client.set_terminated(self._run, status, end_time=int(stretch.ended * 1000))


POINT_METRIC = "device_hours"  # every point of a campaign has it


def campaign_params(stretch: Stretch) -> dict[str, object]:
    """A campaign's parameters by MLflow name."""
    spec = stretch.spec or {}
    setting = spec["setting"]
    return {
        "recipe": stretch.recipe,
        "data": stretch.data,
        "fingerprint": setting["data"],
        "model": setting["model"]["name"],
        **{f"model.{name}": value for name, value in setting["model"]["options"].items()},
        **{f"training.{name}": value for name, value in setting["training"].items()},
        "fraction": spec["fraction"],
        "seed": spec["seed"],
    }


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
    with _answering(uri):
        tracker = Tracker(*_experiment(uri, store), sweep)
        tracker.start()
    return tracker


def connect_campaign(uri: str, store: Store, stretch: Stretch) -> CampaignTracker:
    """A tracker for the campaign of a stretch of work; raises InputError at once where MLflow does not answer."""
    with _answering(uri):
        tracker = CampaignTracker(*_experiment(uri, store), stretch)
        tracker.start()
    return tracker


def probe(uri: str, store: Store) -> None:
    """Write a run with an artifact, and delete it; raises InputError where MLflow takes either not."""
    with _answering(uri):
        client, experiment = _experiment(uri, store)
        run = client.create_run(experiment, tags={KIND_TAG: "probe", "mlflow.runName": "unlearn doctor"})
        try:
            client.log_text(run.info.run_id, "written by unlearn doctor", "probe.txt")
        finally:
            client.set_terminated(run.info.run_id)
            client.delete_run(run.info.run_id)


def _experiment(uri: str, store: Store) -> tuple[MlflowClient, str]:
    """A client, and the id of our experiment there, made where it is missing."""
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is said once, by who catches it
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    artifacts = None  # a server knows its own place; MLflow's own for SQLite is the working directory
    if uri.startswith("sqlite:///"):
        beside = Path(store.root) if store.is_local else Path(uri.removeprefix("sqlite:///")).absolute().parent
        artifacts = (beside / "mlflow-artifacts").as_uri()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        with contextlib.suppress(MlflowException):  # another command may make it at the same time
            client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise InputError(f"the MLflow experiment {EXPERIMENT!r} at {uri} is deleted; restore it, or use another server")
    return client, experiment.experiment_id


@contextlib.contextmanager
def _answering(uri: str) -> Iterator[None]:
    """Say in one sentence that MLflow does not answer at the URI."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # mlflow raises whatever its store raises (sqlalchemy, requests, its own)
        scheme = uri.partition(":")[0]
        if "://" in uri and scheme.partition("+")[0] not in _SCHEMES:
            raise InputError(f"--tracking-uri is {uri!r}; allowed: {', '.join(_SCHEMES)} addresses, or none") from None
        raise InputError(
            f"MLflow does not answer at {uri!r}: {_reason(error)}; start `mlflow server` there, or use "
            "--tracking-uri none and `unlearn track` later"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:200]


def _search(client: MlflowClient, experiment_id: str, filter_string: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment_id], filter_string, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


class Writer:
    """Writes to MLflow in a thread of its own: a slow or lost server never holds a command up; what is lost, `unlearn
    track` brings later. What does not fit the bounded queue, or fails, is counted in `missed`."""

    def __init__(self) -> None:
        self.missed, self.error = 0, ""
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue(_QUEUE_SIZE)
        self._thread = threading.Thread(target=self._drain, name="mlflow", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[], object]) -> None:
        """Have something written; returns at once."""
        try:
            self._waiting.put_nowait(write)
        except queue.Full:
            self.missed += 1

    def _drain(self) -> None:
        failures = 0
        while (write := self._waiting.get()) is not None:
            if failures >= 3:  # the server is gone: what is left waits for `unlearn track`
                self.missed += 1
                continue
            failures = 0 if self._try(write) else failures + 1

    def _try(self, write: Callable[[], object]) -> bool:
        try:
            write()
        except Exception as error:  # tracking never fails a command
            self.missed += 1
            self.error = _reason(error)
            return False
        return True

    def end(self, last: Callable[[], object]) -> None:
        """Write what is queued, then what comes last; a slow server is given a minute for what is queued."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_LAST_SECONDS)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            self.missed += self._waiting.qsize() + 1
            self.error = self.error or "the server is too slow"
            return
        self._try(last)


class LiveTracking(Writer):
    """A sweep's rows, written as they come."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker

    def put(self, row: Row, arm: str, role: Role = "reported") -> None:
        self.submit(partial(self.tracker.write, row, arm, role))

    def close(self, status: str, artifacts: Iterable[str] = ()) -> None:
        """Write what is queued, then end the parent run."""
        self.end(partial(self.tracker.finish, status, artifacts))


def replay(tracker: Tracker, rows: Iterable[Row], arms: Mapping[str, str]) -> int:
    """Write the rows that MLflow lacks; returns how many."""
    return sum(tracker.write(row, arms[row.key]) for row in rows)


def replay_campaign(
    tracker: CampaignTracker, stretches: Iterable[Stretch], ended: Stretch, artifacts: Mapping[str, bytes]
) -> int:
    """Write a campaign's points that MLflow lacks, and how it `ended`; returns how many points were new."""
    before = tracker.num_points()
    for stretch in stretches:
        tracker.write(stretch.points)
    tracker.finish(ended, artifacts)
    return tracker.num_points() - before
