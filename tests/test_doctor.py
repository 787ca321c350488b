"""What the doctor says of a node, of versions and of MLflow; real nodes and a dashboard: test_nodes, test_submit."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import ray
import typer

from jobs.doctor import Finding, Machine, _authentication, _mlflow, _versions, judged, show
from orchestrator.nodes import Node
from orchestrator.store import Store

GIB = 2**30
HEALTHY = Machine(
    platform.python_version(),
    ray.__version__,
    version("torch"),
    ["H100", "H100"],
    True,
    100 * GIB,
    200 * GIB,
    64 * GIB,
    "",
    "",
)
NODE = Node("0", "gpu-1", {"CPU": 16.0, "GPU": 2.0, "object_store_memory": 30.0 * GIB}, is_ours=False)


def test_a_healthy_node_has_nothing_to_mend() -> None:
    lines = list(judged(NODE, HEALTHY, 0.2))
    assert {line.state for line in lines} == {"ok"}
    assert not any(line.remedy for line in lines)
    assert {line.check for line in lines} == {"storage", "torch", "gpus", "disk", "objects"}
    without = judged(NODE, replace(HEALTHY, storage=None), 0.2)
    assert "storage" not in {line.check for line in without}, "what could not be looked at is not called good"


@pytest.mark.parametrize(
    ("change", "skew", "check", "state", "remedy"),
    [
        ({"storage": "FileNotFoundError"}, 0.0, "storage", "failed", "s3://"),
        ({"plugins": "No module named 'x'"}, 0.0, "plugin", "failed", "install there"),
        ({"torch": "2.14.0"}, 0.0, "torch", "warning", "one image"),
        ({"torch": "none"}, 0.0, "torch", "failed", "one image"),
        ({"gpus": ["H100"]}, 0.0, "gpus", "failed", "driver"),
        ({"gpus": []}, 0.0, "gpus", "failed", "driver"),
        ({"gpus": "CUDA error: no kernel image"}, 0.0, "gpus", "failed", "match the driver"),
        ({"gpus": ["H100"] * 4}, 0.0, "gpus", "warning", "nvidia.com/gpu"),
        ({"disk_free": 9 * GIB}, 0.0, "disk", "failed", "95%"),
        ({"disk_free": 9 * GIB, "disk_total": 50 * GIB}, 0.0, "disk", "warning", "logs"),
        ({"shm_total": 64 * 2**20}, 0.0, "objects", "warning", "emptyDir"),
        ({}, 6.0, "clock", "warning", "chrony"),
    ],
)
def test_what_is_wrong_with_a_node_is_the_one_line_that_says_so_and_what_to_do(
    change: dict[str, Any], skew: float, check: str, state: str, remedy: str
) -> None:
    wrong = [line for line in judged(NODE, replace(HEALTHY, **change), skew) if line.state != "ok"]
    assert [(line.check, line.where, line.state) for line in wrong] == [(check, "gpu-1", state)]
    assert remedy in wrong[0].remedy


@pytest.mark.parametrize(("theirs", "state"), [("2.60.0", "ok"), ("2.60.1", "warning"), ("2.59.0", "failed")])
def test_another_ray_on_the_other_side_is_said_before_anything_is_sent(theirs: str, state: str) -> None:
    line = _versions("http://head:8265", theirs, "2.60.0")
    assert line.state == state
    assert (f"install ray=={theirs} here" in line.remedy) == (state != "ok")


def test_a_token_that_others_can_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert _authentication("").remedy.startswith("`ray get-auth-token --generate`")
    (tmp_path / "token").write_text("abc")
    (tmp_path / "token").chmod(0o644)
    assert _authentication("").remedy == f"chmod 600 {tmp_path / 'token'}"
    (tmp_path / "token").chmod(0o600)
    assert _authentication("").state == "ok"


def test_mlflow_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = Store(str(tmp_path / "store"))
    Path(store.root).mkdir()
    assert _mlflow(store, None).state == "ok"
    assert MlflowClient(tracking_uri=f"sqlite:///{store.path('mlflow.db')}").search_runs(["1"]) == []
    assert _mlflow(store, "none").state == "ok"
    gone = _mlflow(store, "http://127.0.0.1:1")
    assert gone.state == "failed"
    assert "mlflow server" in gone.said


def test_the_exit_code_says_whether_something_failed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [Finding("disk", "a", "ok", "plenty"), Finding("clock", "b", "warning", "off", "mend it")]
    show(lines)
    with pytest.raises(typer.Exit) as end:
        show([*lines, Finding("gpus", "c", "failed", "none", "buy one")])
    assert end.value.exit_code == 1
    assert "failed  gpus      c: none; buy one" in capsys.readouterr().out
