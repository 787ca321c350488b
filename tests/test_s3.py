"""A whole sweep on an S3 of another make, in a process of its own: busy, slow, and equal to what a folder holds."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from jobs import report, status, sweep, track
from jobs.session import Options, open_session
from orchestrator import results
from orchestrator.experiment import Workspace
from orchestrator.store import Store
from tests.commands import ROOT, command, here
from tests.faults import Line, s3_server

FEW = ["training.epochs=2", "references=2", "seeds=0,1", "epochs=1", "forget_sets=random", "methods=identity,del"]
FEW += ["budget=0.1,0.3", "lr=0.1"]
NUM_RUNS = 2 + 2 * (1 + 2)


def bodies(store: Store) -> dict[str, Any]:
    """Rows by key without provenance, and the outputs of each."""
    found: dict[str, Any] = {}
    for name in results.row_keys(store):
        row = vars(results.get_row(store, name))
        found[name] = {part: value for part, value in row.items() if part != "provenance"}
        found[f"outputs of {name}"] = store.get(f"outputs/{name}.safetensors")
    return found


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    keys = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1"}
    for name, value in keys.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with s3_server() as url:
        yield url


@pytest.mark.chaos
def test_a_sweep_its_status_its_report_and_mlflow_on_a_busy_and_slow_s3(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = Store("s3://bucket/some/prefix", endpoint)
    words = ["sweep", "digits", *[word for setting in FEW for word in ("--set", setting)]]
    words += ["--storage", direct.root, "--workers", "2"]
    with Line(endpoint) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.url)
        process = subprocess.Popen(
            command(*words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        troubles = [(1, "slow down"), (2, "slow"), (4, "no reason")]  # with so many objects stored, until it is felt
        felt = 0
        while process.poll() is None:
            if line.refused + line.delayed > felt + 2:
                line.trouble("cut", 0.0)
            stored = len(direct.names("models")) + len(direct.names("rows"))
            if troubles and stored >= troubles[0][0] and line.is_well:
                felt = line.refused + line.delayed
                line.trouble(troubles.pop(0)[1], 60.0)
            time.sleep(0.3)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert "no MLflow: an S3 root without --tracking-uri tracks nothing" in said
        assert f"{2 + NUM_RUNS} models trained" in said
        assert not troubles
        assert line.is_well, "the trouble was not felt"
        session = open_session(Options("digits", FEW, str(tmp_path / "here")))
        worker = Workspace(session.dataset, session.context)
        for tasks in session.plan.waves().values():
            for task in tasks:
                assert worker.perform(task).error is None
        assert bodies(direct) == bodies(session.store)
        again = here(sweep.run, Options("digits", FEW, direct.root, address="127.0.0.1:1"))  # any use of Ray would fail
        assert "0 models trained" in again
        shown = here(status.run, Options("", (), direct.root))
        assert f"│ done  │ {NUM_RUNS}" in shown, shown
        page = tmp_path / "report.html"
        here(report.run, direct.root, None, page, "comparison")
        assert page.stat().st_size > 10_000
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        assert f"{NUM_RUNS} of {NUM_RUNS} rows were new" in here(track.run, direct.root, uri)
        assert f"0 of {NUM_RUNS} rows were new" in here(track.run, direct.root, uri)
        assert {r.info.status for r in MlflowClient(tracking_uri=uri).search_runs(["1"])} == {"FINISHED"}
        assert (tmp_path / "mlflow-artifacts").is_dir(), "artifacts lie beside the database"
    assert not [name for name in direct.names("") if name.startswith(("probe", "commands", "attempts"))]
