"""Submission to a real Ray with token authentication: our command, Ray's own, and what both refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from typer.testing import CliRunner

from jobs import parcel
from jobs.cli import app
from jobs.parcel import pack
from jobs.submit import run
from orchestrator.cluster import wants_token
from orchestrator.registry import InputError

ROOT = Path(__file__).parent.parent


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def environment(home: Path) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), "PATH": f"{binaries}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head started as the README says, with a token made first; its address and the environment of its user."""
    home = tmp_path_factory.mktemp("home")
    user = environment(home)
    subprocess.run(["ray", "get-auth-token", "--generate"], env=user, check=True, capture_output=True, timeout=60)
    port, dashboard, agent, client = free_ports(4)
    scratch = tempfile.mkdtemp(prefix="ray-")
    words = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    words += [f"--temp-dir={scratch}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    process = subprocess.Popen(
        words,
        env={**user, "RAY_AUTH_MODE": "token"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", dashboard), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert wants_token(f"127.0.0.1:{port}") is True
    yield f"http://127.0.0.1:{dashboard}", user
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def submit(words: list[str], user: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", "submit", *words]
    return subprocess.run(command, cwd=cwd, env=user, capture_output=True, text=True, timeout=240)


MINE = """
from orchestrator.recipes.small import digits
from orchestrator.study import Arm
from orchestrator.unlearning import METHODS
from orchestrator.training import clone

@METHODS
def nothing(model):
    return clone(model)

def tiny():
    methods = {"nothing": Arm(method="nothing")}
    return digits().model_copy(update={"recipe": "tiny", "methods": methods})
"""


def test_a_recipe_and_methods_of_ones_own_run_there_under_a_name_that_runs_once(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """Logs and exit code come back, from the second call too; commit and dirty flag reach the rows."""
    address, user = cluster
    user = {**user, "UNLEARN_GIT_COMMIT": "0123abc-dirty"}
    (tmp_path / "mine.py").write_text(MINE)
    store = tmp_path / "store"
    few = ["forget_sets=random", "references=2", "seeds=0", "training.epochs=1"]
    words = ["sweep", "mine.py:tiny", *[word for part in few for word in ("--set", part)], "--storage", str(store)]
    named = ["--address", address, "--submission-id", "tiny", "--"]
    done = submit([*named, *words], user, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    stop = re.search(r"stop it with: (RAY_AUTH_MODE=token )ray (job stop .*)", done.stdout)
    assert stop is not None, done.stdout
    as_said = {**user, "RAY_AUTH_MODE": "token"}
    subprocess.run(["ray", *stop[2].split(), "--no-wait"], env=as_said, check=True, capture_output=True, timeout=60)
    rows = [json.loads(path.read_text())["body"] for path in store.glob("rows/*.json")]
    assert sorted(row["spec"]["method"]["name"] for row in rows) == ["nothing", "retrain", "retrain"]
    assert {row["provenance"]["git_commit"] for row in rows} == {"0123abc-dirty"}

    again = submit([*named, *words], user, cwd=tmp_path)
    assert again.returncode == 0
    assert "job tiny is there already" in again.stdout
    logs = done.stdout.split("\n", 1)[1]
    assert logs == again.stdout.split("\n", 1)[1]
    assert "3 of 3" not in logs, "the job did not run a second time"
    other = submit([*named, *words, "--workers", "1"], user, cwd=tmp_path)
    assert other.returncode == 2
    assert "belongs to another command" in other.stderr
    bad = submit(["--address", address, "--", "memorize", "digit", "--storage", str(store)], user)
    assert bad.returncode == 2, bad.stdout + bad.stderr
    assert "unknown recipe 'digit'" in bad.stderr
    assert "job" not in bad.stdout


@pytest.mark.chaos
def test_what_rays_own_submission_began_and_ray_job_stop_ended_goes_on_with_the_same_command(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, user = cluster
    user = {**user, "RAY_AUTH_MODE": "token"}
    store = tmp_path / "store"
    words = ["python", "-m", "jobs", "memorize", "digits", "--set", "training.epochs=8", "--tracking-uri", "none"]
    words += ["--set", "campaign.models=20", "--storage", str(store)]
    ray_submit = ["ray", "job", "submit", "--address", address, "--working-dir", "."]

    def ray_job(*options: str) -> subprocess.CompletedProcess[str]:
        command = [*ray_submit, *options, "--", *words]
        return subprocess.run(command, cwd=ROOT, env=user, capture_output=True, text=True, timeout=240)

    assert ray_job("--no-wait", "--submission-id", "stopped").returncode == 0
    deadline = time.monotonic() + 120
    while len(before := models(store)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    token = Path(user["HOME"], ".ray", "auth_token").read_text().strip()
    bearer = {"Authorization": f"Bearer {token}"}

    def status() -> str:
        return str(requests.get(f"{address}/api/jobs/stopped", headers=bearer, timeout=30).json()["status"])

    requests.post(f"{address}/api/jobs/stopped/stop", headers=bearer, timeout=30).raise_for_status()  # ray job stop
    while status() != "STOPPED":
        assert status() in ("RUNNING", "STOPPED")
        assert time.monotonic() < deadline
        time.sleep(0.2)
    before = models(store)
    assert 3 <= len(before) < 20

    done = ray_job()
    assert done.returncode == 0, done.stdout + done.stderr
    trained = int(re.search(r"(\d+) models trained", done.stdout)[1])  # type: ignore[index]
    assert trained <= 20 - len(before)
    assert len(list(store.glob("campaigns/*/blocks/*.safetensors"))) == 2


def models(store: Path) -> dict[str, float]:
    """Single subset models and blocks in a store, as numbers of models."""
    return {str(path): path.stat().st_mtime for path in store.glob("campaigns/*/parts/*/*.safetensors")}


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--tracking-uri", "http://me:hunter2@mlflow:5000", "--storage", "/x"], "MLFLOW_TRACKING_PASSWORD"),
        (["--storage", "s3://key:secret@bucket/x"], "AWS_SECRET_ACCESS_KEY"),
        (["--storage=s3://bucket/x?access_key=a&secret_key=b"], "AWS_SECRET_ACCESS_KEY"),
        (["--storage", "/x", "--set", "data.root=pq8-zzv-secret"], "the value of SOME_API_TOKEN"),
        (["--storage", "runs"], "absolute path"),
        (["--storage", "/x", "--plugin", "missing.py"], "cannot be read"),
        (["--storage", "/x", "--plugin", "elsewhere"], "give its file by path"),
        (["--storage", "/x", "--set", "forget_sets.file.path=forget.csv"], "give its absolute path"),
        (["--storage", "/x", "--plugin", "a/same.py", "--plugin", "b/same.py"], "rename one of the two"),
    ],
)
def test_what_a_job_would_not_find_or_must_not_hold_is_refused_before_anything_is_sent(
    words: list[str], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/same.py", "b/same.py", "elsewhere.py", "forget.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("SOME_API_TOKEN", "pq8-zzv-secret")
    with pytest.raises(InputError, match=re.escape(remedy)):
        run(["sweep", "digits", *words], "http://127.0.0.1:1", None, wait=True)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("-- sweep digit", "unknown recipe 'digit'; did you mean 'digits'?"),
        ("-- sweep to_submit.py:one", "to_submit.py has no function 'one'"),
        ("-- sweep to_submit.py:tiny --set methods=nothin", "'nothin'"),
        ("-- sweep digits --set training.epoch=3", "unknown field 'training.epoch'; did you mean 'epochs'?"),
        ("-- sweep digits --tune accurac", "'accurac'"),
        ("-- sweep digits --set methods=finetune --tune forget_as_unseen", "the method identity reports"),
        ("-- memorize digits --models 15", "campaign.models"),
        ("-- memorize digits --plugin wrong.py", "SyntaxError"),
        ("-- demo --set seed=1", "unknown field 'seed'"),
        ("--adress http://x:1 -- sweep digits", "submit has no option --adress, did you mean '--address'?"),
        ("-- --no-wait sweep digits", "--no-wait is an option of submit; its options go before --"),
        ("-- sweep digits --submission-id=a", "--submission-id is an option of submit, not of sweep, and goes before"),
        ("--submission-id a/b -- sweep digits", "--submission-id is 'a/b'; allowed: letters, digits"),
        ("--submission-id .. -- sweep digits", "--submission-id is '..'; allowed"),
        ("-- status --address http://x:1", "--address is an option of submit, not of status"),
        # what this machine cannot know: the cluster's word is the first
        ("-- sweep digits --plugin on.the.nodes", "cannot be submitted to"),
        ("-- sweep digits_tuned --tune none", "cannot be submitted to"),
        ("-- sweep lacks.py:one", "cannot be submitted to"),
        ("--submission-id my_2nd-run.b -- sweep digits --search random --set search.seed=3", "cannot be submitted to"),
        ("-- sweep digits --tune forget_as_unseen --set tuning.seeds=7", "cannot be submitted to"),
        ("-- sweep digits --set forget_sets=file --set forget_sets.file.path=/x.csv", "cannot be submitted to"),
    ],
)
def test_what_can_be_known_to_fail_is_refused_here_and_nothing_else(
    words: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no cluster at all: what is not refused here asks for it."""
    (tmp_path / "to_submit.py").write_text(MINE.replace("nothing", "mine_of_submit"))
    (tmp_path / "wrong.py").write_text("def (")
    (tmp_path / "lacks.py").write_text("import a_module_that_only_the_nodes_have\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("UNLEARN_STORAGE", "/shared")
    found = CliRunner().invoke(app, ["submit", *(f"--address http://127.0.0.1:{free_ports(1)[0]} {words}").split()])
    assert isinstance(found.exception, InputError), found.output
    assert remedy in str(found.exception)
    assert "\n" not in str(found.exception)


def test_an_archive_beyond_rays_limit_is_refused_and_the_largest_files_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parcel.LIMIT == 104857600  # the dashboard's own words: Maximum request body size 104857600
    monkeypatch.setattr(parcel, "LIMIT", 2**20)
    large, zeros = tmp_path / "large.bin", tmp_path / "zeros.bin"
    large.write_bytes(os.urandom(2**20))
    zeros.write_bytes(bytes(2**22))  # which compresses to nothing
    small = pack(["list", "--plugin", str(Path(__file__))], [])
    assert small.words == ("list", "--plugin", "given/test_submit.py")
    assert replace(small, files={**small.files, "zeros.bin": zeros}).write(tmp_path / "a.zip") < 2**16
    with pytest.raises(InputError, match=r"largest files: large.bin \(1 MiB\), given/test_submit.py \(0 MiB\)"):
        replace(small, files={**small.files, "large.bin": large}).write(tmp_path / "b.zip")


def test_without_the_token_nothing_runs(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, _ = cluster
    stranger = environment(tmp_path)
    refused = submit(["--address", address, "--", "memorize", "digits", "--storage", str(tmp_path / "store")], stranger)
    assert refused.returncode == 2
    assert "token" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "store").exists()
    asked = doctor(["--address", address], stranger)
    assert asked.returncode == 1
    assert "failed  token     " in asked.stdout
    assert "put the cluster's token into" in asked.stdout


def test_the_doctor_looks_from_here_and_then_from_there(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, user = cluster
    words = ["--address", address, "--storage", str(tmp_path / "store"), "--tracking-uri", "none"]
    done = doctor(words, user)
    assert done.returncode == 0, done.stdout + done.stderr
    here, there = done.stdout.split("job ", 1)
    assert "the cluster asks for one and takes ours" in here
    assert f"ok      ray       {address}" in here
    assert re.search(r"ok      storage   \S+ \(\S+\): sees the driver's root and can write to it", there)
    assert "0 failed" in there


def doctor(words: list[str], user: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, env=user, capture_output=True, text=True, timeout=240)
