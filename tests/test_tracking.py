"""MLflow: what is written live equals what is written later, nothing twice, and a bad server holds nothing up."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from jobs import session, submit, track, tracked
from jobs.tracked import LiveTracking
from orchestrator import logged, results
from orchestrator.contact import EXPERIMENT, redacted, tracking_uri
from orchestrator.heartbeats import this_process
from orchestrator.outbox import Outbox
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
from orchestrator.tracking import DRIVER_TAG, connect
from tests.faults import free_port, s3_server
from tests.servers import MlflowServer, Proxy, mlflow_server, postgres


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
            "host": "made",
            "git_commit": "abc-dirty" if seed else "abc",
            "finished_at": 1.8e9 + seed,
        },
    )


ROWS = [make_row(seed) for seed in range(5)]
KEYS = [row.key for row in ROWS]
BY_KEY = {name: Member("del", name) for name in KEYS}
MEMBERS = tuple(Member("del", row.key) for row in ROWS)
SWEEP = Sweep(
    sweep_key("digits", MEMBERS),
    "digits",
    MEMBERS,
    {"recipe": "digits", "data": {"name": "digits"}},
    {"created_at": 1.7e9, "git_commit": "abc-dirty", "ray_job": "job-1"},
)


def runs_of(uri: str, sweep: Sweep = SWEEP) -> dict[str, Run]:
    """All runs that MLflow holds of a sweep, by our key; none is there twice, and all belong to the parent."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.`unlearn.sweep` = '{sweep.key}'", max_results=1000)
    found = {run.data.tags.get("unlearn.key", "parent"): run for run in runs}
    assert len(found) == len(runs), "a run was written twice"
    parents = {run.data.tags.get("mlflow.parentRunId") for name, run in found.items() if name != "parent"}
    assert parents <= {found["parent"].info.run_id}
    return found


def contents(uri: str, sweep: Sweep = SWEEP) -> dict[str, Any]:
    """All that MLflow holds of a sweep, without MLflow's own ids and user."""
    client, found = MlflowClient(tracking_uri=uri), dict[str, Any]()
    for name, run in runs_of(uri, sweep).items():
        tags = {k: v for k, v in run.data.tags.items() if "parent" not in k and k != "mlflow.user"}
        points = {
            metric: [(p.timestamp, p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric)]
            for metric in ("accuracy/forget", "epoch/loss", "param/budget")
            if metric in run.data.metrics
        }
        inputs = [(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs]
        found[name] = (run.info.status, run.info.start_time, run.data.params, run.data.metrics, points, tags, inputs)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with the sweep and all its rows, not yet exported."""
    made = Store(str(tmp_path / "store"))
    for row in ROWS:
        results.put_row(made, row)
    results.put_sweep(made, SWEEP)
    return made


@pytest.fixture
def uri(store: Store) -> str:
    found = tracking_uri(store, None)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tracked, "files", lambda store, sweep: {"specs.jsonl": tracked.specs(store, sweep)})
    monkeypatch.setattr(track, "files", tracked.files)


def put_live(store: Store, uri: str, status: str = "FINISHED") -> LiveTracking:
    """Track the sweep as the command that computes it does."""
    live = LiveTracking(connect(uri, store, SWEEP, live=True), store)
    for name in KEYS:
        live.put([name], BY_KEY)
    live.close(status)
    return live


# ---- what is written -------------------------------------------------------------------------------------------------


def test_rebuilt_equals_live_and_writing_again_adds_nothing(store: Store, uri: str, tmp_path: Path) -> None:
    live = put_live(store, uri)
    assert live.missing == "", live.error
    written, other = contents(uri), f"sqlite:///{tmp_path}/other.db"
    assert len(written) == len(ROWS) + 1
    assert {run[0] for run in written.values()} == {"FINISHED"}
    parent, child = written["parent"], written[KEYS[0]]
    assert parent[6] == [("digits", "0" * 32, "training")]
    assert (parent[5]["mlflow.source.git.commit"], parent[5]["unlearn.git_dirty"]) == ("abc", "true")
    assert (parent[5]["unlearn.ray_job"], parent[1]) == ("job-1", int(1.7e12))
    assert (child[5]["mlflow.source.git.commit"], child[5]["unlearn.git_dirty"]) == ("abc", "false")
    files = MlflowClient(tracking_uri=uri).list_artifacts(runs_of(uri)["parent"].info.run_id)
    assert [file.path for file in files] == ["specs.jsonl", "study.json"]
    for again in (lambda: put_live(store, uri), lambda: track.run(store.root, uri), lambda: put_live(store, uri)):
        again()  # writers one after another
        assert contents(uri) == written
    track.run(store.root, other)
    assert contents(other) == written


def test_numbers_can_be_asked_for_by_range_and_series_are_there(store: Store, uri: str) -> None:
    put_live(store, uri)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    for condition, count in (
        ("metrics.`param/budget` > 0.2 and params.arm = 'del'", 5),
        ("metrics.`param/option.lr` > 0.02 and metrics.`param/option.lr` < 0.04", 5),
        ("metrics.`param/option.epochs` >= 30", 5),
        ("metrics.`param/training.batch_size` > 8", 0),
        ("metrics.`param/seed` >= 3 and metrics.`accuracy/forget` > 0.27", 2),
        ("params.fingerprint = '" + "0" * 64 + "'", 5),
        ("params.`option.lr` = '0.03'", 5),
    ):
        assert len(client.search_runs([experiment], condition)) == count, condition
    first = runs_of(uri)[KEYS[0]]
    history = client.get_metric_history(first.info.run_id, "epoch/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]


AWKWARD = replace(
    make_row(7),
    metrics={"acc@1 (top)": {"a/../b": 0.5}, "acc:1": {"x": math.inf, "y": 1.0}, "a//b": {".": 2.0}},
    series={"loss=a%b": [float(epoch) for epoch in range(700)], "loss a%b": [1.0] * 700, "ä" * 300: [3.0]},
    measurements={f"m{number}": float(number) for number in range(50)},
)


def test_what_mlflow_would_refuse_or_change_is_made_to_fit_one_batch(
    store: Store, uri: str, server: MlflowServer
) -> None:
    """Bare, each of these is refused with the whole batch, or kept as another value, or split into more requests."""
    options = {f"o{n:03}": n for n in range(150)} | {"a": "x" * 9999}
    row = replace(AWKWARD, key="k" * 32, spec={**AWKWARD.spec, "method": {"name": "gone", "options": options}})
    with Proxy(server.url) as proxy:
        tracker = connect(proxy.url, store, replace(SWEEP, key="awkward"))
        tracker.begin()
        tracker.find()
        proxy.requests.clear()
        tracker.write(row, "del")
        assert sorted(proxy.requests) == sorted([*PER_ROW, "POST runs/log-inputs"])
    run = runs_of(server.url, replace(SWEEP, key="awkward"))["k" * 32]
    metrics, params = run.data.metrics, run.data.params
    assert (metrics["acc_1 _top_/b"], metrics["acc:1/y"], metrics["a/b"]) == (0.5, 1.0, 2.0)
    assert "acc:1/x" not in metrics
    assert max(map(abs, metrics.values())) < 1e300
    assert len(params) == logged.MAX_PARAMS
    assert '"option.o149": "149"' in params["more"]
    assert params["option.a"].endswith("x...")
    assert len(params["option.a"]) == 6000
    names = [name for name in metrics if name.startswith("epoch/loss")]
    assert len(names) == 2, "two series whose names differ in what is not allowed are two"
    steps = [p.step for p in MlflowClient(server.url).get_metric_history(run.info.run_id, names[0])]
    assert steps[-1] == 700
    assert len(steps) > 200


PER_ROW = ["POST runs/create", "POST runs/log-batch", "POST runs/update"]


def test_a_row_costs_three_requests(store: Store, server: MlflowServer) -> None:
    sweep = replace(SWEEP, key="counted")
    with Proxy(server.url) as proxy:
        tracker = connect(proxy.url, store, sweep, live=True)
        tracker.write(ROWS[0], "del")  # the first also looks what is there, and names the data set
        proxy.requests.clear()
        for row in ROWS[1:]:
            assert tracker.write(row, "del")
        assert sorted(proxy.requests) == sorted(PER_ROW * 4)
        proxy.requests.clear()
        assert not tracker.write(ROWS[1], "del")
        assert not proxy.requests
        tracker.finish("FINISHED", KEYS)
        proxy.requests.clear()
        live = LiveTracking(connect(proxy.url, store, sweep), store)
        live.put(KEYS, BY_KEY)
        live.close("FINISHED")
        assert live.missing == ""
        assert proxy.requests == ["GET experiments/get-by-name", "POST runs/search", "POST runs/search"]


def test_a_level_sweep_is_not_written_and_one_that_lost_or_won_a_run_is(store: Store, uri: str) -> None:
    put_live(store, uri)
    written, client, (first, *_) = contents(uri), MlflowClient(tracking_uri=uri), KEYS
    child = runs_of(uri)[first]

    def again() -> None:
        live = LiveTracking(connect(uri, store, SWEEP), store)
        live.put(KEYS, BY_KEY)
        live.close("FINISHED")
        assert live.missing == "", live.error

    def state() -> list[tuple[Path, int]]:
        places = [Path(uri.removeprefix("sqlite:///")), *(Path(store.root) / "mlflow-artifacts").rglob("*")]
        return sorted((path, path.stat().st_mtime_ns) for path in places)

    before = state()
    again()
    track.run(store.root, uri)
    assert state() == before
    for change in (
        lambda: client.delete_run(child.info.run_id),
        lambda: client.set_terminated(runs_of(uri)[first].info.run_id, "KILLED"),
        lambda: client.set_terminated(
            client.create_run(child.info.experiment_id, 1, tags=child.data.tags).info.run_id, "FINISHED"
        ),
        lambda: client.set_terminated(runs_of(uri)["parent"].info.run_id, "KILLED"),
    ):
        change()
        again()
        assert contents(uri) == written


def by_hand(client: MlflowClient, change: str) -> None:
    """Change what MLflow holds of the sweep."""
    found = runs_of(client.tracking_uri)
    parent, last = found["parent"].info.run_id, found[KEYS[4]].info.run_id
    if change == "a parent that is deleted":
        client.delete_run(parent)
    elif change == "a run of another parent":
        client.set_tag(last, "mlflow.parentRunId", "another")
    elif change == "a run without a key":
        client.delete_tag(last, "unlearn.key")
    elif change.startswith("a run of key "):
        client.set_tag(last, "unlearn.key", KEYS[1] if change.endswith("two") else "f" * 32)
    else:
        client.set_tag(parent, "unlearn.level", change.removeprefix("level "))


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("change", ["a parent that is deleted", "a run of another parent", "level x"])
def test_what_somebody_changed_by_hand_bars_no_command_and_is_mended(
    store: Store, uri: str, change: str, begins: bool
) -> None:
    put_live(store, uri)
    written, client = contents(uri), MlflowClient(tracking_uri=uri)
    by_hand(client, change)
    if begins:
        live = LiveTracking(connect(uri, store, SWEEP), store)
        live.put(KEYS, BY_KEY)
        live.close("FINISHED")
        assert live.missing == "", live.error
    else:
        track.run(store.root, uri)
    assert contents(uri) == written
    assert connect(uri, store, SWEEP).is_over("FINISHED", KEYS)


@pytest.mark.parametrize("change", ["a run of key two", "a run of key none", "a run without a key"])
def test_a_run_under_a_key_that_is_not_its_own_goes(store: Store, uri: str, change: str) -> None:
    """Its numbers are another row's."""
    put_live(store, uri)
    written, client = contents(uri), MlflowClient(tracking_uri=uri)
    by_hand(client, change)
    track.run(store.root, uri)
    assert contents(uri) == written


# ---- what dead and rival drivers leave -------------------------------------------------------------------------------


def test_half_written_rows_and_parents_are_finished_under_the_same_id(store: Store, uri: str) -> None:
    tracker = connect(uri, store, SWEEP, live=True)
    tracker.find()
    half = tracker._run(ROWS[0], "del", "reported", 1000).info.run_id
    tracker.client.log_param(half, "arm", "del")
    tracker.client.log_param(half, "seed", "another")  # which MLflow would refuse to change, with all of the batch
    os.unlink(next(Path(store.root).rglob("study.json")))  # killed before it was written
    tracker.client.set_tag(tracker._parent, DRIVER_TAG, f"{this_process()}0")  # which began later: long dead
    track.run(store.root, uri)
    found = runs_of(uri)
    assert found[KEYS[0]].info.run_id == half
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found[KEYS[0]].data.metrics["accuracy/forget"] == 0.25
    assert found["parent"].info.run_id == tracker._parent
    assert DRIVER_TAG not in found["parent"].data.tags
    assert list(Path(store.root).rglob("study.json"))


def test_what_two_drivers_wrote_in_one_moment_becomes_one(store: Store, uri: str) -> None:
    put_live(store, uri)
    written, client = contents(uri), MlflowClient(tracking_uri=uri)
    first = runs_of(uri)
    experiment = first["parent"].info.experiment_id
    tags = {k: v for k, v in first["parent"].data.tags.items() if k != "unlearn.level"}
    rival = client.create_run(experiment, start_time=int(1.7e12) + 1, tags=tags).info.run_id
    for name in KEYS[:2]:
        spare = {**first[name].data.tags, "mlflow.parentRunId": rival}
        client.create_run(experiment, start_time=1, tags=spare)
    client.set_tag(first["parent"].info.run_id, "unlearn.level", "")
    track.run(store.root, uri)
    assert contents(uri) == written


WAITING = """
import sys, time
from orchestrator.store import Store
from orchestrator import results
from orchestrator.tracking import connect
store, uri = Store(sys.argv[1]), sys.argv[2]
(sweep,) = results.get_sweeps(store)
tracker = connect(uri, store, sweep, live=True)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_sweep_that_is_running_is_left_alone_and_one_whose_driver_died_is_ended(
    store: Store, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store.delete(f"rows/{KEYS[4]}.json")
    driver = subprocess.Popen([sys.executable, "-c", WAITING, store.root, uri], stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        track.run(store.root, uri)
        assert f"that runs (process {driver.pid}, here): left to it" in " ".join(capsys.readouterr().out.split())
        assert {name: run.info.status for name, run in runs_of(uri).items()} == {"parent": "RUNNING"}
    finally:
        driver.kill()
        driver.wait()
    store.delete(f"sweeps/{SWEEP.key}.json")  # killed before the store knew of the sweep
    track.run(store.root, uri)
    assert "1 runs that a killed command had left running are ended" in capsys.readouterr().out
    results.put_sweep(store, SWEEP)
    track.run(store.root, uri)
    statuses = {name: run.info.status for name, run in runs_of(uri).items()}
    assert statuses == {"parent": "KILLED"} | dict.fromkeys(KEYS[:4], "FINISHED")


def test_two_commands_that_end_one_after_the_other_both_end_well(store: Store, uri: str) -> None:
    trackers = [connect(uri, store, SWEEP, live=True) for _ in range(2)]
    for tracker in trackers:
        tracker.finish("FINISHED")  # the second finds the driver's mark gone
    parent = runs_of(uri)["parent"]
    assert (parent.info.status, DRIVER_TAG in parent.data.tags) == ("FINISHED", False)


# ---- servers in trouble ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(f"sqlite:///{folder}/server.db", str(folder / "artifacts")) as found:
        yield found


def trouble(proxy: Proxy, kind: str) -> None:
    proxy.hangs = kind == "hangs"
    proxy.status = int(kind) if kind.isdigit() else None


@pytest.mark.parametrize("kind", ["hangs", "500", "400"])
def test_a_server_in_trouble_holds_nothing_up_and_track_brings_the_rest(
    store: Store, server: MlflowServer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.outbox.PATIENCE_SECONDS", 1.0)
    sweep = replace(SWEEP, key=f"trouble {kind}")
    store.delete(f"sweeps/{SWEEP.key}.json")
    results.put_sweep(store, sweep)
    with Proxy(server.url) as proxy:
        live = LiveTracking(connect(proxy.url, store, sweep, live=True), store)
        live.put(KEYS[:1], BY_KEY)
        while KEYS[0] not in live.done:
            time.sleep(0.01)
        trouble(proxy, kind)
        start = time.monotonic()
        for name in KEYS[1:]:
            live.put([name], BY_KEY)
        assert time.monotonic() - start < 0.5, "the sweep waited for MLflow"
        time.sleep(0.2)
        live.close("FINISHED")
        assert time.monotonic() - start < 8
        assert live.missing == "4 of 5 rows"
        assert live.error
        trouble(proxy, "none")
        client = MlflowClient(tracking_uri=server.url)
        (parent,) = (run for name, run in runs_of(server.url, sweep).items() if name == "parent")
        assert "unlearn.level" not in parent.data.tags
        client.set_tag(parent.info.run_id, DRIVER_TAG, "")  # this process, which wrote it, has not ended
        track.run(store.root, server.url)
    found = runs_of(server.url, sweep)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found.keys() == {"parent", *KEYS}


def test_a_server_that_comes_back_gets_the_rest(store: Store, server: MlflowServer) -> None:
    sweep = replace(SWEEP, key="comes back")
    live = LiveTracking(connect(server.url, store, sweep, live=True), store)
    live.put(KEYS[:1], BY_KEY)
    while KEYS[0] not in live.done:
        time.sleep(0.01)
    server.kill()
    live.put(KEYS[1:], BY_KEY)
    while not live.error:
        time.sleep(0.01)
    server.start()
    live.put([], BY_KEY)
    live.close("FINISHED")
    assert live.missing == ""
    assert len(runs_of(server.url, sweep)) == len(KEYS) + 1


def test_a_server_that_is_away_when_a_command_ends_is_waited_for(store: Store, server: MlflowServer) -> None:
    sweep = replace(SWEEP, key="away at the end")
    with Proxy(server.url) as proxy:
        live = LiveTracking(connect(proxy.url, store, sweep, live=True), store)
        live.put(KEYS[:1], BY_KEY)
        while KEYS[0] not in live.done:
            time.sleep(0.01)
        trouble(proxy, "503")
        back = threading.Timer(3.0, lambda: trouble(proxy, "none"))
        back.start()
        live.put(KEYS[1:], BY_KEY)
        live.close("FINISHED")
        back.join()
    assert live.missing == ""
    assert runs_of(server.url, sweep).keys() == {"parent", *KEYS}


def test_a_run_whose_making_was_answered_too_late_is_not_made_twice(store: Store, server: MlflowServer) -> None:
    """The server makes it, the answer is lost: the next try must find it."""
    sweep = replace(SWEEP, key="late")
    with Proxy(server.url) as proxy:
        tracker = connect(proxy.url, store, sweep, live=True)
        tracker.find()
        made = tracker.client.create_run

        def lose_the_answer(*words: Any, **more: Any) -> Run:
            made(*words, **more)
            tracker.client.create_run = made  # type: ignore[method-assign]
            raise TimeoutError("Read timed out")

        tracker.client.create_run = lose_the_answer  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="timed out"):
            tracker.write(ROWS[0], "del")
        assert tracker.write(ROWS[0], "del")
    assert runs_of(server.url, sweep).keys() == {"parent", KEYS[0]}


def test_a_first_look_that_failed_is_taken_again_and_nothing_written_twice(store: Store, server: MlflowServer) -> None:
    sweep = replace(SWEEP, key="looked at twice")
    connect(server.url, store, sweep, live=True).write(ROWS[0], "del")
    with Proxy(server.url) as proxy:
        tracker = connect(proxy.url, store, sweep, live=True)
        trouble(proxy, "500")
        with pytest.raises(RuntimeError):
            tracker.write(ROWS[0], "del")
        trouble(proxy, "none")
        assert not tracker.write(ROWS[0], "del")
    assert runs_of(server.url, sweep).keys() == {"parent", KEYS[0]}


def test_an_outbox_that_is_full_says_so_and_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.outbox.QUEUE_SIZE", 3)
    outbox, start = Outbox(), time.monotonic()
    for _ in range(10):
        outbox.submit(lambda: time.sleep(0.3))
    assert time.monotonic() - start < 0.25
    assert outbox.missed >= 6
    assert "more than 3 writes were waiting" in outbox.error
    ended = list[int]()
    outbox.end(lambda: ended.append(1))
    assert ended == [1]


# ---- first contact ---------------------------------------------------------------------------------------------------


SECRET = "correct horse battery"


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[MlflowServer, str]]:
    """A server as a group would run it: PostgreSQL, users with passwords, artifacts proxied to S3, one host name."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        with postgres() as database, s3_server() as s3:
            environment = {
                "MLFLOW_AUTH_ADMIN_PASSWORD": SECRET,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": "made for a test",
                "MLFLOW_S3_ENDPOINT_URL": s3,
            }
            options = ["--app-name", "basic-auth", "--allowed-hosts", "127.0.0.1:{port}"]
            with mlflow_server(database, "s3://bucket/mlflow", options, environment) as found:
                yield found, s3


def test_postgresql_passwords_and_s3_in_one_server(
    store: Store, shared: tuple[MlflowServer, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server, s3 = shared
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)  # a client needs none of S3
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    live = put_live(store, server.url)
    assert live.missing == "", live.error
    here = f"sqlite:///{tmp_path}/here.db"
    track.run(store.root, here)
    assert contents(server.url) == contents(here)
    track.run(store.root, server.url)
    assert len(runs_of(server.url)) == len(ROWS) + 1
    client: Any = boto3.client(
        "s3", endpoint_url=s3, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    )
    names = [item["Key"] for item in client.list_objects_v2(Bucket="bucket")["Contents"]]
    assert {name.rpartition("/")[2] for name in names} == {"study.json", "specs.jsonl"}


def test_what_bars_the_way_is_said_in_one_sentence_without_secrets(
    store: Store, shared: tuple[MlflowServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = shared
    with pytest.raises(InputError, match=r"asks for a user and a password \(401\); set MLFLOW_TRACKING_USERNAME"):
        connect(server.url, store, SWEEP)
    named = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(
        InputError, match=rf"for the host 'localhost' .*--allowed-hosts 'localhost,localhost:{server.port}'"
    ):
        connect(named, store, SWEEP)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
    with pytest.raises(InputError, match=r"refuses the password of 'admin' \(401\)") as wrong:
        connect(server.url.replace("//", "//admin:hunter3hunter3@"), store, SWEEP)
    with pytest.raises(InputError, match="does not answer") as gone:
        connect(f"http://admin:hunter3hunter3@127.0.0.1:{free_port()}", store, SWEEP)
    for said in (str(wrong.value), str(gone.value)):
        assert "hunter" not in said
        assert "\n" not in said
        assert "***@127.0.0.1" in said
    assert redacted("python -m jobs --tracking-uri http://a:b@c/d") == "python -m jobs --tracking-uri http://***@c/d"


@pytest.mark.parametrize(
    "uri",
    [
        "http://bob:hunter2@host:5000/x",
        "postgresql://bob:hunt/er2@host/db",
        "http://bob:hunt@er2@host",
        "postgresql+psycopg2://host/db?user=bob&password=hunter2&sslmode=require",
        "s3://bucket/x?secret_key=hunter2",
    ],
)
def test_no_password_of_an_address_is_shown_or_submitted(uri: str) -> None:
    said = redacted(f"MLflow does not answer at '{uri}': no route")
    assert not re.search("hunt|er2", said)
    assert said.startswith("MLflow does not answer at '")
    assert said.endswith("': no route")
    with pytest.raises(InputError, match="holds a password inside a URL"):
        submit.run(
            ["sweep", "digits", "--storage", "/shared", "--tracking-uri", uri], "http://127.0.0.1:1", None, wait=True
        )


def test_other_first_contacts_end_in_a_sentence_too(store: Store, tmp_path: Path) -> None:
    start, file, gone = time.monotonic(), tmp_path / "file", f"http://127.0.0.1:{free_port()}"
    file.touch()
    with pytest.raises(InputError) as error:
        connect(gone, store, SWEEP)
    assert str(error.value) == (
        f"MLflow does not answer at '{gone}' (connection refused); start `mlflow server` there, or give "
        "--tracking-uri none, and `unlearn track` later"
    )
    for place, said in (
        (
            "http://nowhere.invalid:5000",
            r"MLflow does not answer at .*\((name or service|temporary failure)[a-z ]*\); start",
        ),
        ("ftp://127.0.0.1", "--tracking-uri is 'ftp://127.0.0.1'; allowed: http"),
        (f"sqlite:///{file}/no.db", "MLflow does not answer at 'sqlite:///"),
        ("postgresql+nodriver://me:hunter2@127.0.0.1:1/x", r"\*\*\*@127"),
    ):
        with pytest.raises(InputError, match=said) as error:
            connect(place, store, SWEEP)
        assert not re.search("hunter", str(error.value))
    assert time.monotonic() - start < 20


def test_a_folder_without_links_gets_its_database_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    connect(f"sqlite:///{tmp_path}/mlflow.db", store, SWEEP)
    assert [path.name for path in tmp_path.glob("mlflow.db*")] == ["mlflow.db"]


def test_where_to_track(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(store, "none") is None
    assert tracking_uri(Store("s3://bucket/prefix"), None) is None
    assert tracking_uri(store, None) == f"sqlite:///{store.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking_uri(store, None) == "http://mlflow.example:5000"
    assert tracking_uri(store, "sqlite:///x.db") == "sqlite:///x.db"


def test_a_ray_job_knows_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(session.JOB_VARIABLE, raising=False)
    assert session.ray_job() is None
    monkeypatch.setenv(session.JOB_VARIABLE, '{"metadata": {"job_submission_id": "mine"}, "runtime_env": {}}')
    assert session.ray_job() == "mine"
