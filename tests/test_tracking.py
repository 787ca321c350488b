"""MLflow: what is written live equals what is written later, nothing twice, and a lost server holds nothing up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.registry import InputError
from orchestrator.results import Member, Row, Sweep, sweep_key
from orchestrator.specs import (
    ForgetSet,
    ForgetSpec,
    MaskSpec,
    Method,
    Model,
    RunSpec,
    Setting,
    Strategy,
    TrainingSpec,
    key,
)
from orchestrator.store import Store
from orchestrator.tracking import EXPERIMENT, LiveTracking, connect, replay, tracking_uri


def make_row(seed: int) -> Row:
    training = TrainingSpec(learning_rate=0.1, epochs=2, batch_size=8)
    spec = RunSpec(
        setting=Setting(data="0" * 64, model=Model(name="small_cnn"), training=training),
        forget=ForgetSpec(rule=ForgetSet(name="random")),
        method=Method(name="reset_and_finetune", options={"lr": 0.03}),
        original_seed=seed,
        mask=MaskSpec(strategy=Strategy(name="weighted_gradient"), granularity="channel", budget=0.3),
        seed=seed,
    )
    return Row(
        key=key(spec),
        spec=spec.model_dump(mode="json"),
        metrics={"accuracy": {"forget": 0.25 + seed / 100, "test": 0.5}},
        metric_versions={"accuracy": "1"},
        series={"loss": [2.0, 1.0 + seed]},
        measurements={"realised_budget": 0.3},
        provenance={
            "data": "digits",
            "model": "small_cnn",
            "seconds": 1.5,
            "numerics": "cpu",
            "git_commit": "abc",
            "finished_at": 1.8e9 + seed,
        },
    )


ROWS = [make_row(seed) for seed in range(5)]
MEMBERS = tuple(Member("del", row.key) for row in ROWS)
SWEEP = Sweep(sweep_key("digits", MEMBERS), "digits", MEMBERS, {"recipe": "digits"})
ARMS = {member.key: member.arm for member in MEMBERS}


def contents(uri: str) -> dict[str, Any]:
    """All that MLflow holds of the runs, by our key, without MLflow's own ids and user."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found: dict[str, Any] = {}
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = {run.info.run_id for run in runs if run.data.tags["unlearn.kind"] == "sweep"}
    assert len(parents) == 1
    for run in runs:
        name = run.data.tags.get("unlearn.key", "parent")
        assert name not in found, "a run was written twice"
        tags = {k: v for k, v in run.data.tags.items() if k.startswith("unlearn.")}
        if name != "parent":
            assert run.data.tags["mlflow.parentRunId"] in parents
        history = [
            [(point.timestamp, point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]
            for metric in sorted(run.data.metrics)
        ]
        found[name] = (run.info.status, run.data.params, run.data.metrics, tags, history)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def uri(store: Store) -> str:
    store.probe()
    found = tracking_uri(store, None)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _no_tracking_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_rebuilt_equals_live_and_replaying_adds_nothing(store: Store, uri: str, tmp_path: Path) -> None:
    live = LiveTracking(connect(uri, store, SWEEP))
    for row in ROWS:
        live.put(row, "del")
    live.close("FINISHED")
    assert live.missed == 0
    written = contents(uri)
    assert len(written) == len(ROWS) + 1
    assert replay(connect(uri, store, SWEEP), ROWS, ARMS) == 0
    other = f"sqlite:///{tmp_path}/other.db"
    tracker = connect(other, store, SWEEP)
    assert replay(tracker, ROWS, ARMS) == len(ROWS)
    tracker.finish("FINISHED")
    assert contents(other) == written


def test_a_run_can_be_found_by_range_and_has_its_series(store: Store, uri: str) -> None:
    tracker = connect(uri, store, SWEEP)
    replay(tracker, ROWS, ARMS)
    found = tracker.client.search_runs([tracker.experiment_id], "metrics.`param/budget` > 0.2 and params.arm = 'del'")
    assert len(found) == len(ROWS)
    first = next(run for run in found if run.data.tags["unlearn.key"] == ROWS[0].key)
    assert first.data.metrics["accuracy/forget"] == 0.25
    assert first.data.params["option.lr"] == "0.03"
    history = tracker.client.get_metric_history(first.info.run_id, "epoch/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]


def test_what_a_dead_driver_left_half_written_is_finished_under_the_same_id(store: Store, uri: str) -> None:
    tracker = connect(uri, store, SWEEP)
    half = tracker._create(ROWS[0], "del", "reported", 1000)
    assert replay(connect(uri, store, SWEEP), ROWS, ARMS) == len(ROWS)
    run = tracker.client.get_run(half)
    assert (run.info.status, run.data.metrics["accuracy/forget"]) == ("FINISHED", 0.25)
    assert len(contents(uri)) == len(ROWS) + 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_no_server_at_the_start_is_refused_within_seconds(store: Store) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match="MLflow does not answer"):
        connect(f"http://127.0.0.1:{free_port()}", store, SWEEP)
    assert time.monotonic() - start < 60


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real `mlflow server` in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "art"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}", process
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait()


def test_a_server_lost_after_the_start_costs_only_what_it_missed(
    store: Store, server: tuple[str, subprocess.Popen[bytes]], uri: str
) -> None:
    address, process = server
    live = LiveTracking(connect(address, store, SWEEP))
    live.put(ROWS[0], "del")
    while live._waiting.unfinished_tasks and not live._waiting.empty():
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, 9)
    start = time.monotonic()
    for row in ROWS[1:]:
        live.put(row, "del")
    assert time.monotonic() - start < 1, "the sweep waited for MLflow"
    live.close("FINISHED")
    assert live.missed >= len(ROWS) - 1
    assert replay(connect(uri, store, SWEEP), ROWS, ARMS) == len(ROWS)


def test_where_to_track(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(store, "none") is None
    assert tracking_uri(Store("s3://bucket/prefix"), None) is None
    assert tracking_uri(store, None) == f"sqlite:///{store.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking_uri(store, None) == "http://mlflow.example:5000"
    assert tracking_uri(store, "sqlite:///x.db") == "sqlite:///x.db"
