"""What work cost: worked by hand, kept in the store, told to MLflow once, shown by campaign and worker."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from analysis import costs as analysis
from analysis import report
from jobs import ledger, memorize, track, work
from jobs.ledger import Ledger
from jobs.session import Options, Session, open_session
from orchestrator import costs, export, results, tracking
from orchestrator.arrays import pack
from orchestrator.campaigns import Tally
from orchestrator.cluster import Cluster
from orchestrator.costs import Outcome, Stretch
from orchestrator.heartbeats import this_process
from orchestrator.memorization import BLOCK_SIZE, block_membership
from orchestrator.registry import InputError
from orchestrator.results import is_made
from orchestrator.seeds import numpy_generator
from orchestrator.store import Store
from orchestrator.tasks import Task
from tests.analysis.made import Made
from tests.commands import here

EPOCH = 1.8e9


def outcome(worker: str, began: float, seconds: float, training: float = 0.0, host: str = "a", **more: Any) -> Outcome:
    given = {"kind": "model", "key": "k", "models": 1, "cpu_seconds": seconds / 2, **more}
    return Outcome(training_seconds=training, seconds=seconds, began=EPOCH + began, host=host, worker=worker, **given)


def stretch(outcomes: Sequence[Outcome], workers: int, **more: Any) -> Stretch:
    """A finished stretch of these outcomes."""
    window = costs.window(outcomes)
    assert window is not None
    given = {"name": "1", "command": "memorize", "recipe": "digits", "data": "digits", "campaign": "c" * 32}
    given |= {"spec": {}, "device": "cpu", "devices_per_worker": 1.0, "created": EPOCH, "status": "finished"}
    given |= {"workers": costs.workers_of(outcomes, workers), "models": sum(o.models for o in outcomes)}
    given |= {"model_seconds": sum(o.training_seconds for o in outcomes), "began": window[0], "ended": window[1]}
    return Stretch(**given | more)


BY_HAND = [
    outcome("p", 0, 10, 9),
    outcome("p", 10, 8, 7.2),
    outcome("q", 1, 5, 4, host="b"),  # and then it died
    outcome("r", 12, 8, 6, host="b"),
    Outcome("model", "k", 0, 0.0, 0.0, 0.0, EPOCH + 99, "3 workers died on it"),
]


def test_a_worker_that_took_over_is_the_same_one_and_seconds_are_those_worked_by_hand() -> None:
    first, second = costs.workers_of(BY_HAND, 2)
    assert (first.host, first.number, first.tasks, first.models) == ("a", 0, 2, 2)
    assert (second.host, second.number, second.tasks, second.models) == ("b", 0, 2, 2)
    assert (first.seconds, first.training_seconds, first.cpu_seconds) == (18, pytest.approx(16.2), 9)
    assert (second.seconds, second.training_seconds) == (13, 10)
    found = stretch(BY_HAND, 2)
    assert found.span_seconds == 20
    assert found.models_per_hour == 4 * 180
    assert found.utilisations == pytest.approx([0.81, 0.5])
    idle = [line["idle_seconds"] for line in costs.worker_lines([found])]
    assert idle == pytest.approx([2, 7])
    assert costs.progress(found, [])["share_outside_training"] == pytest.approx(1 - 0.655)
    running = replace(found, status="running")
    assert running.utilisations == pytest.approx([16.2 / 18, 0.5]), "the first is busy with another by now"
    half = replace(found, devices_per_worker=0.5, cached_seconds=7200.0)
    hours = costs.progress(half, [found])
    assert hours["device_hours"] == pytest.approx(1.5 * 26.2 / 3600)
    assert hours["device_hours_saved"] == 1.0


def test_a_worker_that_never_came_back_with_anything_was_idle_all_the_time() -> None:
    found = stretch(BY_HAND[:2], 3)
    assert [line["host"] for line in costs.worker_lines([found])] == ["a", None, None]
    assert [line["worker"] for line in costs.worker_lines([found])] == [0, 0, 1]
    assert [line["idle_seconds"] for line in costs.worker_lines([found])] == [0, 18, 18]


def test_every_second_of_every_worker_is_training_other_work_or_idle() -> None:
    """Random schedules, with workers that die and are replaced: nothing is lost, counted twice, or below zero."""
    draws = random.Random(0)
    for _ in range(50):
        number, outcomes = draws.randint(1, 6), []
        for place in range(number):
            now, process = draws.random(), 0
            for _ in range(draws.randint(1, 12)):
                seconds = draws.random()
                busy, host = seconds * draws.random(), str(place % 2)
                outcomes.append(outcome(f"{place} {process}", now, seconds, busy, host=host))
                now += seconds + draws.choice([0.001, 0.01, draws.random()])
                process += draws.random() < 0.2
        draws.shuffle(outcomes)
        found = stretch(outcomes, number)
        lines = list(costs.worker_lines([found]))
        assert len(lines) == number
        assert len({(line["host"], line["worker"]) for line in lines}) == number
        for line in lines:
            parts = [line[f"{part}_seconds"] for part in ("training", "outside", "idle")]
            assert min(parts) > -1e-6
            assert sum(parts) == pytest.approx(found.span_seconds)
        assert sum(line["training_seconds"] for line in lines) == pytest.approx(
            sum(o.training_seconds for o in outcomes)
        )


def test_records_come_back_oldest_first_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    later = stretch(BY_HAND, 2, name="2", created=EPOCH + 5, cached_seconds=2.5, campaign=None)
    earlier = stretch(BY_HAND, 2, points=(costs.Point(EPOCH, 10, {"device_hours": 0.25}),))
    costs.put_stretch(store, later)
    costs.put_stretch(store, earlier)
    assert costs.get_stretches(store) == [earlier, later]
    assert costs.get_stretches(store, earlier.campaign) == [earlier]
    assert costs.get_stretches(store, "d" * 32) == []
    name = f"costs/{earlier.campaign}/1.json"
    store.put(name, store.get(name).replace(b'"models": 10', b'"models": 11'))
    with pytest.raises(InputError, match=r"1\.json is damaged.*nothing needs it"):
        costs.get_stretches(store)


def test_totals_are_sums_over_stretches_by_campaign_and_worker() -> None:
    grown = stretch(BY_HAND[:1], 1, name="2", cached=4, cached_seconds=26.2, device="gpu", devices_per_worker=0.5)
    other = stretch(BY_HAND[:2], 1, name="3", campaign=None)
    parts = [other, stretch(BY_HAND, 2), grown]
    whole, rest = analysis.totals(costs.cost_lines(parts), costs.worker_lines(parts))
    assert (whole.trained, whole.found, whole.span, whole.device) == (5, 4, 30, "mixed")
    assert whole.per_hour == 5 * 120
    assert whole.device_seconds == pytest.approx(26.2 + 4.5)
    assert whole.saved_seconds == pytest.approx(13.1)
    assert {w.name: (w.training, w.idle) for w in whole.workers.values()} == {
        "a 0": (pytest.approx(25.2), pytest.approx(2)),
        "b 0": (10, pytest.approx(7)),
    }
    assert whole.utilisation == pytest.approx(35.2 / 50)
    assert (rest.is_campaign, rest.trained, rest.per_hour) == (False, 2, 400)


def test_the_report_says_it_from_the_exported_tables(tmp_path: Path) -> None:
    made, parts = Made(), [stretch(BY_HAND, 2, cached=3, cached_seconds=3600.0), stretch(BY_HAND[:1], 2, name="2")]
    made.lines["costs"], made.lines["workers"] = list(costs.cost_lines(parts)), list(costs.worker_lines(parts))
    text = report.write(made.write(tmp_path), tmp_path / "report.html").read_text()
    part = text[text.index("What it cost") : text.index("How it was measured")]
    section = " ".join(re.sub("<[^>]+>", " ", part).split())
    # 30 seconds, 5 models, (16.2 + 10 + 9) of 60 worker-seconds in training
    assert "campaign cccccccc (digits) 5 3 600 58.7% 0.0% 41.3% 0.00978 CPU 1" in section
    assert "a 0 3 25.2 2.8 2.0 84.0%" in section
    assert "b 0 2 10.0 3.0 7.0 50.0%" in section
    assert "never answered 0 0 0.0 0.0 10.0 0.0%" in section


# ---- a campaign as it is computed ----------------------------------------------------------------------------------


def session_of(folder: Path, models: int) -> Session:
    return open_session(Options("digits", [f"campaign.models={models}"], str(folder)))


def put_block(session: Session, block: int) -> None:
    """A block of ten made models, two seconds each; they fit their subsets and know half of the rest."""
    spec, labels = session.study.campaign_spec(session.dataset.fingerprint), session.dataset.split_labels("train")
    membership = block_membership(labels, spec.fraction, spec.seed, block)
    knows = membership | (numpy_generator(block, "made").random(membership.shape) < 0.5)
    predicted = np.where(knows, labels, (labels + 1) % 10)
    logits = np.eye(10, dtype=np.float16)[predicted]
    arrays = {
        "membership": membership,
        "train": logits,
        "test": logits[:, : len(session.dataset.splits["test"])],
        "in_accuracy": np.ones(BLOCK_SIZE),
        "test_accuracy": np.full(BLOCK_SIZE, 0.5),
        "seconds": np.full(BLOCK_SIZE, 2.0),
    }
    session.store.put(Task("block", spec, block).object_name, pack(arrays))


@contextmanager
def opened(book: Ledger) -> Iterator[None]:
    book.prepare()
    with book.kept(1.5):
        yield


def compute(session: Session, stop: int | None = None) -> Stretch:
    """Perform what a campaign lacks with made models on two made workers, 3 seconds each of which 2 are training."""
    campaign = session.study.campaign_spec(session.dataset.fingerprint)
    record = ledger.stretch_of(session, campaign, session.plan.campaign_counts()["done"])
    book = Ledger(session, Cluster(2, 0.0), record, Tally(session.store, campaign, session.dataset))
    with work.beating(session), opened(book):
        for block in [task.block for task in session.plan.missing(session.plan.blocks())]:
            for member in range(BLOCK_SIZE):
                if member == BLOCK_SIZE - 1:
                    put_block(session, block)
                began = 3.0 * (BLOCK_SIZE * block + member) / 2
                book.hear(outcome(str(member % 2), began - 1.5 * (member % 2), 3.0, 2.0))
            if block == stop:
                raise KeyboardInterrupt
    return book.stretch


def campaign_run(uri: str) -> tuple[Run, dict[str, list[tuple[int, int, float]]]]:
    """The one run of a campaign that MLflow holds, and all its points by metric."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    points = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return run, {name: [(p.timestamp, p.step, p.value) for p in found] for name, found in points.items()}


def plain(run: Run) -> tuple[object, ...]:
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("unlearn.")}
    return run.info.status, run.info.start_time, run.info.end_time, run.data.params, tags


def test_a_campaign_is_one_run_that_goes_on_and_can_be_rebuilt(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    uri, other = f"sqlite:///{folder}/mlflow.db", f"sqlite:///{tmp_path}/other.db"
    with pytest.raises(KeyboardInterrupt):
        compute(session_of(folder, 30), stop=1)
    run, points = campaign_run(uri)
    assert run.info.status == "KILLED"
    assert [step for _, step, _ in points["device_hours"]] == [10, 20]
    compute(session_of(folder, 30))
    grown = compute(session_of(folder, 40))
    run, points = campaign_run(uri)
    assert run.info.status == "FINISHED"
    assert [step for _, step, _ in points["device_hours"]] == [10, 20, 30, 40]
    by_hand = {
        "device_hours": 40 * 2 / 3600,
        "device_hours_saved": (20 + 30) * 2 / 3600,  # found by the second and the third command
        "cached_models": 30,
        "models_per_hour": 3600 * 10 / 15,  # ten models of 3 seconds on two workers
        "utilisation": 2 / 3,
        "utilisation_min": 2 / 3,
        "share_outside_training": 1 / 3,
        "in_accuracy": 1.0,
        "test_accuracy": 0.5,
    }
    assert {name: run.data.metrics[name] for name in by_hand} == pytest.approx(by_hand)
    summary = json.loads(
        (results.get_table(Store(str(folder)), f"scores/{grown.scores_key}.parquet")).schema.metadata[b"summary"]
    )
    assert summary["models"] == 40
    assert run.data.metrics["split_half"] == pytest.approx(summary["split_half"])
    assert run.data.metrics["standard_error"] == pytest.approx(summary["standard_error"])
    assert run.data.tags["unlearn.scores"] == grown.scores_key
    assert run.data.tags["unlearn.gate"] == "passed"
    assert (run.data.params["model"], run.data.params["training.epochs"], run.data.params["fraction"]) == (
        "small_cnn",
        "20",
        "0.7",
    )
    files = MlflowClient(tracking_uri=uri).list_artifacts(run.info.run_id)
    assert [file.path for file in files] == ["most_memorized.csv", "scores.png"]
    track.run(str(folder), uri)
    assert plain(campaign_run(uri)[0]) == plain(run)
    assert campaign_run(uri)[1] == points, "writing again added something"
    track.run(str(folder), other)
    rebuilt, again = campaign_run(other)
    assert (plain(rebuilt), again) == (plain(run), points)


def test_a_campaign_that_is_found_complete_after_a_kill_is_finished_by_track(tmp_path: Path) -> None:
    """The last command that trained its models said nothing any more; the next had nothing to train."""
    folder = tmp_path / "store"
    uri, options = f"sqlite:///{folder}/mlflow.db", Options("digits", ["campaign.models=20"], str(folder))
    with pytest.raises(KeyboardInterrupt):
        compute(session_of(folder, 20), stop=1)
    client, (run, points) = MlflowClient(tracking_uri=uri), campaign_run(uri)
    client.set_tag(run.info.run_id, tracking.DRIVER_TAG, f"{this_process()}0")  # as kill -9 leaves it
    client.update_run(run.info.run_id, status="RUNNING")
    (record,) = costs.get_stretches(Store(str(folder)))
    costs.put_stretch(Store(str(folder)), replace(record, status="running"))
    assert "0 models trained" in here(memorize.run, options)
    assert campaign_run(uri)[0].info.status == "RUNNING"
    track.run(str(folder), uri)
    run, after = campaign_run(uri)
    assert (run.info.status, run.data.tags["unlearn.gate"], after) == ("FINISHED", "passed", points)
    assert tracking.DRIVER_TAG not in run.data.tags


def test_of_what_reaches_out_of_a_window_the_share_inside_counts() -> None:
    inside, across, after = outcome("x", 10, 5, 4.0), outcome("y", 12, 8, 6.4), outcome("z", 15, 3, 1.0)
    found = costs.within([inside, across, after], EPOCH + 10, EPOCH + 15)
    assert found[0].training_seconds == pytest.approx(inside.training_seconds)
    assert (found[1].began - EPOCH, found[1].seconds) == pytest.approx((12, 3))
    assert found[1].training_seconds == pytest.approx(0.8 * 3)
    assert len(found) == 2, "what began after it is no part of it"


def test_an_outcome_without_seconds_costs_nothing() -> None:
    lost = Outcome("model", "k", 0, 0.0, 0.0, 0.0, EPOCH + 12, "3 workers died on it")
    done = replace(outcome("x", 10, 5, 4.0), kind="model")
    assert work.utilisation([done, lost], 1) == pytest.approx(0.8)


def test_a_failure_is_over_when_all_of_it_is_there_or_the_block_that_it_was_for(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for objects, whole, there, over in (
        (["a", "b"], None, ["a"], False),
        (["a", "b"], None, ["a", "b"], True),
        (["part"], "block", ["block"], True),
        (["part"], "block", ["part"], True),
        (["part"], "block", [], False),
    ):
        for name in ("a", "b", "part", "block"):
            store.delete(name)
        for name in there:
            store.put(name, b"x")
        attempt = results.Attempt("k", {}, "failed", "error", {"objects": objects, "whole": whole})
        assert is_made(store, attempt) == over


def test_what_a_repeated_command_finds_is_counted_once_and_keeps_the_export_fresh(tmp_path: Path) -> None:
    session = session_of(tmp_path / "store", 30)
    compute(session)
    session = session_of(tmp_path / "store", 30)
    summary = work.campaign_scores(session)
    found: list[int] = []
    ids: list[str] = []
    for asked in (session, session, replace(session, study=session.study.model_copy(update={"recipe": "another"}))):
        ledger.found(asked, summary)
        export.ensure(session.store)
        found.append(len(costs.get_stretches(session.store)))
        ids.append(results.table_metadata(session.store, "exports/costs.parquet")["export_id"])
    assert found == [2, 2, 3], "the one that trained, and what each recipe found"
    assert ids[0] == ids[1] != ids[2]
